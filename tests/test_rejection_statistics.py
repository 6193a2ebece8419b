"""The law of text with drafts, by chi-square over consecutive seeds: both lossless rules emit what the target would,
and rules that are a little wrong, or lossy, fail the very same test. Large counts are the twin's, many seeds at once
through judge(); that the kernels draw the same is in tests/kernels/test_rejection.py."""

import numpy as np
import pytest

from engine import reference_drafts as rules
from engine.sampler import SamplingBatch, draw, sample, target_weights
from engine.sampling_params import SamplingParams
from tests.draft_chain import HOST
from tests.test_sampler import RULES, chi_square_z, target_probs

CLOSE, FAR = 4, 10                      # standard deviations of Pearson's statistic
N_SEQS = 40_000


class Chain:
    """What follows a token, of `vocab`: the target's distribution, and a draft's that is somewhat off.

    logits, draft_logits, draft_probs  [vocab, vocab] f32
    target, draft                      [vocab] (token, weight) as target_weights has them
    """

    def __init__(self, vocab, params, seed=4, forgets=False):
        rng = np.random.default_rng(seed)
        self.logits = (rng.standard_normal((1 if forgets else vocab, vocab)) * 0.8).astype(np.float32)
        self.draft_logits = (self.logits + rng.standard_normal(self.logits.shape) * 0.7).astype(np.float32)
        if forgets:                     # what follows does not depend on what went before
            self.logits, self.draft_logits = (np.tile(x, (vocab, 1)) for x in (self.logits, self.draft_logits))
        batch = SamplingBatch.build([(params, 0, 0)])
        self.params, self.vocab = params, vocab
        self.target, self.draft = ([target_weights(row, batch, 0) for row in logits]
                                   for logits in (self.logits, self.draft_logits))
        self.draft_probs = HOST.sample_drafts(self.draft_logits, SamplingBatch.build([(params, 0, 0)] * vocab))[1]

    def joint(self, n):
        """[vocab ** n] probabilities of the first n tokens after token 0."""
        step = np.stack([target_probs(row, self.params) for row in self.logits])
        probs = step[0]
        for _ in range(n - 1):
            probs = (probs[..., None] * step).reshape(-1, self.vocab)
        return probs.ravel()


def draws_of(targets, which, seeds, at, domain):
    """Draws from targets[which[i]]."""
    return np.array(draw([targets[i] for i in which.tolist()], seeds, at, domain))


def text_with_drafts(chain, rule, n_tokens, n_drafts=3, n_seqs=N_SEQS, stride=1):
    """[n_seqs, n_tokens] of seeds 0 .. n_seqs - 1. rule: "sample", "argmax", or one that is wrong: "argmax, judged with
    softmax", "relaxed". stride: by how much the position of the random words moves on from slot to slot."""
    seeds, every = np.arange(n_seqs, dtype=np.uint64), np.arange(n_seqs)
    text = np.zeros((n_seqs, n_tokens + n_drafts + 2), np.int64)         # before it, token 0
    length = np.ones(n_seqs, np.int64)
    best = chain.draft_probs.argmax(axis=1)
    while (live := every[length <= n_tokens]).size:
        last = text[live, length[live] - 1]
        drafts, emitted = np.full((len(live), n_drafts + 1), -1), np.empty((len(live), n_drafts + 1), np.int64)
        for i in range(n_drafts + 1):
            at = length[live] + stride * i
            if i < n_drafts:
                drafts[:, i] = draws_of(chain.draft, last, seeds[live], at, 1) if rule == "sample" else best[last]
            emitted[:, i] = slots(chain, rule, last, drafts[:, i], seeds[live], at)
            last = drafts[:, i]
        n_accepted = (emitted != drafts).argmax(axis=1)
        for i in range(n_drafts + 1):
            rows = live[n_accepted >= i]
            text[rows, length[rows] + i] = emitted[n_accepted >= i, i]
        length[live] += n_accepted + 1
    return text[:, 1:n_tokens + 1]


def slots(chain, rule, last, drafts, seeds, at):
    """What slots after the tokens `last` emit, those with the same draft together."""
    if rule == "argmax" or drafts[0] < 0:
        return draws_of(chain.target, last, seeds, at, 0)
    tokens = np.empty(len(last), np.int64)
    for before, draft in set(zip(last.tolist(), drafts.tolist(), strict=True)):
        rows = np.flatnonzero((last == before) & (drafts == draft))
        if rule == "relaxed":
            tokens[rows] = HOST.relax_drafts(chain.logits[[before]], [draft], [True], 2, 0.6, [0])
        else:
            tokens[rows] = rules.judge(chain.target[before], draft, chain.draft_probs[before], seeds[rows], at[rows])
    return tokens


def z_of(text, chain):
    """Of the joint counts of all tokens; cells of less than 5 count as one, or not at all where they have nothing."""
    index = np.ravel_multi_index(tuple(text.T), (chain.vocab,) * text.shape[1])
    probs = chain.joint(text.shape[1])
    counts = np.bincount(index, minlength=len(probs))
    large = len(text) * probs >= 5
    assert counts[probs == 0].sum() == 0
    rest = [sum(column[~large]) for column in (counts, probs)]
    if len(text) * rest[1] < 5:
        large[np.flatnonzero(large)[probs[large].argmin()]] = False
        rest = [sum(column[~large]) for column in (counts, probs)]
    return chi_square_z(np.append(counts[large], rest[0]), np.append(probs[large], rest[1]))


# --- one token, under every filter

@pytest.mark.parametrize("rule", ["sample", "argmax"])
@pytest.mark.parametrize("name", RULES)
def test_the_first_token_is_the_targets(name, rule):
    chain = Chain(16, RULES[name])
    assert abs(z_of(text_with_drafts(chain, rule, 1, n_drafts=1), chain)) < CLOSE


@pytest.mark.parametrize("name", ["plain", "warm", "all"])
def test_drafts_are_accepted_as_often_as_the_distributions_overlap(name):
    """The share of accepted drafts is the sum of min(target, draft); of argmax drafts, the target's probability."""
    chain, n = Chain(16, RULES[name]), N_SEQS
    target, draft = target_probs(chain.logits[0], chain.params), chain.draft_probs[0].astype(np.float64)
    seeds, at, first = np.arange(n, dtype=np.uint64), np.full(n, 9), np.zeros(n, int)
    for rule, share in (("sample", np.minimum(target, draft).sum()), ("argmax", target[draft.argmax()])):
        drafts = draws_of(chain.draft, first, seeds, at, 1) if rule == "sample" else np.full(n, draft.argmax())
        accepted = np.count_nonzero(slots(chain, rule, first, drafts, seeds, at) == drafts)
        assert 0.1 < share < 0.95 and abs(accepted - n * share) < CLOSE * np.sqrt(n * share * (1 - share))


# --- several tokens, and rules that are wrong

TOKENS = 4
SMALL = {"plain": SamplingParams(), "cool": SamplingParams(temperature=0.7), "cut": SamplingParams(top_k=3, top_p=0.95)}


@pytest.mark.parametrize("rule", ["sample", "argmax"])
@pytest.mark.parametrize("name", SMALL)
def test_the_joint_of_the_first_tokens_is_the_targets(name, rule):
    chain = Chain(4, SMALL[name])
    assert abs(z_of(text_with_drafts(chain, rule, TOKENS), chain)) < CLOSE


def target_itself(token, target_probs, draft_probs):
    return token, target_probs


@pytest.mark.parametrize("what, wrong", [("residual", target_itself), ("COIN", rules.PROPOSAL),
                                         ("RESIDUAL", rules.COIN)])
def test_a_wrong_ratio_rule_fails(monkeypatch, what, wrong):
    """A residual that is the target itself; a coin from the draft's own words; a residual draw from the coin's."""
    chain = Chain(4, SamplingParams())
    monkeypatch.setattr(rules, what, wrong)
    assert z_of(text_with_drafts(chain, "sample", TOKENS), chain) > FAR


@pytest.mark.parametrize("rule", ["argmax, judged with softmax", "relaxed"])
def test_another_rule_fails(rule):
    chain = Chain(4, SamplingParams())
    assert z_of(text_with_drafts(chain, rule, TOKENS), chain) > FAR


@pytest.mark.parametrize("rule", ["sample", "argmax"])
def test_adjacent_tokens_are_independent_given_what_went_before(rule):
    """Where what follows does not depend on the text, tokens are independent: within a step and across steps. A step
    that uses the random words of one position for all of its slots fails."""
    chain = Chain(4, SamplingParams(), forgets=True)
    for n_drafts in (1, 2):
        text = text_with_drafts(chain, rule, 3, n_drafts=n_drafts)
        assert abs(z_of(text[:, :2], chain)) < CLOSE and abs(z_of(text[:, 1:], chain)) < CLOSE
    assert z_of(text_with_drafts(chain, rule, 3, n_drafts=2, stride=0)[:, :2], chain) > FAR


def test_text_with_argmax_drafts_is_the_plain_text():
    """Token for token, whatever the number of drafts."""
    chain, n = Chain(16, RULES["all"]), 200
    plain, last = [], np.zeros(n, int)
    for t in range(6):
        last = sample(chain.logits[last], SamplingBatch.build([(chain.params, seed, t + 1) for seed in range(n)]))
        plain.append(last)
    for n_drafts in (0, 1, 2, 5):
        text = text_with_drafts(chain, "argmax", 6, n_drafts, n)
        assert (text == np.stack(plain, axis=1)).all()
