"""engine/reference_drafts.py: the random words of its draws, the ratio rule against its definition, extreme words."""

import numpy as np
import pytest

from engine import reference_drafts, sampler
from engine.random import exponential, philox4x32, uniform
from engine.reference_drafts import accept_coin, judge, probabilities
from engine.sampler import LIKELIEST, SamplingBatch, target_weights
from engine.sampling_params import SamplingParams
from tests.draft_chain import HOST

SEED, POSITION = 0xFEDCBA9876543210, 2**33 + 5
PLAIN = SamplingParams()


def words(n, domain, seed=SEED, position=POSITION):
    """The words of tokens 0 .. n - 1, straight from Philox."""
    counters = [[lane, position % 2**32, position >> 32, domain] for lane in range(-(-n // 4))]
    return philox4x32(counters, [seed % 2**32, seed >> 32]).ravel()[:n]


def logits_of(*probs):
    with np.errstate(divide="ignore"):
        return np.log(np.array([probs], np.float32))


def test_a_draft_is_drawn_in_domain_1():
    logits = np.random.default_rng(0).standard_normal((1, 11)).astype(np.float32)
    batch = SamplingBatch.build([(PLAIN, SEED, POSITION)])
    (draft,), (probs,) = HOST.sample_drafts(logits, batch)
    times = {domain: exponential(words(11, domain)) / probs for domain in range(4)}
    assert draft == times[1].argmin() and len({int(t.argmin()) for t in times.values()}) > 1


def test_the_coin_is_the_first_word_of_domain_2():
    got = accept_coin(np.array([SEED, 7], np.uint64), np.array([POSITION, 3]))
    assert got.tolist() == [uniform(words(1, 2))[0], uniform(words(1, 2, 7, 3))[0]]


@pytest.mark.parametrize("position", range(40))
def test_the_ratio_rule_as_it_is_defined(position):
    """Every step of speculative.md 3.4 by hand, for one slot; the residual in domain 3."""
    rng = np.random.default_rng(position)
    logits, other = rng.standard_normal((2, 1, 9)).astype(np.float32)
    batch = SamplingBatch.build([(SamplingParams(top_k=6), SEED, position)])
    drafts, draft_probs = HOST.sample_drafts(other, batch)
    target_probs = HOST.sample_drafts(logits, batch)[1][0]
    coin = uniform(words(1, 2, position=position))[0]
    want = drafts[0]
    if not coin * draft_probs[0, want] < target_probs[want]:
        rest = np.maximum(target_probs - draft_probs[0], 0)
        with np.errstate(divide="ignore"):
            want = (exponential(words(9, 3, position=position)) / rest).argmin()
    assert HOST.sample_with_drafts(logits, batch, drafts, draft_probs) == want


def test_both_ways_of_the_ratio_rule_are_among_them():
    rng = np.random.default_rng(1)
    logits, other = rng.standard_normal((2, 40, 9)).astype(np.float32)
    batch = SamplingBatch.build([(SamplingParams(top_k=6), SEED, position) for position in range(40)])
    drafts, draft_probs = HOST.sample_drafts(other, batch)
    n = np.count_nonzero(HOST.sample_with_drafts(logits, batch, drafts, draft_probs) == drafts)
    assert 10 < n < 35


@pytest.fixture
def forced(monkeypatch):
    """forced(word): every random word of the coin, and of the draws, is this."""
    def force(word):
        for module in (sampler, reference_drafts):
            monkeypatch.setattr(module, "token_words", lambda token, *_: np.full(len(token), word, np.uint64))
    return force


@pytest.mark.parametrize("word", [0, 0xFFFFFFFF])
def test_extreme_words(forced, word):
    """The coin is never 0: what cannot come is rejected. It is never 1: a draft as likely as in the target stays."""
    forced(word)
    batch = SamplingBatch.build([(SamplingParams(top_k=2), 0, 0)])
    logits = logits_of(0.5, 0.3, 0.2)
    even = np.full((1, 3), 1 / 3, np.float32)
    assert HOST.sample_with_drafts(logits, batch, [2], even) == [0]     # not kept; then the lowest id of what is left
    target = HOST.sample_drafts(logits, batch)[1]
    for draft in (0, 1):
        assert HOST.sample_with_drafts(logits, batch, [draft], target) == [draft]
    certain = np.array([[0, 1, 0]], np.float32)
    assert HOST.sample_with_drafts(logits, batch, [1], certain) == [1 if word == 0 else 0]
    sole = SamplingBatch.build([(SamplingParams(top_k=1), 0, 0)])
    assert HOST.sample_with_drafts(logits, sole, [1], certain) == [0]
    assert HOST.sample_with_drafts(logits, sole, [0], np.array([[1, 0, 0]], np.float32)) == [0]


def test_a_draft_as_likely_as_in_the_target_is_never_rejected():
    """(1 - 2^-24) * x < x in float32, for every x: for one of each size, and for those around powers of two."""
    rng = np.random.default_rng(2)
    x = np.concatenate([2.0 ** -rng.uniform(0, 62, 10_000), *(2.0**-np.arange(63) * (1 + e) for e in (0, 2**-23))])
    x = x.astype(np.float32)
    assert (uniform(np.array([0xFFFFFFFF])) * x < x).all()


def test_probabilities_sum_in_integers():
    weight = np.array([LIKELIEST, LIKELIEST // 3, 1])
    got = probabilities(weight)
    assert got.dtype == np.float32 and got[2] > 0
    np.testing.assert_allclose(got, weight / weight.sum(), rtol=2.0**-22)


def test_many_slots_are_judged_as_each_alone():
    target = target_weights(logits_of(0.5, 0.3, 0.1, 0.1)[0], SamplingBatch.build([(PLAIN, 0, 0)]), 0)
    draft_probs = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    seeds, at = np.arange(50, dtype=np.uint64), np.arange(50) * 3
    together = judge(target, 3, draft_probs, seeds, at)
    assert together.tolist() == [int(judge(target, 3, draft_probs, seeds[i:i + 1], at[i:i + 1])[0]) for i in range(50)]
    assert len(set(together.tolist())) > 2
