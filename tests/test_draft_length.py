"""engine/draft_length.py: what a sequence knows of its drafts, what steps cost by count, how many tokens to draft."""

from types import SimpleNamespace

import numpy as np
import pytest

from engine.assistant_weights import n_weights
from engine.draft_length import AUTO_DRAFTS, FIRST_RATE, RETRY_TOKENS, WORTH, DraftControl, DraftStats, StepTimes
from engine.floor import draft_step, speculation_ceiling
from engine.models import describe
from engine.models.gemma4_assistant import describe_assistant
from engine.models.presets import preset
from loaders.config import Config
from tests.golden import GOLDENS
from tests.test_assistant_spec import RELEASED

DENSE, EXPERTS, CENTROIDS = "gemma-4-31b", "gemma-4-26b-a4b", "gemma-4-e4b"


def times(name=DENSE, lane="cuda", itemsize=2):
    target = preset(name)
    return StepTimes(target, describe_assistant(Config(RELEASED[name][0]), target), lane, itemsize)


TIMES = {name: times(name) for name in (DENSE, EXPERTS, CENTROIDS)}
CPU = times(lane="cpu", itemsize=4)


class Requests:
    """Sequences whose drafted tokens hold with given chances, checked step after step as an engine does."""

    def __init__(self, control, rates, seed=0):
        self.control, self.rates, self.rng = control, list(rates), np.random.default_rng(seed)
        self.sequences = [SimpleNamespace(draft_stats=DraftStats()) for _ in rates]
        self.drafts = [0] * len(rates)

    def step(self):
        """Checks what was drafted; returns how many tokens are drafted for each sequence now."""
        for i, (sequence, n) in enumerate(zip(self.sequences, self.drafts, strict=True)):
            misses = np.flatnonzero(self.rng.random(n) >= self.rates[i])
            self.control.note(sequence, n, int(misses[0]) if len(misses) else n)
        self.drafts = [self.control.n_drafts(sequence.draft_stats, len(self.sequences)) for sequence in self.sequences]
        return list(self.drafts)


# --- what a sequence knows

def test_the_rate_is_that_of_judged_tokens():
    """Tokens behind a rejected one are not judged; later checks count more; the first rate fades."""
    stats = DraftStats()
    assert stats.rate(0.7) == 0.7
    stats.note(4, 2)                                            # of 3 judged tokens 2 held
    assert stats.rate(0.7) == pytest.approx((2 + 4 * 0.9 * 0.7) / (3 + 4 * 0.9))
    stats.note(3, 3)
    assert stats.rate(0.7) == pytest.approx((2 * 0.9 + 3 + 4 * 0.81 * 0.7) / (3 * 0.9 + 3 + 4 * 0.81))
    assert stats.n_plain == 0
    before = stats.rate(0.7)
    stats.note(0, 0)
    assert stats.n_plain == 1 and stats.rate(0.7) == before
    for _ in range(200):
        stats.note(1, 0)
    assert stats.rate(0.7) < 1e-6 and stats.n_plain == 0
    for _ in range(200):
        stats.note(16, 16)
    assert stats.rate(0.7) > 1 - 1e-6


@pytest.mark.parametrize("rate", [0.2, 0.6, 0.9])
@pytest.mark.parametrize("n_drafted", [1, 4, 8])
def test_the_rate_finds_the_chance_whatever_is_drafted(rate, n_drafted):
    """The mean over time of what a sequence believes."""
    rng, stats, believed = np.random.default_rng([int(rate * 10), n_drafted]), DraftStats(), []
    for _ in range(4000):
        held = rng.random(n_drafted) < rate
        stats.note(n_drafted, n_drafted if held.all() else int(held.argmin()))
        believed.append(stats.rate(FIRST_RATE))
    assert np.mean(believed[100:]) == pytest.approx(rate, abs=0.05)


# --- what steps cost

@pytest.mark.parametrize("case", ["gemma4-assistant", "gemma4-assistant-dense"])
def test_a_drafting_step_reads_the_draft(case):
    """For one sequence with one key in the cache, and for so many that every centroid is wanted."""
    spec = describe_assistant(Config.load(GOLDENS / case / "assistant"),
                              describe(Config.load(GOLDENS / case / "checkpoint")))
    vectors = sum(5 * spec.hidden - spec.hidden + layer.attention.head_dim + 1 for layer in spec.layers) + spec.hidden
    matrices = n_weights(spec) - vectors
    kv = sum(2 * layer.attention.kv_width for layer in spec.layers)
    head = spec.vocab * spec.hidden
    chosen = spec.centroids_per_token / spec.n_centroids if spec.n_centroids else 1
    one, many = (draft_step(spec, n, 1) for n in (1, 1000))
    assert one.bytes == pytest.approx(2 * (matrices - head + chosen * head + spec.backbone + kv))
    assert many.bytes == pytest.approx(2 * (matrices + 1000 * (spec.backbone + kv)))
    q = sum(layer.attention.q_width for layer in spec.layers)
    assert one.flops == pytest.approx(2 * (matrices - head + chosen * head) + 4 * q)


@pytest.mark.parametrize("name", TIMES)
def test_the_gain_is_the_ceiling_of_speculation(name):
    for n_seqs, n_drafts, rate in ((1, 1, 0.5), (1, 8, 0.9), (16, 3, 0.7)):
        it = TIMES[name]
        expected = speculation_ceiling([rate ** (i + 1) for i in range(n_drafts)], it.target_s(n_seqs, 0),
                                       it.target_s(n_seqs, n_drafts), it.draft_s(n_seqs))
        assert it.gain(rate, n_seqs, n_drafts) == pytest.approx(expected)
        assert it.gain(rate, n_seqs, 0) == 1


def test_the_best_number():
    """More with a higher acceptance, none where drafting loses; experts lose first while sequences are few, matrices of
    all tokens where they are many."""
    for it in TIMES.values():
        for n_seqs in (1, 16, 128):
            best = [it.best(rate, n_seqs, AUTO_DRAFTS) for rate in (0.0, 0.2, 0.5, 0.7, 0.9)]
            assert best == sorted(best) and best[0] == 0
            for rate, n in zip((0.2, 0.5, 0.7, 0.9), best[1:], strict=True):
                gains = [it.gain(rate, n_seqs, k) for k in range(AUTO_DRAFTS + 1)]
                assert (gains[n] == max(gains) >= WORTH) if n else max(gains) < WORTH
    dense, experts = TIMES[DENSE], TIMES[EXPERTS]
    assert dense.best(0.4, 1, 8) >= 3 and experts.best(0.4, 1, 8) == 0
    assert experts.best(0.4, 64, 8) > 0
    assert dense.best(0.7, 1, 8) > dense.best(0.7, 64, 8) > dense.best(0.7, 256, 8) > 0


def test_published_gains_of_experts():
    """26B-A4B, one sequence: two or three tokens gain most at its published acceptance, and the gain is 1.2 to 1.4."""
    it = TIMES[EXPERTS]
    assert it.best(0.75, 1, 8) in (2, 3)
    assert 1.2 < it.gain(0.75, 1, it.best(0.75, 1, 8)) < 1.4


def test_lanes_differ():
    """A CPU is bound by arithmetic much earlier: there each checked row costs its share, and even drafts that always
    hold gain nothing. The emulator drafts as a GPU does."""
    emulated = times(lane="emulated")
    assert CPU.best(0.7, 8, 8) < TIMES[DENSE].best(0.7, 8, 8) == emulated.best(0.7, 8, 8)
    assert CPU.best(1.0, 1, 8) == 8 and CPU.best(1.0, 16, 8) == 0 and CPU.gain(1.0, 16, 8) == pytest.approx(1, abs=0.02)


# --- control

@pytest.mark.parametrize("n", [0, 1, 16])
def test_a_fixed_number_stays(n):
    control = DraftControl(n)
    requests = Requests(control, [0.0, 1.0])
    assert control.most == n
    assert all(requests.step() == [n, n] for _ in range(50))
    assert control.health.n_steps == 100 and control.health.n_checks == (98 if n else 0)


def test_each_request_finds_its_own_number():
    control = DraftControl("auto", TIMES[DENSE])
    requests = Requests(control, [0.0, 0.6, 1.0])
    drafted = np.array([requests.step() for _ in range(400)])[50:]
    assert control.most == AUTO_DRAFTS and drafted.max() <= AUTO_DRAFTS
    assert (drafted[:, 2] == AUTO_DRAFTS).all()
    assert drafted[:, 0].max() <= 1 and drafted[:, 0].mean() < 0.1
    assert abs(drafted[:, 1].mean() - TIMES[DENSE].best(0.6, 4, AUTO_DRAFTS)) < 1.5


def test_off_where_it_loses_and_back_where_it_wins():
    """A sequence whose drafts never hold stops drafting, tries one token after RETRY_TOKENS without, and drafts again
    once they hold."""
    requests = Requests(DraftControl("auto", TIMES[DENSE]), [0.0])
    drafted = [requests.step()[0] for _ in range(300)]
    off = drafted.index(0)
    assert 1 <= off < 40
    tries = [i for i, n in enumerate(drafted) if i > off and n]
    assert {drafted[i] for i in tries} == {1}
    assert set(np.diff([off, *tries])) <= {RETRY_TOKENS, RETRY_TOKENS + 1}
    requests.rates = [1.0]
    assert max(requests.step()[0] for _ in range(400)) == AUTO_DRAFTS


def test_no_try_where_even_right_drafts_lose():
    control, stats = DraftControl("auto", CPU), DraftStats(n_plain=10 * RETRY_TOKENS)
    assert control.n_drafts(stats, 16) == 0
    assert control.n_drafts(stats, 1) > 1


def test_a_new_request_begins_where_the_others_are():
    """The engine's acceptance so far is a sequence's first guess."""
    fresh = DraftStats()
    low, high = DraftControl("auto", TIMES[DENSE]), DraftControl("auto", TIMES[DENSE])
    assert low.n_drafts(fresh, 16) == TIMES[DENSE].best(FIRST_RATE, 16, AUTO_DRAFTS)
    for control, rate in ((low, 0.0), (high, 1.0)):
        requests = Requests(control, [rate] * 8)
        for _ in range(50):
            requests.step()
    assert low.n_drafts(fresh, 16) <= 1 and high.n_drafts(fresh, 16) == AUTO_DRAFTS


def test_a_decision_changes_nothing():
    control, stats = DraftControl("auto", TIMES[EXPERTS]), DraftStats(3.0, 4.0, 0.5, 7)
    first = [control.n_drafts(stats, n) for n in (1, 2, 3, 64, 200)]
    assert [control.n_drafts(stats, n) for n in (1, 2, 3, 64, 200)] == first
    assert stats == DraftStats(3.0, 4.0, 0.5, 7) and control.health.n_steps == 0


def test_it_is_off_for_drafts_that_are_half_right_of_experts():
    """26B-A4B alone: what pays for the dense model does not pay here."""
    drafted = {}
    for name in (DENSE, EXPERTS):
        requests = Requests(DraftControl("auto", TIMES[name]), [0.4])
        drafted[name] = np.mean([requests.step()[0] for _ in range(600)][100:])
    assert drafted[EXPERTS] < 0.7 and drafted[DENSE] > 1.5
