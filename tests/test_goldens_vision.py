"""Prompts with pictures and videos, from files to tokens, against transformers: logits, states, greedy tokens."""

import shutil
from functools import cached_property
from itertools import groupby

import numpy as np
import pytest

from engine import LLM, PromptError, SamplingParams, Video
from tests.golden import VISION_CASES, Golden, assert_logits_close


class Case(Golden):
    """A golden, with its prompts as the engine takes them."""

    def __init__(self, case):
        super().__init__(case)
        self.n = len(self.prompts)
        self.pictures = [self.images(i) for i in range(self.n)]
        self.clips = [[Video(frames) for frames in self.videos(i)] for i in range(self.n)]

    def prompt(self, i, ids=None):
        return {"token_ids": self.prompts[i] if ids is None else ids, "images": self.pictures[i],
                "videos": self.clips[i]}

    def forward(self, llm, *rows, **arguments):
        """llm.forward of these prompts, or of all, as one batch."""
        rows = rows or range(self.n)
        return llm.forward([self.prompts[i] for i in rows], [self.pictures[i] for i in rows],
                           [self.clips[i] for i in rows], **arguments)

    @cached_property
    def slots(self):
        """The ids of soft tokens."""
        return {token for i in range(self.n) for token, kind in
                zip(self.prompts[i], self[f"p{i}.mm_token_type_ids"].tolist(), strict=True) if kind}

    def short(self, i):
        """The ids of prompt i with one placeholder in place of each picture and frame."""
        return [token for value, group in groupby(self.prompts[i])
                for token in ([value] if value in self.slots else group)]


@pytest.fixture(scope="module", params=VISION_CASES)
def golden(request):
    return Case(request.param)


@pytest.fixture(scope="module")
def whole(golden):
    return LLM(golden.checkpoint, device="cpu", max_seq_len=512, progress=False)


def greedy(n):
    return SamplingParams(temperature=0, ignore_eos=True, max_tokens=n)


@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 2048])
def test_logits_of_every_position_and_greedy_tokens(golden, chunk):
    """All prompts as one ragged batch, text beside pictures. Where a picture's tokens see later ones, it is whole in a
    step, whatever the chunk."""
    llm = LLM(golden.checkpoint, device="cpu", max_batch_tokens=chunk, max_seq_len=512, progress=False)
    for i, logits in enumerate(golden.forward(llm, return_logits="all").logits):
        assert_logits_close(logits, golden[f"p{i}.logits"])
    params = [greedy(len(golden.greedy(i))) for i in range(golden.n)]
    for i, output in enumerate(llm.generate([golden.prompt(i) for i in range(golden.n)], params)):
        assert output.token_ids == golden.greedy(i)
        assert output.prompt_token_ids == golden.prompts[i]


def test_one_prompt_at_a_time(golden, whole):
    for i in range(golden.n):
        assert_logits_close(golden.forward(whole, i, return_logits="all").logits[0], golden[f"p{i}.logits"])
        expected = golden.greedy(i)
        assert whole.generate(golden.prompt(i), greedy(len(expected))).token_ids == expected


def test_one_placeholder_a_picture(golden, whole):
    for i in range(golden.n):
        ids = golden.short(i)
        row = whole.forward([ids], [golden.pictures[i]], [golden.clips[i]], return_logits="all").logits[0]
        assert_logits_close(row, golden[f"p{i}.logits"])
        expected = golden.greedy(i)[:3]
        pieces = list(whole.stream(golden.prompt(i, ids), greedy(len(expected))))
        assert [piece.token_ids for piece in pieces] == [[token] for token in expected]


def test_hidden_states_of_every_layer(golden, whole):
    k = golden.meta["probe_prompt"]
    got = golden.forward(whole, k, return_hidden_states="layers").hidden_states[0]
    expected = golden[f"p{k}.hidden"]
    assert got.shape == expected.shape
    for j in range(len(expected)):
        assert np.abs(got[j] - expected[j]).max() <= 2e-4 * np.abs(expected[j]).max(), f"layer {j}"
    final = golden.forward(whole, k, return_hidden_states=True).hidden_states[0]
    assert np.abs(final - golden[f"p{k}.final_norm"]).max() <= 2e-4 * np.abs(golden[f"p{k}.final_norm"]).max()


def test_a_picture_is_encoded_once(golden):
    llm = LLM(golden.checkpoint, device="cpu", max_seq_len=512, progress=False)
    fresh = golden.forward(llm, return_logits="all").logits
    counts = llm.stats()["encoder_cache"]
    cached = golden.forward(llm, return_logits="all").logits
    again = llm.stats()["encoder_cache"]
    n = sum(map(len, golden.pictures)) + sum(len(video.frames) for clips in golden.clips for video in clips)
    assert (counts["lookups"], again["lookups"]) == (n, 2 * n)
    assert again["encoded_pictures"] == counts["encoded_pictures"] == n - counts["hits"]
    assert (again["hits"], again["held_pictures"]) == (counts["hits"] + n, 0)
    for one, other in zip(fresh, cached, strict=True):
        np.testing.assert_array_equal(one, other)


def test_config_as_transformers_writes_it_back(golden, whole, tmp_path):
    resaved = tmp_path / "checkpoint"
    shutil.copytree(golden.checkpoint, resaved)
    shutil.copy(golden.checkpoint / "config_v5.json", resaved / "config.json")
    other = LLM(resaved, device="cpu", max_seq_len=512, progress=False)
    np.testing.assert_array_equal(golden.forward(other, 0).logits[0], golden.forward(whole, 0).logits[0])


def test_a_picture_longer_than_any_sequence_is_refused_and_the_others_finish(golden):
    llm = LLM(golden.checkpoint, device="cpu", max_seq_len=54, progress=False)
    bad, good = llm.generate([golden.prompt(0), golden.prompts[0][:4]], greedy(2))
    assert len(good.token_ids) == 2 and isinstance(bad.error, PromptError)
    longest = max(len(list(group)) for value, group in groupby(golden.prompts[0]) if value in golden.slots)
    assert (f"{longest} of them a single picture" in str(bad.error)) == (longest > 53)
    with pytest.raises(PromptError, match="at most 54 fit"):
        golden.forward(llm, 0)
