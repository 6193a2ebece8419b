"""Whole models of bench.py against, without torch: what is timed, compared, skipped and said.

Peers here are made up.
"""

from argparse import Namespace

import numpy as np
import pytest
from measure.cases import parse_case
from measure.models import Model
from measure.peer import against_model, peer_models, turns
from measure.peer.peer_models import model_peers
from measure.random_weights import RandomCheckpoint
from measure.report import BenchError, Report
from measure.sm_clock import SideClocks
from measure.step import seats

from engine.backend import open_lane
from engine.models import describe
from loaders.config import Config
from tests import tiny

CPU = open_lane("cpu", "auto")


class FakeModel:
    """Agrees with the Core, up to `off`; its clock says 3 s."""

    notes = ("made up",)

    def __init__(self, core, case, max_len, model, off=0.0):
        assert max_len >= case.max_context + ARGS.tokens and model is TINY
        self.core, self.case, self.off, self.is_closed = core, case, off, False

    def ready(self, n_tokens):
        return 7.0

    def logits(self, ids, first):
        return against_model.our_logits(self.core, ids, first) * (1 + self.off)

    def samples(self, n):
        return [3.0] * n

    def close(self):
        self.is_closed = True


SPEC = describe(Config(tiny.flat("gemma3")))
TINY = Model("tiny", SPEC, None, tiny.flat("gemma3"))
ARGS = Namespace(repeats=2, seed=0, tokens=2)


def run_model(text, **peers):
    """(is_good, report, core) of one case on a tiny Gemma 3; the context is longer than its window."""
    case = parse_case(text)
    against_model.check_cases([case])
    report = Report()
    core, cases = against_model.open_core("tiny", SPEC, CPU, RandomCheckpoint(SPEC), [case],
                                          against_model.steps_of(ARGS), report, 0)
    assert cases == [case]
    return against_model.measure_case(core, TINY, case, peers, ARGS, report), report, core


@pytest.mark.parametrize("text", ["decode=3*1@40", "prefill=2*40"])
def test_models_take_turns_and_leave_nothing_behind(text, monkeypatch):
    monkeypatch.setattr(turns, "SETTLE_S", 0)
    is_good, report, core = run_model(text, fake=FakeModel)
    compiled, row = report.rows
    assert is_good and not report.skipped
    assert (compiled.name, compiled.stats["theirs"].samples) == ("compile", (7.0,))
    assert row.stats["theirs"].samples == (3.0, 3.0) and len(row.stats["ours"].samples) == 2
    assert row.notes == ("made up",) and row.shape["context"] == 40
    assert not core.scheduler.running and not core.scheduler.waiting
    assert all(pages.n_free == pages.n_pages for pages in core.kv_cache.allocators)


def test_a_model_that_is_wrong_is_reported_and_not_timed():
    is_good, report, _ = run_model("decode=1*1@40", bad=lambda *args: FakeModel(*args, off=1e-3))
    assert not is_good
    assert "ours" not in report.rows[-1].stats and "not timed: logits differ by 0.001" in report.rows[-1].notes[0]


def test_a_model_that_fails_is_skipped_and_closed():
    opened = []

    class Broken(FakeModel):
        def ready(self, n_tokens):
            opened.append(self)
            raise RuntimeError("out of memory")
    is_good, report, _ = run_model("decode=1*1@40", broken=Broken, good=FakeModel)
    assert is_good and opened[0].is_closed
    assert report.skipped == [{"what": "tiny decode=1@40: broken", "why": "RuntimeError: out of memory"}]
    assert report.rows[-1].shape["peer"] == "good"


@pytest.mark.parametrize("text", ["decode=3*1@40", "prefill=2*40"])
def test_the_clock_is_read_after_each_turn_that_counts(text, monkeypatch):
    left = [1980, 1500, 1980, 1500]
    monkeypatch.setattr(turns, "SETTLE_S", 0)
    monkeypatch.setattr(against_model, "side_clocks", lambda lane: SideClocks(lambda: left.pop(0)))
    _, report, _ = run_model(text, fake=FakeModel)
    assert not left
    assert "no fair comparison: SM clock 1980 MHz for ours, 1500 for theirs" in report.rows[-1].notes


def test_every_sample_of_ours_decodes_at_the_same_contexts_and_times_nothing_else(monkeypatch):
    """Every sequence of the case, from its context on; a step takes 1 s, to seat a sequence 100 s."""
    case, args, now = parse_case("decode=3*1@40"), Namespace(repeats=2, seed=0, tokens=3), [0.0]
    core, _ = against_model.open_core("tiny", SPEC, CPU, RandomCheckpoint(SPEC), [case], against_model.steps_of(args),
                                      Report(), 0)
    ours, steps = against_model.Ours(core, case, np.random.default_rng(0), args.tokens), []
    step, submit = core.loop.step, seats.submit

    def timed_step():
        steps.append((now[0], [len(sequence.tokens) for sequence in core.scheduler.running]))
        now[0] += 1
        step()

    def timed_submit(*arguments):
        now[0] += 100
        return submit(*arguments)
    monkeypatch.setattr(core.loop, "step", timed_step)
    monkeypatch.setattr(seats, "submit", timed_submit)
    monkeypatch.setattr(against_model, "time", Namespace(perf_counter=lambda: now[0]))
    assert ours.samples(4) == [1.0] * 4
    assert [contexts for _, contexts in steps] == 4 * [[n] * 3 for n in (39, 40, 41, 42)]
    assert all(pages.n_free == pages.n_pages for pages in core.kv_cache.allocators)


def test_logits_are_judged_by_the_largest_of_their_place(monkeypatch):
    """An error that is small beside the logits of another place is not beside its own."""
    ours = np.array([[[10, -4], [0.1, 0.05]]], np.float32)
    peer = Namespace(logits=lambda ids, first: ours + np.array([[0, 0], [0, 0.01]], np.float32))
    monkeypatch.setattr(against_model, "our_logits", lambda core, ids, first: ours)
    error = against_model.error_of(peer, Namespace(spec=SPEC), parse_case("decode=1*1@40"), np.random.default_rng(0))
    assert error == pytest.approx(0.1, rel=1e-3)


def test_model_peers_that_are_not_there_are_skipped_with_the_reason(monkeypatch):
    missing = {"transformers"}
    monkeypatch.setattr(peer_models.importlib.util, "find_spec", lambda name: None if name in missing else name)
    report = Report()
    assert list(model_peers(["torch", "transformers", "compiled"], CPU, report)) == ["torch", "compiled, sdpa"]
    assert {line["what"]: line["why"] for line in report.skipped} == {
        "whole models: transformers": "transformers not installed",
        "whole models: compiled, flex": "flex_attention's decoding kernel is a GPU's"}
    missing.add("torch")
    assert not model_peers(["torch", "transformers"], CPU, report)
    assert [line["why"] for line in report.skipped[2:]] == ["torch not installed",
                                                            "torch and transformers not installed"]


def test_a_case_beyond_the_models_positions_is_skipped():
    report = Report()
    core, cases = against_model.open_core("tiny", SPEC, CPU, RandomCheckpoint(SPEC), [parse_case("decode=1*1@125")], 8,
                                          report, 0)
    assert core is None and not cases
    assert report.skipped[0]["why"] == "it decodes on to 133 positions, the model has 128"


@pytest.mark.parametrize("text", ["mix=2048,16*1@4096", "verify=4*5@64"])
def test_cases_that_a_peer_cannot_be_timed_at_are_refused(text):
    with pytest.raises(BenchError, match="expected decodes"):
        against_model.check_cases([parse_case(text)])
