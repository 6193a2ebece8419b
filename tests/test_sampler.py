"""engine/sampler.py: filters against brute force, draws by chi-square, one token whatever the batch."""

import numpy as np
import pytest

from engine import sampler
from engine.errors import ShapeError
from engine.sampler import LIKELIEST, SamplingBatch, draw, sample, target_weights, top_logprobs
from engine.sampling_params import SamplingParams

RULES = {
    "plain": SamplingParams(),
    "cool": SamplingParams(temperature=0.6),
    "warm": SamplingParams(temperature=1.7),
    "top_k": SamplingParams(top_k=5),
    "top_p": SamplingParams(top_p=0.8),
    "min_p": SamplingParams(min_p=0.15),
    "top_k and top_p": SamplingParams(top_k=8, top_p=0.9, temperature=1.3),
    "all": SamplingParams(top_k=9, top_p=0.93, min_p=0.1, temperature=0.8),
}
N_DRAWS = 30_000


def batch_of(*rows):
    return SamplingBatch.build(rows)


def target_probs(logits, params):
    """The target distribution by the book, in float64: a dense [vocab] array that sums to 1."""
    x = (logits.astype(np.float64) - logits.max()) / params.temperature
    p = np.exp(x) / np.exp(x).sum()
    if params.top_k:
        p[p < np.sort(p)[::-1][:params.top_k][-1] * (1 - 1e-12)] = 0
        p /= p.sum()
    if params.top_p < 1:
        kept, mass = [], 0.0
        for token in sorted(range(len(p)), key=lambda token: (-p[token], token)):
            kept.append(token)
            mass += p[token]
            if mass >= params.top_p:
                break
        p[[token for token in range(len(p)) if token not in kept]] = 0
    p[p < params.min_p * p.max()] = 0
    return p / p.sum()


def chi_square_z(counts, probs):
    """How many standard deviations Pearson's statistic lies above its mean (Wilson and Hilferty's cube root)."""
    probs = np.asarray(probs).ravel()
    counts = np.asarray(counts).ravel()
    assert counts[probs == 0].sum() == 0
    expected = counts.sum() * probs[probs > 0]
    assert expected.min() >= 5
    df = len(expected) - 1
    statistic = ((counts[probs > 0] - expected) ** 2 / expected).sum()
    return ((statistic / df) ** (1 / 3) - (1 - 2 / (9 * df))) / np.sqrt(2 / (9 * df))


def seeded_logits(vocab=16, seed=0, scale=1.2):
    return (np.random.default_rng(seed).standard_normal(vocab) * scale).astype(np.float32)


def draws(logits, params, seeds, positions, domain=0):
    target = target_weights(logits, batch_of((params, 0, 0)), 0)
    return np.array(draw([target] * len(seeds), np.asarray(seeds, np.uint64), np.asarray(positions, np.int64), domain))


# The law of the draws

@pytest.mark.parametrize("name", RULES)
def test_consecutive_seeds_draw_from_the_target(name):
    logits, params = seeded_logits(), RULES[name]
    tokens = draws(logits, params, np.arange(N_DRAWS), np.full(N_DRAWS, 17))
    assert abs(chi_square_z(np.bincount(tokens, minlength=16), target_probs(logits, params))) < 4


def test_consecutive_positions_draw_independently():
    """One seed, tokens at t and t + 1: their joint counts are those of two independent draws."""
    logits, params = seeded_logits(6, scale=0.7), SamplingParams()
    tokens = draws(logits, params, np.full(2 * N_DRAWS, 5), np.arange(2 * N_DRAWS))
    probs = target_probs(logits, params)
    joint = np.bincount(tokens[::2] * 6 + tokens[1::2], minlength=36)
    assert abs(chi_square_z(joint, np.outer(probs, probs))) < 4


def test_domains_draw_independently():
    logits, params = seeded_logits(6, scale=0.7), SamplingParams()
    first, second = (draws(logits, params, np.arange(N_DRAWS), np.full(N_DRAWS, 3), domain) for domain in (0, 1))
    probs = target_probs(logits, params)
    assert abs(chi_square_z(np.bincount(first * 6 + second, minlength=36), np.outer(probs, probs))) < 4


WORDS = sampler.token_words


def one_word_for_all(token, row, seed, position, domain):
    return WORDS(token * 0, row, seed, position, domain)


def one_word_per_lane(token, row, seed, position, domain):
    return WORDS(token // 4 * 4, row, seed, position, domain)


@pytest.mark.parametrize("wrong", [one_word_for_all, one_word_per_lane])
def test_chi_square_sees_shared_random_words(monkeypatch, wrong):
    monkeypatch.setattr(sampler, "token_words", wrong)
    logits = seeded_logits()
    tokens = draws(logits, SamplingParams(), np.arange(N_DRAWS), np.full(N_DRAWS, 17))
    assert chi_square_z(np.bincount(tokens, minlength=16), target_probs(logits, SamplingParams())) > 20


@pytest.mark.parametrize("params", [SamplingParams(temperature=1.05), SamplingParams(temperature=0.95)])
def test_chi_square_sees_a_small_error_of_temperature(params):
    logits = seeded_logits()
    tokens = draws(logits, params, np.arange(N_DRAWS), np.full(N_DRAWS, 17))
    assert chi_square_z(np.bincount(tokens, minlength=16), target_probs(logits, SamplingParams())) > 4


# The target distribution

def random_params(rng):
    return SamplingParams(temperature=float(rng.choice([0.02, 0.3, 1.0, 1.5, 4.0])),
                          top_k=int(rng.choice([0, 1, 3, 20, 500])),
                          top_p=float(rng.choice([1.0, rng.uniform(0.01, 1)])),
                          min_p=float(rng.choice([0, rng.uniform(0, 0.5)])))


@pytest.mark.parametrize("seed", range(60))
def test_target_matches_brute_force_on_logits_with_ties(seed):
    rng = np.random.default_rng(seed)
    logits = (rng.integers(-12, 12, rng.integers(2, 200)) * rng.choice([0.1, 0.5, 2])).astype(np.float32)
    logits[rng.random(len(logits)) < 0.1] = -np.inf
    logits[rng.integers(len(logits))] = 3
    params = random_params(rng)
    token, weight = target_weights(logits, batch_of((params, 0, 0)), 0)
    want = target_probs(logits, params)
    possible = np.flatnonzero(want > 2.0**-43)               # below 2**-44.7 of the likeliest a token is dropped
    assert set(possible) <= set(token.tolist()) <= set(np.flatnonzero(want))
    assert (np.diff(token) > 0).all() and weight.max() == LIKELIEST and weight.min() >= 1
    # |x| <= 24 / 0.02 loses 24 ulp of 50; exp 1 ulp; and half a unit of 2**-44
    dense = np.zeros(len(logits))
    dense[token] = weight / weight.sum()
    np.testing.assert_allclose(dense, want, rtol=1e-4 if params.temperature < 0.1 else 4e-6, atol=2.0**-44)


def test_rough_top_k_before_exp_changes_nothing():
    """Against a top-k over the weights of the whole vocabulary, whose tail reaches below the least weight."""
    logits = seeded_logits(5000, scale=4.0)
    logits[::7] = logits[3]
    every, weight = target_weights(logits, batch_of((SamplingParams(), 0, 0)), 0)
    for top_k in (1, 2, 10, 700, 4000, 4999, 5000, 6000):
        token, kept = target_weights(logits, batch_of((SamplingParams(top_k=top_k), 0, 0)), 0)
        least = np.sort(weight)[::-1][min(top_k, len(weight)) - 1]
        assert (token == every[weight >= least]).all()
        assert (kept == weight[weight >= least]).all()


def test_top_p_over_a_long_flat_tail_is_exact():
    """Every depth at which the sort may stop, down to tokens of weight 1, against Python integers."""
    logits = np.concatenate([[8, 7.5], np.linspace(0, -12, 3000), np.full(9000, -22.6)]).astype(np.float32)
    token, weight = target_weights(logits, batch_of((SamplingParams(), 0, 0)), 0)
    weight = weight.tolist()
    total, order = sum(weight), sorted(range(len(weight)), key=lambda i: (-weight[i], i))
    assert weight[-1] == 1
    for top_p in (1e-9, 0.3, 0.6, 0.9, 0.97, 0.99, 0.99999, 1 - 2**-32):
        kept, mass = [], 0
        for i in order:
            kept.append(i)
            mass += weight[i]
            if mass * 2**32 >= total * round(top_p * 2**32):
                break
        got, _ = target_weights(logits, batch_of((SamplingParams(top_p=top_p), 0, 0)), 0)
        assert got.tolist() == token[sorted(kept)].tolist()


@pytest.mark.parametrize("params, kept", [
    (SamplingParams(top_p=0.5), [0, 1]),                     # exactly half the mass: two of four, the lowest ids
    (SamplingParams(top_p=0.50001), [0, 1, 2]),
    (SamplingParams(top_p=1e-12), [0]),                      # always at least one
    (SamplingParams(top_k=1), [0, 1, 2, 3]),                 # ties with the k-th stay
    (SamplingParams(top_k=1, top_p=0.75), [0, 1, 2]),
    (SamplingParams(min_p=1.0), [0, 1, 2, 3]),
    (SamplingParams(temperature=0), [0]),
])
def test_ties(params, kept):
    logits = np.array([2, 2, 2, 2, -60], np.float32)
    assert target_weights(logits, batch_of((params, 0, 0)), 0)[0].tolist() == kept


def test_the_least_weight_is_one():
    logits = np.array([0, -31, -31.00001, -40], np.float32)
    token, weight = target_weights(logits, batch_of((SamplingParams(), 0, 0)), 0)
    assert (token.tolist(), weight.tolist()) == ([0, 1], [LIKELIEST, 1])


def test_min_p_compares_exactly():
    logits = np.array([0, -1.5, 0.25], np.float32)
    weight = int(target_weights(logits, batch_of((SamplingParams(), 0, 0)), 0)[1][1])
    for min_weight, kept in ((weight - 0.5, [0, 1, 2]), (weight, [0, 1, 2]), (weight + 0.5, [0, 2])):
        params = SamplingParams(min_p=min_weight / LIKELIEST)
        assert target_weights(logits, batch_of((params, 0, 0)), 0)[0].tolist() == kept


def test_whole_vocabulary_of_the_largest_size_sums_exactly():
    logits = np.zeros(sampler.MAX_VOCAB, np.float32)
    token, weight = target_weights(logits, batch_of((SamplingParams(top_p=0.5), 0, 0)), 0)
    assert len(token) == -(-sampler.MAX_VOCAB // 2)
    assert int(weight.sum()) == len(token) * LIKELIEST


def test_a_larger_vocabulary_is_refused():
    with pytest.raises(ShapeError, match=r"524288.*expected vocab <= 524287"):
        sample(np.zeros((1, 2**19), np.float32), batch_of((SamplingParams(), 0, 0)))


# One token, whatever the batch

def mixed_rows(n, vocab=130, seed=0):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((n, vocab)) * rng.choice([0.5, 3], (n, 1))).astype(np.float32)
    rules = [*RULES.values(), SamplingParams(temperature=0)]
    return logits, [(rules[i % len(rules)], int(rng.integers(2**63)) * 2 + i % 2, i * 2**29) for i in range(n)]


def test_a_row_alone_draws_what_it_draws_in_any_batch():
    logits, rows = mixed_rows(40)
    together = sample(logits, batch_of(*rows))
    assert together.dtype == np.int32
    order = np.random.default_rng(1).permutation(40)
    assert (sample(logits[order], batch_of(*(rows[i] for i in order))) == together[order]).all()
    alone = [sample(logits[i:i + 1], batch_of(rows[i]))[0] for i in range(40)]
    assert alone == together.tolist()


@pytest.mark.parametrize("constant, value", [("LOGITS_AT_ONCE", 1), ("LOGITS_AT_ONCE", 500), ("BLOCK", 7),
                                             ("BLOCK", 256)])
def test_grouping_rows_and_blocks_changes_nothing(monkeypatch, constant, value):
    logits, rows = mixed_rows(40)
    together = sample(logits, batch_of(*rows))
    monkeypatch.setattr(sampler, constant, value)
    assert (sample(logits, batch_of(*rows)) == together).all()


def test_seed_and_position_decide():
    logits = np.tile(seeded_logits(1000, scale=0.1), (3, 1))
    params = SamplingParams()
    same = sample(logits, batch_of((params, 7, 9), (params, 7, 9), (params, 7, 9)))
    assert len(set(same.tolist())) == 1
    low, high, other = sample(logits, batch_of((params, 7, 9), (params, 7, 9 + 2**32), (params, 7 + 2**32, 9)))
    assert len({int(low), int(high), int(other)}) == 3
    assert sample(logits, batch_of(*[(params, 7, 9)] * 3), domain=1)[0] != low


def test_draws_are_pinned():
    """These tokens may change only with the sampling rule itself: every lane, platform and NumPy gives them."""
    logits = (np.arange(1000, dtype=np.float32) % 17 - 8) / 2
    rows = [(params, 2**64 - 1 - i, 1000 * i) for i, params in enumerate(RULES.values())]
    tokens = sample(np.tile(logits, (len(rows), 1)), batch_of(*rows))
    assert tokens.tolist() == [152, 832, 573, 968, 422, 951, 611, 67]


# Single rows

def test_greedy_takes_the_lowest_id_argmax():
    logits = np.array([[1, 3, 3, 2], [5, 1, 5, 5], [-np.inf, -2, -np.inf, -2]], np.float32)
    greedy = (SamplingParams(temperature=0), 0, 0)
    assert sample(logits, batch_of(greedy, greedy, greedy)).tolist() == [1, 0, 1]
    barely = (SamplingParams(temperature=9e-6), 0, 0)
    assert sample(logits, batch_of(barely, greedy, barely)).tolist() == [1, 0, 1]


@pytest.mark.parametrize("params", [SamplingParams(top_k=1), SamplingParams(top_p=1e-6), SamplingParams(min_p=1.0),
                                    SamplingParams(temperature=1e-3)])
def test_one_hot_targets_are_certain(params):
    logits = np.tile(seeded_logits(64), (50, 1))
    tokens = sample(logits, batch_of(*[(params, seed, seed) for seed in range(50)]))
    assert (tokens == logits[0].argmax()).all()


@pytest.mark.filterwarnings("error")
def test_minus_infinity_is_never_drawn():
    logits = np.full((200, 32), -np.inf, np.float32)
    logits[:, [3, 17]] = -5
    tokens = sample(logits, batch_of(*[(SamplingParams(temperature=1e30), seed, 0) for seed in range(200)]))
    assert set(tokens.tolist()) == {3, 17}


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0),
                                    SamplingParams(top_k=2, top_p=0.5)])
@pytest.mark.parametrize("row, token", [
    ([1, np.nan, 2, np.nan], 1),                             # the first NaN, as np.argmax has it
    ([1, 0, np.inf, np.inf], 2),
    ([-np.inf] * 4, 0),
])
def test_rows_without_a_finite_maximum_still_give_a_token(params, row, token):
    logits = np.array([row, [0, 9, 0, 0]], np.float32)
    assert sample(logits, batch_of((params, 1, 1), (SamplingParams(top_k=1), 1, 1))).tolist() == [token, 1]


@pytest.mark.filterwarnings("error")
def test_huge_negative_masks_are_quiet():
    logits = np.full((1, 8), np.finfo(np.float32).min, np.float32)
    logits[0, 6] = 20
    assert sample(logits, batch_of((SamplingParams(temperature=0.1), 4, 2))).tolist() == [6]


def test_extreme_random_words_leave_a_winner(monkeypatch):
    logits = np.array([0, -30, 0], np.float32)
    target = target_weights(logits, batch_of((SamplingParams(), 0, 0)), 0)

    def winner(*words):
        monkeypatch.setattr(sampler, "token_words", lambda *_: np.array(words, np.uint64))
        return draw([target], np.zeros(1, np.uint64), np.zeros(1, np.int64))[0]

    assert winner(2**31, 2**32 - 1, 2**31 - 1000) == 2      # the worst word on an unlikely token does not win
    assert winner(2**32 - 1, 2**32 - 1, 2**32 - 1) == 0      # nor lose to nothing; ties go to the lowest id
    assert winner(0, 0, 0) == 0
    assert winner(2**32 - 1, 0, 2**32 - 1) == 0              # E is 10^11 times smaller, the weight 10^13 times


def test_no_rows():
    assert sample(np.zeros((0, 5), np.float32), batch_of()).tolist() == []


def test_rows_along_a_text_are_those_of_each_position():
    """As slots of drafts have them: one rule a sequence, and the position that each slot decides."""
    starts, counts = [(params, 7 + i, 30 * i) for i, params in enumerate(RULES.values())], [3, 1, 5, 1, 2, 1, 1, 4]
    expected = batch_of(*((params, seed, at + j) for (params, seed, at), n in zip(starts, counts, strict=True)
                          for j in range(n)))
    got = batch_of(*starts).along(counts)
    for name, column in vars(expected).items():
        assert getattr(got, name).tolist() == column.tolist() and getattr(got, name).dtype == column.dtype


# Log-probabilities

def test_top_logprobs_match_float64():
    logits = (seeded_logits(3 * 500, scale=6.0)).reshape(3, 500)
    logits[0, 100:110] = logits[0].max()
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    chosen = np.array([4, 0, 499])
    for n in (0, 1, 5, 12, 500):
        own, ids, top = top_logprobs(logits, chosen, n)
        assert (own.dtype, ids.dtype, top.dtype) == (np.float32, np.int32, np.float32)
        assert ids.shape == top.shape == (3, n)
        # |logit| and |log-sum| < 32: two roundings of 2^-20 each, and a float32 sum of 500 terms
        np.testing.assert_allclose(own, exact[np.arange(3), chosen], atol=6e-6, rtol=0)
        for line, line_ids, line_top in zip(exact, ids, top, strict=True):
            assert line_ids.tolist() == sorted(range(500), key=lambda token: (-line[token], token))[:n]
            np.testing.assert_allclose(line_top, line[line_ids], atol=6e-6, rtol=0)


def test_top_logprobs_of_banned_and_broken_rows():
    nan, inf = np.nan, np.inf
    logits = np.array([[0, -inf, 0, -inf], [nan, 1, 2, 3], [-inf] * 4], np.float32)
    own, ids, top = top_logprobs(logits, np.array([0, 3, 1]), 3)
    np.testing.assert_allclose(own[0], -np.log(2), rtol=1e-6)
    assert ids[0].tolist() == [0, 2, 1] and top[0, 2] == -inf
    assert np.isnan(own[1:]).all() and np.isnan(top[1:]).all()
    assert ((ids >= 0) & (ids < 4)).all()
