"""Pictures before drafts: text with a draft model is the text without, right behind a picture too, and where the tokens
of a picture see later ones."""

import numpy as np
import pytest

from engine import SamplingParams
from tests import seeing, tiny, tiny_models
from tests.speculating import Drafter, assert_all_free
from tests.tiny_draft import write_draft

MODELS = {"blocks": ("gemma4", {"use_bidirectional_attention": "vision"}),
          "unified": ("unified", {"use_bidirectional_attention": "vision"}),
          "causal": ("gemma4-e", {"pad_token_id": 5})}
PARTS = ((3, "a", 2), ("b",), (5, "c", "d", 9), (6,), ("d", "b", 1), (1, "e", 4, "c"))
SHORT = {"temperature": 0, "max_tokens": 20, "ignore_eos": True}
PARAMS = [SamplingParams(**{**SHORT, **more}) for more in (
    {}, {"temperature": 0.6, "seed": 2, "prompt_logprobs": 1}, {"n_logprobs": 1},
    {"temperature": 0.9, "top_k": 5, "seed": 4}, {"repetition_penalty": 1.3}, {"max_tokens": 7})]
SETTINGS = {"chunks": {"page_size": 3, "max_batch_tokens": 7, "max_seqs": 3}, "at-once": {"page_size": 4}}


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """(target that sees, its draft model)."""
    family, fields = MODELS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    target = tiny.write_checkpoint(root / "target", tiny.seeing(family, head_dim=8, global_head_dim=16,
                                                                tie_word_embeddings=False, **fields))
    return target, write_draft(root / "draft", target)


def generate(llm):
    """Token ids of every prompt of PARTS with its own parameters, as one batch; nothing is held behind it."""
    requests = [seeing.request(llm, seeing.prompt(llm.spec, *parts), params)
                for parts, params in zip(PARTS, PARAMS, strict=True)]
    outputs = llm._run(requests)
    assert_all_free(llm)
    return [output.token_ids for output in outputs]


def guesses(llm, texts):
    """says() of a Drafter that knows the texts, but is wrong at times, often by an id that stands for pictures."""
    known = [seeing.prompt(llm.spec, *parts)[0] + text for parts, text in zip(PARTS, texts, strict=True)]
    rng, wrong = np.random.default_rng(0), (*tiny.IDS["gemma4"].values(), 5, 7)

    def says(text, n):
        whole = next((one for one in known if one[:len(text)] == text), text)
        return [token if rng.random() < 0.7 else int(rng.choice(wrong)) for token in (whole[len(text):] + [0] * n)[:n]]
    return says


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("guessing", [False, True])
def test_drafts_behind_pictures_do_not_show(pair, setting, guessing):
    target, draft = pair
    expected = generate(tiny_models.open_llm(target))
    for n_drafts in (1, 4, 16):
        llm = tiny_models.open_llm(target, draft=draft, n_draft_tokens=n_drafts, **SETTINGS[setting])
        if guessing:
            Drafter(llm, guesses(llm, expected))
        assert generate(llm) == expected
        drafts = llm.stats()["drafts"]
        assert drafts["drafted"] > 0 and (drafts["accepted"] > 10 or not guessing)


def test_drawn_drafts_leave_greedy_requests_alone(pair):
    target, draft = pair
    plain, got = (generate(tiny_models.open_llm(target, **more)) for more in
                  ({}, {"draft": draft, "draft_sampling": "sample", "page_size": 3, "max_batch_tokens": 50}))
    assert [a for a, params in zip(got, PARAMS, strict=True) if params.is_greedy] == \
        [a for a, params in zip(plain, PARAMS, strict=True) if params.is_greedy]
