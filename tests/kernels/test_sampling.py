"""Sampling kernels against engine/sampler.py: from the same logits the same tokens, ids and edits, bit for bit."""

from dataclasses import dataclass, fields, replace

import numpy as np
import pytest

from engine import cost, sampler
from engine.errors import ShapeError
from engine.kernels import sampling as kernels
from engine.kernels.sampling import apply_edits, chunk_of, sample, scratch_size, top_logprobs
from engine.kernels.source import Build
from engine.sampler import MAX_VOCAB, LogitEdits, SamplingBatch
from engine.sampling_params import SamplingParams
from engine.workspace import MOST_TOP, Scratch
from tests.kernels.declared import least_bytes
from tests.test_logit_edits import edits_of

REAL_VOCAB = 262144
VOCABS = [1, 2, 5, 12, 16, 20, 24, 40, 48, 72, 1000, 5001]
NO_MAXIMUM = [[1, np.nan, 2, np.nan], [1, 0, np.inf, np.inf], [-np.inf] * 4, [np.nan, np.inf, -np.inf, 0]]


def scratch_for(lane, n_rows, vocab):
    n_floats, n_counters = scratch_size(n_rows, vocab)
    return Scratch(lane.empty(n_floats, np.float32), lane.zeros(n_counters, np.int32))


def on_lane(lane, fields_of_host):
    return type(fields_of_host)(*(lane.put(getattr(fields_of_host, f.name)) for f in fields(fields_of_host)))


def tokens_of(lane, logits, batch, domain=0):
    """sample() on the lane, with its promises: logits unchanged, counters zero again."""
    device, scratch = lane.put(logits), scratch_for(lane, *logits.shape)
    out = lane.empty(len(logits), np.int32)
    sample(device, on_lane(lane, batch), out, scratch, domain)
    assert not lane.to_host(scratch.counters).any()
    assert (lane.to_host(device).view(np.int32) == logits.view(np.int32)).all()
    return lane.to_host(out)


def tops_of(lane, logits, chosen, n):
    n_rows, scratch = len(logits), scratch_for(lane, *logits.shape)
    out = (lane.empty(n_rows, np.float32), lane.empty((n_rows, n), np.int32), lane.empty((n_rows, n), np.float32))
    top_logprobs(lane.put(logits), lane.put(np.asarray(chosen, np.int32)), n, *out, scratch)
    assert not lane.to_host(scratch.counters).any()
    return [lane.to_host(array) for array in out]


def batch_of(rng, rules):
    return SamplingBatch.build([(rule, int(rng.integers(2**63)) * 2 + i % 2, int(rng.integers(2**34)))
                                for i, rule in enumerate(rules)])


def random_rule(rng):
    return SamplingParams(temperature=float(rng.choice([0, 0.02, 0.6, 1, 1.5, 4, 1e30])),
                          top_k=int(rng.choice([0, 1, 3, 20, 500, 30000])),
                          top_p=float(rng.choice([1, 1e-9, rng.uniform(0.01, 1), 1 - 2**-32])),
                          min_p=float(rng.choice([0, rng.uniform(0, 0.5), 1])))


def random_logits(rng, n_rows, vocab):
    """Smooth or full of ties; some with infinities, zeros of both signs, or NaN."""
    logits = rng.standard_normal((n_rows, vocab)) * rng.choice([0.3, 3, 20], (n_rows, 1))
    tied = rng.random(n_rows) < 0.5
    logits[tied] = np.round(logits[tied] * 2) / 2
    for value, share in ((-np.inf, 0.4), (-0.0, 0.2), (0.0, 0.2), (-3e38, 0.1), (np.inf, 0.05), (np.nan, 0.05)):
        logits[(rng.random((n_rows, 1)) < share) & (rng.random((n_rows, vocab)) < 0.3)] = value
    return logits.astype(np.float32)


def expected(logits, batch, domain=0):
    with np.errstate(invalid="ignore"):
        return sampler.sample(logits, batch, domain)


# Tokens

@pytest.mark.parametrize("listed", [kernels.LISTED, 5])             # 5: few lists fit, the logits are walked
@pytest.mark.parametrize("vocab", VOCABS)
def test_tokens_are_those_of_the_host(lane, monkeypatch, vocab, listed):
    monkeypatch.setattr(kernels, "LISTED", listed)
    rng = np.random.default_rng([vocab, listed])
    for domain in range(4):
        logits = random_logits(rng, 16, vocab)
        batch = batch_of(rng, [random_rule(rng) for _ in range(16)])
        assert tokens_of(lane, logits, batch, domain).tolist() == expected(logits, batch, domain).tolist()


RULES = {
    "greedy": SamplingParams(temperature=0),
    "plain": SamplingParams(),
    "top_k": SamplingParams(top_k=64),
    "top_p": SamplingParams(top_p=0.95),
    "top_k and top_p": SamplingParams(top_k=64, top_p=0.95),
    "wide": SamplingParams(top_k=50000, top_p=0.97, min_p=0.001),
    "hot": SamplingParams(temperature=4, top_p=0.9),
}


def test_tokens_of_a_real_vocabulary(lane):
    rng = np.random.default_rng(3)
    logits = np.tile((rng.standard_normal(REAL_VOCAB) * 3).astype(np.float32), (len(RULES), 1))
    batch = batch_of(rng, RULES.values())
    assert tokens_of(lane, logits, batch).tolist() == expected(logits, batch).tolist()


@pytest.mark.parametrize("rule", [SamplingParams(top_p=0.5), SamplingParams(top_k=2, top_p=0.75)])
def test_equal_logits_of_the_largest_vocabulary(lane, rule):
    """Every token is a candidate, far more than a list holds, and their mass comes close to 2**63."""
    batch = SamplingBatch.build([(rule, 6, 7)])
    logits = np.zeros((1, MAX_VOCAB), np.float32)
    assert tokens_of(lane, logits, batch).tolist() == expected(logits, batch).tolist()


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.6, 0.9, 0.97, 0.99999, 1 - 2**-32])
@pytest.mark.parametrize("top_k", [0, 3, 900, 3002, 6000])
def test_cuts_through_ties_and_long_tails(lane, top_k, top_p):
    logits = np.concatenate([[8, 7.5], np.linspace(0, -12, 3000), np.full(9000, -22.6)]).astype(np.float32)
    rng = np.random.default_rng([top_k, int(top_p * 2**32)])
    batch = batch_of(rng, [SamplingParams(top_k=top_k, top_p=top_p, temperature=t) for t in (1, 3, 30)])
    logits = np.stack([rng.permutation(logits) for _ in range(3)])
    assert tokens_of(lane, logits, batch).tolist() == expected(logits, batch).tolist()


@pytest.mark.parametrize("top_p, possible", [(0.5, [0, 1]), (0.50001, [0, 1, 2]), (1e-12, [0]), (1, [0, 1, 2, 3])])
def test_top_p_takes_the_lowest_ids_of_equal_weights(lane, top_p, possible):
    logits = np.tile(np.array([2, 2, 2, 2, -60], np.float32), (64, 1))
    batch = SamplingBatch.build([(SamplingParams(top_p=top_p), seed, 0) for seed in range(64)])
    tokens = tokens_of(lane, logits, batch)
    assert sorted(set(tokens.tolist())) == possible


@pytest.mark.parametrize("extra, possible", [(-0.5, [0, 1, 2]), (0, [0, 1, 2]), (0.5, [0, 2])])
def test_min_p_compares_exactly(lane, extra, possible):
    logits = np.array([0, -1.5, 0.25], np.float32)
    weight = int(sampler.target_weights(logits, SamplingBatch.build([(SamplingParams(), 0, 0)]), 0)[1][1])
    rule = SamplingParams(min_p=(weight + extra) / sampler.LIKELIEST)
    tokens = tokens_of(lane, np.tile(logits, (64, 1)), SamplingBatch.build([(rule, seed, 0) for seed in range(64)]))
    assert sorted(set(tokens.tolist())) == possible


@pytest.mark.parametrize("rule", [SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_k=2, top_p=0.5)])
def test_rows_without_a_finite_maximum_give_their_argmax(lane, rule):
    logits = np.array(NO_MAXIMUM, np.float32)
    tokens = tokens_of(lane, logits, SamplingBatch.build([(rule, 1, 1)] * 4))
    assert tokens.tolist() == logits.argmax(axis=1).tolist() == [1, 2, 0, 0]


def test_subnormal_logits_are_told_apart(lane):
    tiny = np.float32(1e-40)
    logits = np.array([[-tiny, 0, tiny, tiny], [-tiny, -2 * tiny, -tiny, -1]], np.float32)
    assert tokens_of(lane, logits, SamplingBatch.build([(SamplingParams(temperature=0), 0, 0)] * 2)).tolist() == [2, 0]


def test_a_row_alone_draws_what_it_draws_in_any_batch(lane):
    rng = np.random.default_rng(5)
    logits = random_logits(rng, 40, 130)
    batch = batch_of(rng, [random_rule(rng) for _ in range(40)])
    together = tokens_of(lane, logits, batch)
    order = rng.permutation(40)
    row_of = lambda rows: SamplingBatch(*(getattr(batch, f.name)[rows] for f in fields(batch)))    # noqa: E731
    assert (tokens_of(lane, logits[order], row_of(order)) == together[order]).all()
    assert [tokens_of(lane, logits[[i]], row_of([i]))[0] for i in range(40)] == together.tolist()


def test_chunks_change_nothing(lane, monkeypatch):
    rng = np.random.default_rng(6)
    logits, batch = random_logits(rng, 8, 9001), batch_of(rng, [random_rule(rng) for _ in range(8)])
    tokens = []
    for least in (1024, 16384):
        monkeypatch.setattr(kernels, "LEAST_CHUNK", least)
        tokens.append(tokens_of(lane, logits, batch).tolist())
    assert tokens[0] == tokens[1]


def test_draws_follow_the_target(lane):
    """Pearson's statistic over 500 seeds, its cube root standardised (Wilson and Hilferty)."""
    rng, n_rows, rule = np.random.default_rng(0), 500, SamplingParams(top_k=9, top_p=0.93, temperature=0.8)
    logits = (rng.standard_normal(16) * 1.2).astype(np.float32)
    batch = SamplingBatch.build([(rule, seed, 17) for seed in range(n_rows)])
    token, weight = sampler.target_weights(logits, batch, 0)
    counts = np.bincount(tokens_of(lane, np.tile(logits, (n_rows, 1)), batch), minlength=16)
    wanted = n_rows * weight / weight.sum()
    assert counts[token].sum() == n_rows and wanted.min() > 5 and len(token) > 3
    df = len(token) - 1
    statistic = ((counts[token] - wanted) ** 2 / wanted).sum()
    assert abs((statistic / df) ** (1 / 3) - (1 - 2 / (9 * df))) < 4 * np.sqrt(2 / (9 * df))


def test_no_rows(lane):
    assert tokens_of(lane, np.zeros((0, 5), np.float32), SamplingBatch.build([])).shape == (0,)
    assert [array.shape for array in tops_of(lane, np.zeros((0, 5), np.float32), [], 3)] == [(0,), (0, 3), (0, 3)]


# Edits

@dataclass(frozen=True)
class DeviceEdits(LogitEdits):
    n_edits: np.ndarray


def padded(edits, capacity):
    """The entries of `edits`, and garbage up to `capacity` that would write far away."""
    n = len(edits.token)
    garbage = {f.name: np.full(capacity - n, 2**30 if f.name in ("row", "token") else 1, getattr(edits, f.name).dtype)
               for f in fields(LogitEdits)[:6]}
    entries = [np.concatenate([getattr(edits, name), array]) for name, array in garbage.items()]
    return DeviceEdits(*entries, edits.repetition, edits.presence, edits.frequency, np.array([n], np.int32))


@pytest.mark.parametrize("spare", [0, 1, 700])
@pytest.mark.parametrize("vocab", [5, 30, 1001])
def test_edits_are_those_of_the_host(lane, vocab, spare):
    rng = np.random.default_rng([vocab, spare])
    rows = []
    for _ in range(6):
        bias = {int(token): float(rng.normal()) for token in rng.choice(vocab, 4, replace=False)}
        rule = SamplingParams(repetition_penalty=float(rng.choice([1, 0.7, 1.3])), logit_bias=rng.choice([None, bias]),
                              presence_penalty=float(rng.choice([0, 0.5, -0.5])),
                              frequency_penalty=float(rng.choice([0, 0.3])))
        prompt, output = (rng.integers(0, vocab, n).tolist() for n in rng.integers(0, 300, 2))
        rows.append((rule, prompt, output, rng.integers(0, vocab, rng.integers(0, 3)).tolist()))
    edits = edits_of(*rows)
    logits = random_logits(rng, 6, vocab)
    got = lane.put(logits)
    apply_edits(got, on_lane(lane, padded(edits, len(edits.token) + spare)))
    with np.errstate(invalid="ignore", over="ignore"):
        sampler.apply_edits(logits, edits)
    np.testing.assert_array_equal(lane.to_host(got), logits)
    assert (np.signbit(lane.to_host(got)) == np.signbit(logits))[~np.isnan(logits)].all()


def test_no_edits_change_no_logit(lane):
    edits = edits_of(*[(SamplingParams(), [1], [2], [7])] * 2)
    edits = padded(edits, 9)
    logits = lane.put(np.ones((2, 8), np.float32))
    apply_edits(logits, on_lane(lane, replace(edits, n_edits=np.zeros(1, np.int32))))
    assert (lane.to_host(logits) == 1).all()
    apply_edits(logits, on_lane(lane, edits))
    assert np.isneginf(lane.to_host(logits)[:, 7]).all() and (lane.to_host(logits)[:, :7] == 1).all()


# Log-probabilities

def assert_log_softmax(got, logits, token):
    """got [...] of row logits [vocab] at `token`, against float64.

    The weights' sum is off by exp's 1.36 ulp, half an ulp when it becomes float32, and 2^-26 of dropped tokens: its log
    by 2^-22. Add log's own 1.8 ulp, and half an ulp each of l - max and of the result.
    """
    x = logits[token].astype(np.float64) - logits.max()
    log_sum = np.log(np.exp(logits.astype(np.float64) - logits.max()).sum())
    allowed = 2.0**-22 + (1.8 * log_sum + 0.5 * np.abs(x) + 0.5 * np.abs(x - log_sum)) * 2.0**-23
    finite = np.isfinite(x)
    assert (np.abs(got[finite] - (x - log_sum)[finite]) <= allowed[finite]).all() and np.isneginf(got[~finite]).all()


@pytest.mark.parametrize("listed", [kernels.LISTED, 5])
@pytest.mark.parametrize("vocab", VOCABS)
def test_top_ids_are_those_of_the_host_and_values_log_softmax(lane, monkeypatch, vocab, listed):
    monkeypatch.setattr(kernels, "LISTED", listed)
    rng = np.random.default_rng([vocab, listed])
    for n in {0, 1, min(20, vocab), min(MOST_TOP, vocab)}:
        logits, chosen = random_logits(rng, 5, vocab), rng.integers(0, vocab, 5)
        own, ids, values = tops_of(lane, logits, chosen, n)
        with np.errstate(all="ignore"):
            assert (ids == sampler.top_logprobs(logits, chosen, n)[1]).all()
        for i, row in enumerate(logits):
            if np.isfinite(row.max()):
                assert_log_softmax(np.append(values[i], own[i]), row, np.append(ids[i], chosen[i]))
            else:
                assert np.isnan(own[i]) and np.isnan(values[i]).all()


def test_log_probabilities_of_a_real_vocabulary(lane):
    rng = np.random.default_rng(4)
    logits = (rng.standard_normal((1, REAL_VOCAB)) * 3).astype(np.float32)
    logits[0, 1000:1010] = logits.max()
    own, ids, values = tops_of(lane, logits, [77], 1024)
    assert ids[0].tolist() == np.argsort(-logits[0], kind="stable")[:1024].tolist()
    assert_log_softmax(np.append(values[0], own[0]), logits[0], np.append(ids[0], 77))


def test_log_probabilities_without_a_finite_maximum(lane):
    logits = np.array(NO_MAXIMUM, np.float32)
    own, ids, values = tops_of(lane, logits, [0, 1, 2, 3], 3)
    assert np.isnan(own).all() and np.isnan(values).all()
    assert ids.tolist() == [[2, 0, 1], [2, 3, 0], [0, 1, 2], [1, 3, 2]]


def test_log_probabilities_do_not_depend_on_the_batch(lane):
    rng = np.random.default_rng(8)
    logits, chosen = (rng.standard_normal((40, 20000)) * 3).astype(np.float32), rng.integers(0, 20000, 40)
    together = tops_of(lane, logits, chosen, 7)
    for i in (0, 39):
        for got, want in zip(tops_of(lane, logits[[i]], chosen[[i]], 7), together, strict=True):
            assert (got[0] == want[i]).all()


# Traffic

def assert_traffic(lane, monkeypatch, run, sizes, op_cost):
    """Each launch in run() touches as many bytes as its traffic line says, and moves hardly more in sectors, but for
    what blocks add to the bins in scratch. The cost of the op is theirs, within what it guesses."""
    seen, n_blocks, launch = {}, {}, Build.launch

    def watched(build, grid, *args, **named):
        launch(build, grid, *args, **named)
        seen[build.entry], n_blocks[build.entry] = lane.traffic(), grid[0]

    monkeypatch.setattr(Build, "launch", watched)
    run()
    for entry, traffic in seen.items():
        assert traffic.distinct_bytes == least_bytes("sampling.cu", entry, N_BINS=kernels.N_BINS, **sizes), entry
        added = {"count_weights": 24, "sum_weights": 8}.get(entry, 0) * kernels.N_BINS * n_blocks[entry]
        assert traffic.moved_bytes - traffic.small_reread_bytes <= 1.1 * traffic.distinct_bytes + added, entry
    assert op_cost.traffic_bytes == pytest.approx(sum(traffic.distinct_bytes for traffic in seen.values()), rel=0.1)


@pytest.mark.parametrize("rule", [SamplingParams(top_k=64), SamplingParams(top_p=0.95, temperature=2)])
def test_sample_moves_what_its_header_says(lane, monkeypatch, rule):
    logits = (np.random.default_rng(0).standard_normal((1, 65536)) * 3).astype(np.float32)
    batch = SamplingBatch.build([(rule, 1, 2)])
    everything = replace(batch, top_k=np.zeros(1, np.int32), top_p=np.full(1, sampler.TOP_P_ONE))
    bins, kept = (bins_of(sampler.target_weights(logits[0], rules, 0)[1]) for rules in (everything, batch))
    assert_traffic(lane, monkeypatch, lambda: tokens_of(lane, logits, batch),
                   {"n_rows": 1, "vocab": 65536, "has_out": True, "n_bins": len(set(bins.tolist())),
                    "n_listed": np.count_nonzero(bins == kept.min())}, cost.sample(logits, batch, None, None))


def bins_of(weight):
    return weight.astype(np.float32).view(np.int32) - np.float32(1).view(np.int32) >> 18


def test_top_logprobs_move_what_their_headers_say(lane, monkeypatch):
    logits = (np.random.default_rng(0).standard_normal((1, 65536)) * 3).astype(np.float32)
    bins = ((logits[0] - logits.max() + np.float32(44)) * np.float32(32)).astype(int)
    nth = np.sort(bins)[::-1][19]
    assert_traffic(lane, monkeypatch, lambda: tops_of(lane, logits, [5], 20),
                   {"n_rows": 1, "vocab": 65536, "has_out": False, "n": 20, "n_bins": len(set(bins.tolist())),
                    "n_listed": np.count_nonzero(bins >= nth)},
                   cost.top_logprobs(logits, None, 20, None, None, None, None))


def test_edits_move_what_their_header_says(lane, monkeypatch):
    rows = [(SamplingParams(frequency_penalty=0.5), [], list(range(4096)), ())] * 3
    edits = padded(edits_of(*rows), 13000)
    logits, staged = lane.zeros((3, 4096), np.float32), on_lane(lane, edits)
    assert_traffic(lane, monkeypatch, lambda: apply_edits(logits, staged),
                   {"n_edits": int(edits.n_edits[0]), "n_edited_rows": 3}, cost.apply_edits(logits, staged))


# Launchers

@pytest.mark.parametrize("n_rows, vocab, chunk", [(1, 262144, 2048), (4, 262144, 2048), (16, 262144, 8192),
                                                  (64, 262144, 16384), (4096, 32000, 16384), (1, 12, 2048)])
def test_a_chunk_fills_the_machine_before_it_grows(n_rows, vocab, chunk):
    assert chunk_of(n_rows, vocab) == chunk


def test_what_does_not_fit_is_refused(lane):
    logits, out = lane.zeros((2, 8), np.float32), lane.zeros(2, np.int32)
    batch = on_lane(lane, SamplingBatch.build([(SamplingParams(), 0, 0)] * 2))
    scratch = scratch_for(lane, 2, 8)
    with pytest.raises(ShapeError, match=r"sample: out is \[3\] int32, expected \[n_rows=2\]"):
        sample(logits, batch, lane.zeros(3, np.int32), scratch)
    with pytest.raises(ShapeError, match=r"sample: top_p is \[2\] float32, expected \[n_rows=2\] int64"):
        sample(logits, replace(batch, top_p=lane.zeros(2, np.float32)), out, scratch)
    with pytest.raises(ShapeError, match="strides"):
        sample(lane.zeros((2, 16), np.float32)[:, ::2], batch, out, scratch)
    with pytest.raises(ShapeError, match=r"sample: scratch.counters holds 4, expected at least 8"):
        sample(logits, batch, out, scratch._replace(counters=scratch.counters[:4]))
    with pytest.raises(ShapeError, match=r"expected vocab in 1 .. 524287"):
        sample(lane.zeros((1, 2**19), np.float32), on_lane(lane, SamplingBatch.build([(SamplingParams(), 0, 0)])),
               lane.zeros(1, np.int32), scratch)
    with pytest.raises(ShapeError, match=r"top_logprobs: n is 9, expected 0 .. 8"):
        tops_of(lane, np.zeros((2, 8), np.float32), [0, 0], 9)
    with pytest.raises(ShapeError, match=r"apply_edits: bias is \[9\] float64, expected \[capacity=9\] float32"):
        edits = padded(edits_of(*[(SamplingParams(), [1], [2], [7])] * 2), 9)
        apply_edits(logits, replace(edits, bias=lane.zeros(9, np.float64)))
