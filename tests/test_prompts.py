"""Bad prompts and bad params: refused by name, alone at once, in a list in their place while the others finish."""

import numpy as np
import pytest

from engine import ParamsError, PromptError
from tests import tiny_models as tiny
from tests.tiny_models import greedy

PROMPT, OTHER = tiny.prompts(3, 9, 6)
GREEDY = greedy()


@pytest.fixture(scope="module")
def no_text_llm(tmp_path_factory):
    """An engine on a checkpoint without tokenizer files."""
    return tiny.open_llm(tiny.write(tmp_path_factory.mktemp("tiny") / "ids-only", "gemma3", with_text=False))


@pytest.fixture
def fresh(checkpoints):
    """An engine nobody has asked anything."""
    return tiny.open_llm(checkpoints["gemma4"])


BAD_PROMPTS = {
    "no tokens": ([], "empty"), "no text": ("", "empty"), "no ids in a dict": ({"token_ids": []}, "empty"),
    "beyond the vocabulary": ([8, 96], "token 1 .* is 96, outside .* 96"), "negative": ([8, -1], "token 1 .* is -1"),
    "a bool": ([8, True], "token 1 .* is True"), "a float": ([8, 9.0], "token 1 .* is 9.0"),
    "floats": (np.array([8.0, 9.0]), "token 0 .* is 8.0"), "text among ids": ([8, "a"], "token 1 .* is 'a'"),
    "ids in a list too many": ([[8, 9]], "token 0 .* is .8, 9.*an int"), "nothing": (None, "NoneType"),
    "a number": (5, "int"), "a numpy number": (np.int64(5), "int"), "bytes": (b"abc", "bytes"),
    "an object": (object(), "object"),
    "an empty dict": ({}, "neither"), "two in one": ({"prompt": "a", "token_ids": [8]}, "prompt and token_ids"),
    "an unknown key": ({"text": "a"}, "'text'"), "ids as text": ({"prompt": [8]}, "prompt is of type list"),
    "text as ids": ({"token_ids": "a"}, "token_ids is of type str"), "half a character": ("a\ud800", "surrogate"),
    "an image": ({"prompt": "a", "images": ["a.png"]}, "images"),
    "a video": ({"prompt": "a", "videos": np.zeros(3)}, "videos"),
    "too long": ([8] * 96, "96 tokens, at most 95 .*max_seq_len"), "long text": ("a" * 200, "at most 95"),
}
LISTS_OF_PROMPTS = ("no tokens", "text among ids", "ids in a list too many")        # what these are at the top level


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_a_bad_prompt_alone_raises_and_in_a_list_leaves_the_others(fresh, case):
    prompt, message = BAD_PROMPTS[case]
    if case not in LISTS_OF_PROMPTS:
        with pytest.raises(PromptError, match=message):
            fresh.generate(prompt, GREEDY)
    with pytest.raises(PromptError, match=message):
        fresh.stream(prompt, GREEDY)
    good = fresh.generate(OTHER, GREEDY).token_ids
    first, bad, last = fresh.generate([OTHER, prompt, OTHER], GREEDY)
    assert first.token_ids == last.token_ids == good
    assert bad.finish_reason == "error" and isinstance(bad.error, PromptError)
    assert bad.token_ids == [] and bad.text == ""
    stats = fresh.stats()
    assert (stats["requests"], stats["finished"], stats["errors"]) == (4, 3, 1)


def test_a_prompt_too_long_says_by_how_much(llm):
    for call in (llm.generate, llm.stream):
        with pytest.raises(PromptError) as caught:
            call([8] * 100, GREEDY)
        assert (caught.value.n_tokens, caught.value.limit) == (100, 95)
    with pytest.raises(PromptError) as caught:
        llm.forward([PROMPT, [8] * 97])
    assert (caught.value.n_tokens, caught.value.limit) == (97, 96)
    assert llm.generate([[8] * 99, PROMPT])[0].error.n_tokens == 99
    with pytest.raises(PromptError) as caught:
        llm.generate("", GREEDY)
    assert (caught.value.n_tokens, caught.value.limit) == (0, None)


def test_without_a_tokenizer(no_text_llm):
    output = no_text_llm.generate(PROMPT, GREEDY)
    assert len(output.token_ids) == 8 and output.text == ""
    assert [piece.text for piece in no_text_llm.stream(PROMPT, GREEDY)] == [""] * 8
    for call in (no_text_llm.generate, no_text_llm.stream):
        with pytest.raises(PromptError, match="no tokenizer"):
            call("a", GREEDY)
        with pytest.raises(ParamsError, match=r"stop strings need a tokenizer.*stop_token_ids"):
            call(PROMPT, greedy(stop="a"))
    with pytest.raises(PromptError, match="no chat template"):
        no_text_llm.chat([{"role": "user", "content": "a"}])
    outputs = no_text_llm.generate([PROMPT, "a", PROMPT], [GREEDY, GREEDY, greedy(stop="a")])
    assert [o.finish_reason for o in outputs] == ["length", "error", "error"]
    assert no_text_llm.generate(PROMPT, greedy(stop_token_ids=[output.token_ids[2]])).finish_reason == "stop"


# --- params

BAD_PARAMS = {
    "a dict": ({"temperature": 0}, "dict, expected SamplingParams"), "text": ("greedy", "str"),
    "n_logprobs": (greedy(n_logprobs=97), "n_logprobs is 97.* 96"),
    "prompt_logprobs": (greedy(prompt_logprobs=97), "prompt_logprobs is 97.* 96"),
    "logit_bias": (greedy(logit_bias={3: 1.0, 96: 1.0}), "logit_bias has token 96.* 96"),
    "stop_token_ids": (greedy(stop_token_ids=[96]), "stop_token_ids has token 96.* 96"),
}


@pytest.mark.parametrize("case", BAD_PARAMS)
def test_bad_params_alone_raise_and_in_a_list_leave_the_others(llm, case):
    params, message = BAD_PARAMS[case]
    for call in (llm.generate, llm.stream):
        with pytest.raises(ParamsError, match=message):
            call(PROMPT, params)
    good = llm.generate(PROMPT, GREEDY).token_ids
    first, bad, last = llm.generate([PROMPT] * 3, [GREEDY, params, GREEDY])
    assert first.token_ids == last.token_ids == good
    assert bad.finish_reason == "error" and isinstance(bad.error, ParamsError)


def test_params_for_a_list_are_one_or_one_each(llm):
    for params in ([GREEDY], [GREEDY] * 3, []):
        with pytest.raises(ParamsError, match=f"{len(params)} SamplingParams for 2 prompts"):
            llm.generate([PROMPT, OTHER], params)
    for params in (5, {"temperature": 0}, "greedy"):
        with pytest.raises(ParamsError, match="expected SamplingParams or a list"):
            llm.generate([PROMPT, OTHER], params)
    short = greedy(max_tokens=2)
    assert [len(o.token_ids) for o in llm.generate([PROMPT, OTHER, PROMPT], (short, GREEDY, short))] == [2, 8, 2]
