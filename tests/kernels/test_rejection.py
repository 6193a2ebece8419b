"""Rejection kernels against engine/reference_drafts.py: from the same logits the same tokens and probabilities, bit for
bit; and what the rules promise at their edges."""

from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest

from engine import cost, reference_drafts, sampler
from engine.accepted import Accepted
from engine.errors import ShapeError
from engine.kernels import ops, rejection
from engine.kernels import sampling as kernels
from engine.kernels.sampling import scratch_size
from engine.kernels.source import Build
from engine.sampler import SamplingBatch
from engine.sampling_params import SamplingParams
from engine.workspace import Scratch
from tests.draft_chain import HOST, Ops
from tests.kernels.declared import least_bytes
from tests.kernels.test_sampling import NO_MAXIMUM, REAL_VOCAB, batch_of, bins_of, random_logits, random_rule

PLAIN, GREEDY = SamplingParams(), SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def run(lane):
    return Ops(ops, lane)


def rows_of(batch, rows):
    return SamplingBatch(*(getattr(batch, field.name)[rows] for field in fields(SamplingBatch)))


def batch_at(rule, seeds, position=0):
    return SamplingBatch.build([(rule, seed, position) for seed in seeds])


def random_drafts(rng, logits, batch):
    """Drafts of a drafter that agrees more or less, and where they are from; some rows have none, or none of these."""
    noise = rng.standard_normal(logits.shape) * rng.choice([0, 0.1, 3], (len(logits), 1))
    with np.errstate(invalid="ignore"):
        drafts, probs = HOST.sample_drafts((logits + noise).astype(np.float32), batch)
    drafts[rng.random(len(drafts)) < 0.2] = -1
    other = rng.random(len(drafts)) < 0.2
    drafts[other] = rng.integers(0, logits.shape[1], other.sum())        # mostly of probability 0
    return drafts, probs


def quiet(op, *args):
    with np.errstate(invalid="ignore", over="ignore"):
        return op(*args)


# --- bit for bit

@pytest.mark.parametrize("listed", [kernels.LISTED, 5])             # 5: few lists fit, the logits are walked
@pytest.mark.parametrize("vocab", [1, 2, 5, 12, 40, 72, 1000, 5001])
def test_tokens_and_probabilities_are_those_of_the_twin(run, monkeypatch, vocab, listed):
    monkeypatch.setattr(kernels, "LISTED", listed)
    rng = np.random.default_rng([vocab, listed])
    logits = random_logits(rng, 24, vocab)
    batch = batch_of(rng, [random_rule(rng) for _ in range(24)])
    got, probs = run.sample_drafts(logits, batch)
    want, want_probs = quiet(HOST.sample_drafts, logits, batch)
    assert got.tolist() == want.tolist()
    np.testing.assert_array_equal(probs.view(np.int32), want_probs.view(np.int32))
    drafts, probs = random_drafts(rng, logits, batch)
    assert run.sample_with_drafts(logits, batch, drafts, probs).tolist() == \
        quiet(HOST.sample_with_drafts, logits, batch, drafts, probs).tolist()
    for top_k, delta in ((1, 0.0), (2, 0.3), (1000, 1.0)):
        is_relaxed = rng.random(24) < 0.8
        assert run.relax_drafts(logits, drafts, is_relaxed, top_k, delta, np.arange(24)).tolist() == \
            quiet(HOST.relax_drafts, logits, drafts, is_relaxed, top_k, delta, np.arange(24)).tolist()


def test_a_real_vocabulary(run):
    rng = np.random.default_rng(3)
    rules = [PLAIN, SamplingParams(top_k=64, top_p=0.95), SamplingParams(top_k=50000, top_p=0.97, min_p=0.001), GREEDY]
    logits = (rng.standard_normal((4, REAL_VOCAB)) * 3).astype(np.float32)
    batch = batch_of(rng, rules)
    draft_logits = logits + rng.standard_normal(logits.shape).astype(np.float32) * 3
    drafts, probs = run.sample_drafts(draft_logits, batch)
    want, want_probs = HOST.sample_drafts(draft_logits, batch)
    assert drafts.tolist() == want.tolist() and (probs == want_probs).all()
    assert run.sample_with_drafts(logits, batch, drafts, probs).tolist() == \
        HOST.sample_with_drafts(logits, batch, drafts, probs).tolist()


def test_a_row_alone_gives_what_it_gives_in_any_batch_and_in_any_chunks(run, monkeypatch):
    rng = np.random.default_rng(6)
    logits = random_logits(rng, 8, 9001)
    batch = batch_of(rng, [random_rule(rng) for _ in range(8)])
    drafts, probs = random_drafts(rng, logits, batch)
    tokens, proposed = run.sample_with_drafts(logits, batch, drafts, probs), run.sample_drafts(logits, batch)
    monkeypatch.setattr(kernels, "LEAST_CHUNK", 1024)
    order = rng.permutation(8)
    mixed = rows_of(batch, order)
    assert (run.sample_with_drafts(logits[order], mixed, drafts[order], probs[order]) == tokens[order]).all()
    for got, want in zip(run.sample_drafts(logits[order], mixed), proposed, strict=True):
        assert (got == want[order]).all()
    for i in (0, 7):
        one = logits[[i]], rows_of(batch, [i]), drafts[[i]], probs[[i]]
        assert run.sample_with_drafts(*one) == tokens[i] and run.sample_drafts(*one[:2])[0] == proposed[0][i]


def test_probabilities_are_the_filtered_softmax(run):
    logits = np.array([[0, 1, 2, 3, -np.inf], [3, 3, 0, 0, 0]], np.float32)
    batch = SamplingBatch.build([(SamplingParams(temperature=2, top_k=3), 1, 2), (SamplingParams(top_p=0.3), 1, 2)])
    _, probs = run.sample_drafts(logits, batch)
    e = np.exp([0.5, 1, 1.5])
    np.testing.assert_allclose(probs[0], [0, *e / e.sum(), 0], rtol=1e-6)
    assert probs[1].tolist() == [1, 0, 0, 0, 0]


def test_the_place_of_a_draft_may_come_from_the_lane(run):
    rng = np.random.default_rng(1)
    logits, positions = rng.standard_normal((6, 30)).astype(np.float32), np.arange(6, dtype=np.int32) * 1000 + 2**30
    here, there = (SamplingBatch.build([(PLAIN, 7, at) for at in places])
                   for places in ((positions + 3).tolist(), [0] * 6))
    got, want = run.sample_drafts(logits, there, positions, 3), run.sample_drafts(logits, here)
    assert got[0].tolist() == want[0].tolist() == HOST.sample_drafts(logits, there, positions, 3)[0].tolist()
    assert (got[1] == want[1]).all()


def test_draft_probabilities_may_lie_in_another_order(run):
    rng = np.random.default_rng(2)
    logits = rng.standard_normal((6, 30)).astype(np.float32)
    batch = batch_of(rng, [PLAIN] * 6)
    drafts, probs = random_drafts(rng, logits, batch)
    want = run.sample_with_drafts(logits, batch, drafts, probs)
    rows = rng.permutation(9)[:6]
    lie = np.full((9, 30), np.nan, np.float32)
    lie[rows] = probs
    for each in (run, HOST):
        assert each.sample_with_drafts(logits, batch, drafts, lie, rows).tolist() == want.tolist()


# --- edges of the ratio rule

@pytest.fixture(params=["kernel", "twin"])
def either(request, run):
    return run if request.param == "kernel" else HOST


def test_no_draft_is_a_plain_draw(either):
    rng = np.random.default_rng(4)
    logits = random_logits(rng, 16, 50)
    batch = batch_of(rng, [random_rule(rng) for _ in range(16)])
    poison = np.full(logits.shape, np.nan, np.float32)
    assert quiet(either.sample_with_drafts, logits, batch, [-1] * 16, poison).tolist() == \
        quiet(sampler.sample, logits, batch).tolist()


def test_a_drafter_equal_to_its_target_is_always_accepted(either):
    rng = np.random.default_rng(5)
    logits = rng.standard_normal((64, 50)).astype(np.float32)
    batch = batch_of(rng, [SamplingParams(temperature=t, top_k=k) for t in (0.5, 1, 2, 3) for k in (0, 1, 5, 20)] * 4)
    drafts, probs = either.sample_drafts(logits, batch)
    assert either.sample_with_drafts(logits, batch, drafts, probs).tolist() == drafts.tolist()


@pytest.mark.parametrize("draft", [0, 1, 2])
def test_a_greedy_row_gives_its_lowest_argmax(either, draft):
    logits = np.array([[1, 3, 3, 2]] * 8, np.float32)
    probs = np.full((8, 4), 0.25, np.float32)
    assert either.sample_with_drafts(logits, batch_at(GREEDY, range(8)), [draft] * 8, probs).tolist() == [1] * 8
    tokens, probs = either.sample_drafts(logits, batch_at(GREEDY, range(8)))
    assert tokens.tolist() == [1] * 8 and probs.tolist() == [[0, 1, 0, 0]] * 8


@pytest.mark.parametrize("rule", [PLAIN, GREEDY, SamplingParams(top_k=2, top_p=0.5)])
def test_rows_without_a_finite_maximum_give_their_argmax(either, rule):
    logits = np.array(NO_MAXIMUM, np.float32)
    tokens, probs = either.sample_drafts(logits, batch_at(rule, range(4)))
    assert tokens.tolist() == logits.argmax(axis=1).tolist() == probs.argmax(axis=1).tolist() == [1, 2, 0, 0]
    assert (probs.sum(axis=1) == 1).all() and (probs.max(axis=1) == 1).all()
    uniform = np.full((4, 4), 0.25, np.float32)
    assert either.sample_with_drafts(logits, batch_at(rule, range(4)), [3] * 4, uniform).tolist() == [1, 2, 0, 0]


def test_what_the_target_cannot_give_is_rejected(either):
    """Drafts outside a top-k, and banned ones, whatever the coin."""
    logits = np.tile(np.array([2, 1, 0, -np.inf], np.float32), (200, 1))
    probs = np.full((200, 4), 0.25, np.float32)
    batch = batch_at(SamplingParams(top_k=2), range(200))
    tokens = either.sample_with_drafts(logits, batch, [2, 3] * 100, probs)
    assert set(tokens.tolist()) == {0, 1}


def test_a_sole_survivor_is_drawn_whatever_was_drafted(either):
    """top-k 1: the target is certain. The draft's own distribution may even lie above it there."""
    logits = np.tile(np.array([2, 1, 0, 0], np.float32), (64, 1))
    batch = batch_at(SamplingParams(top_k=1), range(64))
    for probs in ([0.25] * 4, [1, 0, 0, 0], [2, 0.5, 0, 0]):
        for draft in (0, 1):
            probs_of = np.tile(np.array(probs, np.float32), (64, 1))
            assert either.sample_with_drafts(logits, batch, [draft] * 64, probs_of).tolist() == [0] * 64


def test_a_rejected_draft_is_followed_by_what_is_left_of_the_target(either):
    """target (1/2, 1/4, 1/4), draft (0, 3/4, 1/4): only token 0 has more of the target."""
    logits = np.log(np.array([[2, 1, 1]] * 300)).astype(np.float32)
    probs = np.tile(np.array([0, 0.75, 0.25], np.float32), (300, 1))
    tokens = either.sample_with_drafts(logits, batch_at(PLAIN, range(300)), [1] * 300, probs)
    assert set(tokens.tolist()) == {0, 1} and 60 < np.count_nonzero(tokens == 1) < 140       # a third is accepted
    assert (either.sample_with_drafts(logits, batch_at(PLAIN, range(300)), [2] * 300, probs) == 2).all()


def test_where_nothing_is_left_the_target_is_drawn_from(either):
    """Draft probabilities above all of the target's, as rounding could make them by a little."""
    logits = np.zeros((300, 3), np.float32)
    probs = np.full((300, 3), 0.9, np.float32)
    batch = batch_at(PLAIN, range(300))
    tokens = either.sample_with_drafts(logits, batch, [1] * 300, probs)
    assert set(tokens.tolist()) == {0, 1, 2} and min(np.bincount(tokens)) > 40
    rejected = tokens != 1
    third = np.full(3, np.float32(1) / np.float32(3))
    again = sampler.draw([(np.arange(3), third)] * 300, batch.seed, batch.position, 3)
    assert (tokens[rejected] == np.array(again)[rejected]).all()


def test_a_draft_without_a_probability_counts_as_certain(either):
    """One-hot, as an argmax drafter's: accepted as often as the target has it, never drawn again."""
    logits = np.log(np.array([[2, 1, 1]] * 400)).astype(np.float32)
    certain = np.tile(np.array([1, 0, 0], np.float32), (400, 1))
    batch = batch_at(PLAIN, range(400))
    want = either.sample_with_drafts(logits, batch, [0] * 400, certain)
    unknown = either.sample_with_drafts(logits, batch, [0] * 400, np.zeros_like(certain))
    assert unknown.tolist() == want.tolist() and 150 < np.count_nonzero(want == 0) < 250
    coins = reference_drafts.accept_coin(batch.seed, batch.position)
    assert ((want == 0) == (coins < np.float32(0.5))).all()


def test_ties_are_filtered_by_id(either):
    logits = np.tile(np.array([2, 2, 2, 2, -60], np.float32), (100, 1))
    probs = np.full((100, 5), 0.2, np.float32)
    batch = batch_at(SamplingParams(top_p=0.5), range(100))
    assert set(either.sample_with_drafts(logits, batch, [3] * 100, probs).tolist()) == {0, 1}
    assert set(either.sample_drafts(logits, batch)[0].tolist()) == {0, 1}


# --- the relaxed rule

@pytest.mark.parametrize("draft, top_k, delta, is_accepted", [
    (0, 1, 0.0, True), (1, 1, 1.0, False), (1, 2, 1.0, True), (1, 2, 0.24, False), (1, 2, 0.26, True),
    (2, 3, 0.37, False), (2, 3, 0.38, True), (3, 3, 0.38, True), (3, 2, 1.0, False), (4, 9, 1.0, False)])
def test_a_relaxed_draft(either, draft, top_k, delta, is_accepted):
    """Probabilities 1/2, 1/4, 1/8, 1/8, 0: of equal ones both are among the likeliest; a banned token never is."""
    with np.errstate(divide="ignore"):
        logits = np.log(np.array([[4, 2, 1, 1, 0]])).astype(np.float32)
    assert either.relax_drafts(logits, [draft], [True], top_k, delta, [9]) == [draft if is_accepted else 0]
    assert either.relax_drafts(logits, [draft], [False], top_k, delta, [9]) == [9]
    assert either.relax_drafts(logits, [-1], [True], top_k, delta, [9]) == [9]


def test_relaxed_rows_without_a_finite_maximum_give_their_argmax(either):
    tokens = either.relax_drafts(np.array(NO_MAXIMUM, np.float32), [3] * 4, [True] * 4, 4, 1.0, [9] * 4)
    assert tokens.tolist() == [1, 2, 0, 0]


# --- accepting

@pytest.mark.parametrize("n_seqs", [0, 1, 7, 300])
def test_accepting_is_the_twins(run, n_seqs):
    rng = np.random.default_rng(n_seqs)
    n_slots = rng.integers(1, 18, n_seqs)                   # 0 to 16 drafts
    begin = np.cumsum([0, *n_slots])
    tokens = rng.integers(0, 3, begin[-1])
    drafts = np.where(rng.random(begin[-1]) < 0.85, tokens, 5)
    drafts[begin[1:] - 1] = -1
    args = tokens, drafts, begin, rng.permutation(begin[-1]), rng.integers(0, 9000, n_seqs)
    for got, want in zip(run.accept_drafts(*args), HOST.accept_drafts(*args), strict=True):
        assert got.tolist() == want.tolist()
    wrong = tokens != drafts
    first = [int(np.flatnonzero(wrong[a:b])[0]) for a, b in pairwise(begin)]
    assert run.accept_drafts(*args).n_accepted.tolist() == first


def test_accepting_all_none_and_some_and_without_drafts_or_slots(either):
    got = either.accept_drafts([5, 6, 7, 5, 6, 7, 5, 6, 7, 8], [5, 6, -1, 4, 6, -1, 5, 4, -1, -1], [0, 3, 6, 9, 10, 10],
                               range(20, 30), [100, 200, 300, 400, 500])
    assert [array.tolist() for array in got] == [[2, 0, 1, 0, 0], [7, 5, 6, 8, 0], [22, 23, 27, 29, 0],
                                                 [102, 200, 301, 400, 500], [103, 201, 302, 401, 501]]


def test_empty_batches(either):
    none = np.zeros((0, 5), np.float32)
    tokens, probs = either.sample_drafts(none, SamplingBatch.build([]))
    assert tokens.shape == (0,) and probs.shape == (0, 5)
    assert either.sample_with_drafts(none, SamplingBatch.build([]), [], none).shape == (0,)
    assert either.relax_drafts(none, [], [], 1, 0.5, []).shape == (0,)
    assert [len(array) for array in either.accept_drafts([], [], [0], [], [])] == [0] * 5


# --- traffic

def assert_traffic(lane, monkeypatch, run, op_cost, **sizes):
    """Each launch of rejection.cu touches as many bytes as its traffic line says, and moves hardly more in sectors.
    The cost of the op is that of all, within what it guesses."""
    seen, launch = {}, Build.launch

    def watched(build, grid, *args, **named):
        launch(build, grid, *args, **named)
        seen[build.source.file, build.entry] = lane.traffic()

    monkeypatch.setattr(Build, "launch", watched)
    run()
    for (file, entry), traffic in seen.items():
        if file == "rejection.cu":
            assert traffic.distinct_bytes == least_bytes(file, entry, N_BINS=kernels.N_BINS, **sizes), entry
            assert traffic.moved_bytes - traffic.small_reread_bytes <= 1.1 * traffic.distinct_bytes + 300, entry
    assert op_cost.traffic_bytes == pytest.approx(sum(traffic.distinct_bytes for traffic in seen.values()), rel=0.1)


@pytest.mark.parametrize("rule", [SamplingParams(top_k=64), SamplingParams(top_p=0.95, temperature=2)])
def test_sampling_drafts_moves_what_its_headers_say(lane, run, monkeypatch, rule):
    logits, batch = one_row(rule)
    assert_traffic(lane, monkeypatch, lambda: run.sample_drafts(logits, batch),
                   cost.sample_drafts(logits, batch, None, None), vocab=65536, n_listed=n_listed(logits, batch))


def test_a_rejected_draft_moves_what_its_header_says(lane, run, monkeypatch):
    logits, batch = one_row(SamplingParams(top_p=1 - 2**-20))
    token, weight = sampler.target_weights(logits[0], batch, 0)
    n_read = 4 * len(set((token // 4).tolist()))
    draft = int(token[weight.argmin()])
    assert_traffic(lane, monkeypatch,
                   lambda: run.sample_with_drafts(logits, batch, [draft], np.full((1, 65536), 0.5, np.float32)),
                   cost.sample_with_drafts(logits, batch, None, None, None), vocab=65536, n_read=n_read,
                   n_listed=n_listed(logits, batch))


def test_relaxing_moves_what_its_header_says(lane, run, monkeypatch):
    logits, _ = one_row(PLAIN)
    assert_traffic(lane, monkeypatch, lambda: run.relax_drafts(logits, [5], [True], 10, 0.6, [0]),
                   cost.relax_drafts(logits, None, None, 10, 0.6, None), vocab=65536)


def test_accepting_moves_what_its_header_says(lane, run, monkeypatch):
    n_seqs, tokens = 200, np.arange(1000)
    drafts = tokens.copy()
    drafts[4::5] = -1
    args = tokens, drafts, np.arange(0, 1001, 5), tokens, np.zeros(n_seqs, np.int32)
    of_op = cost.accept_drafts(*(np.asarray(a, np.int32) for a in args), None)
    run.accept_drafts(*args)
    if lane.name == "emulated":
        assert lane.traffic().distinct_bytes == of_op.traffic_bytes == least_bytes(
            "rejection.cu", "accept_drafts", n_tokens=1000, n_drafts=800, n_seqs=200)


def one_row(rule):
    logits = (np.random.default_rng(0).standard_normal((1, 65536)) * 3).astype(np.float32)
    return logits, SamplingBatch.build([(rule, 1, 2)])


def n_listed(logits, batch):
    """Tokens in the bin with the cut."""
    everything = SamplingBatch.build([(SamplingParams(temperature=1 / float(batch.inverse_temperature[0])), 1, 2)])
    bins, kept = (bins_of(sampler.target_weights(logits[0], rules, 0)[1]) for rules in (everything, batch))
    return np.count_nonzero(bins == kept.min())


# --- launchers

def test_what_does_not_fit_is_refused(lane):
    n_floats, n_counters = scratch_size(2, 8)
    scratch = Scratch(lane.empty(n_floats, np.float32), lane.zeros(n_counters, np.int32))
    logits, out, drafts = (lane.zeros(shape, dtype) for shape, dtype in (((2, 8), np.float32), (2, np.int32),
                                                                         (2, np.int32)))
    batch = SamplingBatch(*(lane.put(getattr(batch_at(PLAIN, range(2)), f.name)) for f in fields(SamplingBatch)))
    with pytest.raises(ShapeError, match=r"sample_drafts: probs is \[2, 7\] float32, expected \[n_rows=2, vocab=8\]"):
        rejection.sample_drafts(logits, batch, out, lane.zeros((2, 7), np.float32), scratch)
    with pytest.raises(ShapeError, match=r"sample_with_drafts: draft_probs is \[3, 8\] float32, expected \[n_rows=2"):
        rejection.sample_with_drafts(logits, batch, drafts, lane.zeros((3, 8), np.float32), out, scratch)
    with pytest.raises(ShapeError, match=r"sample_with_drafts: drafts is \[3\] int32, expected \[n_rows=2\]"):
        rejection.sample_with_drafts(logits, batch, lane.zeros(3, np.int32), logits, out, scratch)
    with pytest.raises(ShapeError, match=r"relax_drafts: delta is 1.5, expected 0 .. 1"):
        rejection.relax_drafts(logits, drafts, lane.zeros(2, np.bool_), 10, 1.5, out, scratch)
    with pytest.raises(ShapeError, match=r"relax_drafts: scratch.counters holds 4, expected at least 8"):
        rejection.relax_drafts(logits, drafts, lane.zeros(2, np.bool_), 10, 0.5, out,
                               scratch._replace(counters=scratch.counters[:4]))
    accepted = Accepted(*(lane.zeros(2, np.int32) for _ in Accepted._fields))
    with pytest.raises(ShapeError, match=r"accept_drafts: slot_begin is \[2\] int32, expected \[3\]"):
        rejection.accept_drafts(out, drafts, lane.zeros(2, np.int32), out, out, accepted)
