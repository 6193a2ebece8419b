"""engine/tasks.py: when a text ends, what changes its logits, what is reported of them, and what a stream may show."""

import numpy as np
import pytest

from engine import SamplingParams
from tests import tiny_models as tiny
from tests.tiny_models import greedy

PROMPT, OTHER = tiny.prompts(3, 9, 6)
GREEDY = greedy()
TEXT = "the cat is red"
EURO = (5, 6, 7)                # the three bytes of "€", a token each


def log_softmax(logits):
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


# --- when a text ends

def test_max_tokens(llm):
    whole = llm.generate(PROMPT, greedy(max_tokens=20)).token_ids
    for n in (1, 2, 7):
        output = llm.generate(PROMPT, greedy(max_tokens=n))
        assert output.token_ids == whole[:n] and output.finish_reason == "length"
        assert output.metrics.n_generated_tokens == n and output.metrics.n_prompt_tokens == len(PROMPT)


def test_max_seq_len_ends_a_text_as_length(checkpoints):
    llm = tiny.open_llm(checkpoints["gemma4"], max_seq_len=12)
    whole = tiny.open_llm(checkpoints["gemma4"]).generate(PROMPT, GREEDY).token_ids
    output = llm.generate(PROMPT, GREEDY)
    assert output.token_ids == whole[:3] and output.finish_reason == "length"
    assert len(llm.generate([8] * 11, GREEDY).token_ids) == 1
    assert llm.max_seq_len == 12 and llm.forward([[8] * 12]).logits[0].shape == (1, 96)


def test_eos_ids_come_from_generation_config_then_config(tmp_path):
    """tiny's config.json says 1; each id is forced, and must end the text only where the files name it."""
    for generation, named in ((None, {1}), ({"eos_token_id": 40}, {40}), ({"eos_token_id": [41, 42]}, {41, 42})):
        llm = tiny.open_llm(tiny.write(tmp_path / "m", "gemma3", generation=generation))
        for token in (1, 40, 41, 42):
            forced = {"logit_bias": {token: 1e4}, "max_tokens": 4}
            output = llm.generate(PROMPT, greedy(**forced, ignore_eos=False))
            if token in named:
                assert output.token_ids == [token] and output.finish_reason == "stop"
            else:
                assert output.token_ids == [token] * 4 and output.finish_reason == "length"
            assert llm.generate(PROMPT, greedy(**forced)).token_ids == [token] * 4


def test_eos_ids_outside_the_vocabulary_do_no_harm(tmp_path):
    llm = tiny.open_llm(tiny.write(tmp_path / "m", "gemma3", generation={"eos_token_id": [1, 106]}))
    output = llm.generate(PROMPT, greedy(ignore_eos=False, min_tokens=4, logit_bias={1: 1e4}))
    assert output.token_ids[4:] == [1]


def test_stop_token_ids(llm):
    whole = llm.generate(PROMPT, GREEDY).token_ids
    stop = whole[4]
    output = llm.generate(PROMPT, greedy(stop_token_ids=[stop, 95]))
    assert output.token_ids == whole[:whole.index(stop) + 1] and output.finish_reason == "stop"
    forced = greedy(logit_bias={tiny.EOS: 1e4}, stop_token_ids=[tiny.EOS])
    assert llm.generate(PROMPT, forced).token_ids == [tiny.EOS]                 # a stop id counts under ignore_eos too


@pytest.mark.parametrize("field", [{"ignore_eos": False}, {"stop_token_ids": [tiny.EOS, 60]}])
def test_min_tokens_holds_the_end_off(llm, field):
    """The end is wanted from the first token on, and comes as soon as min_tokens others are there."""
    for n in (0, 1, 5):
        output = llm.generate(PROMPT, greedy(**field, min_tokens=n, logit_bias={tiny.EOS: 1e4, 60: 1e3}))
        assert len(output.token_ids) == n + 1 and output.finish_reason == "stop"
        assert output.token_ids[-1] == tiny.EOS and tiny.EOS not in output.token_ids[:-1]


def test_stop_strings_wherever_they_lie(llm):
    """Every substring of a text, within tokens and across their borders: cut before its first occurrence."""
    whole = llm.generate(TEXT, greedy(max_tokens=24))
    for begin in range(0, len(whole.text), 3):
        for end in {begin + 1, begin + 2, begin + 5, begin + 12} & set(range(len(whole.text) + 1)):
            stop = whole.text[begin:end]
            output = llm.generate(TEXT, greedy(max_tokens=24, stop=stop))
            assert output.finish_reason == "stop" and output.text == whole.text[:whole.text.index(stop)]
            n = len(output.token_ids)
            assert output.token_ids == whole.token_ids[:n]
            assert stop in llm.tokenizer.decode(output.token_ids)               # its last token completed it
            assert stop not in llm.tokenizer.decode(output.token_ids[:-1])
            pieces = list(llm.stream(TEXT, greedy(max_tokens=24, stop=stop)))
            assert "".join(piece.text for piece in pieces) == output.text
            assert [token for piece in pieces for token in piece.token_ids] == output.token_ids


def spell(*tokens):
    """Params that make the first tokens of a greedy text these: each is wanted less than the one before, and once used,
    not at all."""
    return {"logit_bias": {token: 4000.0 - 500 * i for i, token in enumerate(tokens)}, "presence_penalty": 1e4}


def test_the_earliest_of_several_stop_strings_counts(llm):
    whole = llm.generate(TEXT, greedy(max_tokens=24)).text
    early, late = whole[3:5], whole[9:14]
    assert llm.generate(TEXT, greedy(max_tokens=24, stop=[late, early, "@"])).text == whole[:whole.index(early)]
    assert llm.generate(TEXT, greedy(max_tokens=24, stop=["@", "@@@@"])).text == whole
    token = llm.tokenizer.token_id("▁the")                                      # both come with one token
    assert llm.generate(PROMPT, greedy(stop=["e", "h"], **spell(9, token))).text == "a t"


def test_a_stream_shows_all_that_cannot_begin_a_stop_string(llm):
    """At once without stop strings; else all but as many last characters as the longest lacks one of."""
    for stop, n_held in (((), 0), (("@",), 0), (("@@", "@@@@"), 3)):
        params, shown, ids = greedy(max_tokens=20, stop=stop), "", []
        for piece in llm.stream(PROMPT, params):
            shown, ids = shown + piece.text, ids + piece.token_ids
            whole = llm.tokenizer.decode(ids).rstrip("\ufffd")                   # half a character is held too
            assert shown.rstrip("\ufffd") == (whole if piece.finish_reason else whole[:max(0, len(whole) - n_held)])


def test_characters_across_token_borders(llm):
    """Bytes of one character come token by token: nothing is shown until it is whole, nothing is lost at the end."""
    params = greedy(max_tokens=3, **spell(*EURO))
    assert llm.generate(PROMPT, params).text == "€"
    assert [(p.text, p.token_ids, p.finish_reason) for p in llm.stream(PROMPT, params)] == [
        ("", [5], None), ("", [6], None), ("€", [7], "length")]
    params = greedy(max_tokens=2, **spell(*EURO))
    assert llm.generate(PROMPT, params).text == "".join(p.text for p in llm.stream(PROMPT, params)) == "\ufffd\ufffd"
    params = greedy(stop="€", **spell(9, *EURO, 10))
    output = llm.generate(PROMPT, params)
    assert output.text == "a" and output.token_ids == [9, *EURO] and output.finish_reason == "stop"
    params = greedy(ignore_eos=False, **spell(9, 5, tiny.EOS))
    output = llm.generate(PROMPT, params)
    assert output.text == "a\ufffd" and output.finish_reason == "stop"
    assert "".join(piece.text for piece in llm.stream(PROMPT, params)) == output.text


def test_special_tokens_are_ids_and_no_text(llm):
    output = llm.generate(PROMPT, greedy(ignore_eos=False, **spell(9, tiny.BOS, 10, tiny.EOS)))
    assert output.token_ids == [9, tiny.BOS, 10, tiny.EOS] and output.text == "ab"


# --- what the logits are changed to, and what is reported of them

def expected_greedy(llm, n_tokens, edit):
    """Greedy decoding written out: a full forward for every token, `edit(logits, output)` on float64 logits."""
    output = []
    for _ in range(n_tokens):
        logits = llm.forward([PROMPT + output]).logits[0][-1].astype(np.float64)
        edit(logits, output)
        output.append(int(logits.argmax()))
    return output


def test_logit_bias_forces_and_bans(llm):
    assert llm.generate(PROMPT, greedy(logit_bias={33: 1e4})).token_ids == [33] * 8
    plain = llm.generate(PROMPT, GREEDY).token_ids
    banned = dict.fromkeys(set(plain), -1e4)
    output = llm.generate(PROMPT, greedy(logit_bias=banned)).token_ids
    assert not set(output) & set(plain)

    def edit(logits, output):
        logits[list(banned)] -= 1e4
    assert output == expected_greedy(llm, 8, edit)


@pytest.mark.parametrize("penalty, amount", [("repetition_penalty", 1.8), ("repetition_penalty", 0.6),
                                             ("presence_penalty", 1.5), ("frequency_penalty", 0.9),
                                             ("frequency_penalty", -0.5)])
def test_penalties_change_the_text_as_defined(llm, penalty, amount):
    def edit(logits, output):
        if penalty == "repetition_penalty":
            seen = list(set(PROMPT + output))
            logits[seen] = np.where(logits[seen] > 0, logits[seen] / amount, logits[seen] * amount)
        else:
            for token in output if penalty == "frequency_penalty" else set(output):
                logits[token] -= amount
    got = llm.generate(PROMPT, greedy(max_tokens=20, **{penalty: amount})).token_ids
    assert got == expected_greedy(llm, 20, edit)
    assert got != llm.generate(PROMPT, greedy(max_tokens=20)).token_ids


@pytest.mark.parametrize("setting", [{}, {"max_batch_tokens": 4, "page_size": 3}, {"max_batch_tokens": 1}])
def test_logprobs_are_the_log_softmax_of_the_logits(checkpoints, llm, setting):
    """Of prompt and output, before penalties and temperature, in chunks too."""
    chunked = tiny.open_llm(checkpoints["gemma4"], **setting)
    params = SamplingParams(temperature=1.5, seed=5, max_tokens=6, ignore_eos=True, n_logprobs=4, prompt_logprobs=3,
                            repetition_penalty=1.3, logit_bias={9: 2.0})
    check_logprobs(llm, chunked.generate([OTHER, PROMPT], params))


def check_logprobs(llm, outputs, n=4, n_prompt=3):
    for output in outputs:
        rows = log_softmax(llm.forward([output.prompt_token_ids + output.token_ids], return_logits="all").logits[0])
        n_tokens = len(output.prompt_token_ids)
        assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == n_tokens
        assert len(output.logprobs) == len(output.token_ids)
        for i, reported in enumerate(output.prompt_logprobs[1:] + output.logprobs):
            chosen = (output.prompt_token_ids + output.token_ids)[i + 1]
            top = np.argsort(-rows[i])[:n_prompt if i + 1 < n_tokens else n].tolist()
            assert set(reported) == {chosen, *top}
            assert next(iter(reported)) == chosen
            for token, logprob in reported.items():
                assert type(token) is int and logprob == pytest.approx(rows[i][token], abs=1e-4)


def test_logprobs_survive_preemption(checkpoints, llm):
    path, sizes = checkpoints["gemma4"], {"page_size": 4, "max_seq_len": 40}
    tight = tiny.open_llm(path, kv_cache_bytes=tiny.kv_bytes_for(path, 1.4, **sizes), max_batch_tokens=8, **sizes)
    prompts = tiny.prompts(8, 20, 12, 25, 3, 17)
    params = greedy(max_tokens=12, n_logprobs=4, prompt_logprobs=3)
    outputs = tight.generate(prompts, params)
    assert tight.stats()["preemptions"] > 0
    assert [o.token_ids for o in outputs] == [llm.generate(prompt, params).token_ids for prompt in prompts]
    check_logprobs(llm, outputs)


def test_a_chosen_token_outside_the_likeliest_is_reported_too(llm):
    logits = llm.forward([PROMPT]).logits[0][-1]
    unlikely = int(logits.argmin())
    output = llm.generate(PROMPT, greedy(max_tokens=1, n_logprobs=2, logit_bias={unlikely: 1e4}))
    assert output.token_ids == [unlikely] and len(output.logprobs[0]) == 3
    assert output.logprobs[0][unlikely] == pytest.approx(log_softmax(logits)[unlikely], abs=1e-4)
    whole = llm.generate(PROMPT, greedy(max_tokens=1, n_logprobs=96)).logprobs[0]
    assert len(whole) == 96 and np.exp(list(whole.values())).sum() == pytest.approx(1, abs=1e-5)
