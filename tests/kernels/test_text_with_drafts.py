"""Text with drafts through the kernels: the plain text, or the twin's, token for token."""

import numpy as np
import pytest

from engine.kernels import ops
from engine.sampler import SamplingBatch
from engine.sampling_params import SamplingParams
from tests import test_rejection_statistics as statistics
from tests.draft_chain import HOST, Chain, Ops


@pytest.fixture(scope="module")
def run(lane):
    return Ops(ops, lane)


@pytest.fixture(params=["kernel", "twin"])
def either(request, run):
    return run if request.param == "kernel" else HOST


# --- rows of the statistics

@pytest.mark.parametrize("name", ["plain", "cool", "all"])
def test_the_rows_whose_statistics_are_tested(either, name):
    """tests/test_rejection_statistics.py judges many seeds at once; the ops give what it counts."""
    chain, n = statistics.Chain(16, statistics.RULES[name]), 400
    seeds, at, first = np.arange(n, dtype=np.uint64), np.full(n, 9), np.zeros(n, int)
    batch = SamplingBatch.build([(chain.params, seed, 9) for seed in range(n)])
    drafts, probs = either.sample_drafts(np.tile(chain.draft_logits[0], (n, 1)), batch)
    assert drafts.tolist() == statistics.draws_of(chain.draft, first, seeds, at, 1).tolist()
    assert (probs == chain.draft_probs[0]).all()
    logits = np.tile(chain.logits[0], (n, 1))
    assert either.sample_with_drafts(logits, batch, drafts, probs).tolist() == \
        statistics.slots(chain, "sample", first, drafts, seeds, at).tolist()


# --- text with drafts

RULES = [SamplingParams(), SamplingParams(temperature=0), SamplingParams(temperature=0.7, top_k=4),
         SamplingParams(temperature=1.5, top_p=0.9), SamplingParams(min_p=0.1)]


@pytest.mark.parametrize("n_drafts", [0, 1, 3, 16, None])           # None: another number at each step
def test_text_with_argmax_drafts_is_the_plain_text(either, n_drafts):
    chain, seeds = Chain(7, 1), [11, 12, 13, 14, 2**64 - 1]
    how_many = lambda step, b: (step * 3 + b) % 6 if n_drafts is None else n_drafts     # noqa: E731
    texts, n_accepted = chain.with_drafts(either, RULES, seeds, how_many, 20, sampled=False)
    assert texts == [chain.plain(rule, seed, 20) for rule, seed in zip(RULES, seeds, strict=True)]
    assert n_drafts == 0 or n_accepted > 5


def test_text_with_sampled_drafts_is_the_twins(run):
    chain, seeds = Chain(7, 1), [11, 12, 13, 14, 15]
    texts, n_accepted = chain.with_drafts(run, RULES, seeds, lambda step, b: (step + b) % 5, 20, sampled=True)
    twins, n_of_twin = chain.with_drafts(HOST, RULES, seeds, lambda step, b: (step + b) % 5, 20, sampled=True)
    assert texts == twins and n_accepted == n_of_twin
    plain = [chain.plain(rule, seed, 20) for rule, seed in zip(RULES, seeds, strict=True)]
    assert texts[1] == plain[1] and texts[0] != plain[0] and n_accepted > 20
