"""bench.py against in one process, without torch: turns, the registry, what is said of a peer that is wrong or absent.

Peers here are made up, and their clocks are scripts.
"""

from argparse import Namespace
from contextlib import nullcontext
from dataclasses import dataclass, replace

import bench
import numpy as np
import pytest
from measure import against
from measure.cases import parse_case
from measure.kernel.kernel_cases import KernelCase, cases_of
from measure.models import Model
from measure.peer import against_kernels, against_model, peer_models, peers, turns
from measure.peer.peer_models import model_peers
from measure.peer.peers import PEERS, Peer, kernel_peers
from measure.peer.turns import compared, take_turns, times_better
from measure.random_weights import RandomCheckpoint
from measure.report import BenchError, Report, load_document

from engine.backend import open_lane
from engine.errors import KernelError, MemoryPlanError
from engine.models import describe
from loaders.config import Config
from tests import tiny

CPU = open_lane("cpu", "auto")


class Script:
    """A side whose samples are known; `log` gets its name at each turn."""

    def __init__(self, name, seconds, log):
        self.name, self.seconds, self.log, self.why_eager = name, list(seconds), log, ""

    def samples(self, n):
        self.log.append(self.name)
        return [self.seconds.pop(0) for _ in range(n)]


# --- turns

def test_sides_take_turns():
    log = []
    sides = {"ours": Script("A", [1, 2, 3], log), "theirs": Script("B", [10, 20, 30], log)}
    assert take_turns(sides, 3) == {"ours": [1, 2, 3], "theirs": [10, 20, 30]}
    assert "".join(log) == "ABABAB"


def test_what_is_done_before_a_turn_is_done_before_each(monkeypatch):
    log, slept = [], []
    monkeypatch.setattr(turns.time, "sleep", slept.append)
    sides = {"ours": Script("A", [9, 1, 9, 2], log), "theirs": Script("B", [9, 3, 9, 4], log)}
    assert take_turns(sides, 2, before=turns.rest_and_wake) == {"ours": [1, 2], "theirs": [3, 4]}
    assert "".join(log) == "AABBAABB" and slept == [turns.SETTLE_S] * 4


def test_ratio_is_of_medians_and_rounds_are_kept():
    stats = compared([1.0, 2.0, 4.0], [9.0, 8.0, 8.0])
    assert stats["ratio"].median == 4.0
    assert stats["by_round"].samples == (9.0, 4.0, 2.0)
    assert stats["of_bests"].median == 8.0
    assert (stats["ours"].better, stats["ratio"].better) == ("lower", "higher")


def test_where_higher_is_better_the_ratio_turns_round():
    stats = compared([80.0, 90.0, 100.0], [45.0, 45.0, 50.0], "%", "higher")
    assert stats["ratio"].median == stats["of_bests"].median == 2.0
    assert times_better(2.0, 1.0) == 0.5 and times_better(2.0, 1.0, "higher") == 2.0


# --- the registry

def test_every_peer_serves_an_op_that_has_cases():
    ops = {case.op for case in cases_of(["gemma-3-270m", "gemma-4-26b-a4b"])}
    assert {peer.op for peer in PEERS} <= ops
    assert {peer.name for peer in PEERS} | {"transformers"} == set(against.PEERS)


def test_the_ops_that_weigh_have_a_peer_without_further_packages():
    bare = {peer.op for peer in PEERS if peer.requires == ("torch",)}
    assert bare >= {"linear", "gated_linear", "moe_gated_linear", "moe_linear", "attention", "rms_norm", "add_norm",
                    "sample"}


def test_a_peer_that_is_not_installed_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    report = Report()
    assert kernel_peers(["torch", "flashinfer", "triton"], CPU, report) == []
    why = {line["what"]: line["why"] for line in report.skipped}
    assert why["moe_linear: triton: fused experts, tuned"] == "torch and triton not installed"
    assert why["moe_linear: torch: F.grouped_mm"] == "torch not installed"
    assert why["linear: torch: F.linear"] == "torch not installed"
    assert why["attention: flashinfer: paged, on our pages"] == "torch and flashinfer not installed"


def test_a_peer_of_the_gpu_is_skipped_elsewhere(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name)
    report = Report()
    assert kernel_peers(["flashinfer", "triton"], CPU, report) == []
    assert {line["why"] for line in report.skipped} == {"it does not run on the cpu lane"}
    assert [peer.what for peer in kernel_peers(["sdpa"], CPU, Report())] == ["contiguous K and V"]


def attention(rows, **sizes):
    return KernelCase("attention", "", "none", {"rows": rows, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16,
                                                "window": None, "chunk": None, **sizes})


@pytest.mark.parametrize("case, reason", [
    (attention([(8, 1, 100)]), None), (attention([(1, 64, 64)], window=16), None),
    (attention([(1, 1, 10), (1, 1, 20)]), "unequal lengths"), (attention([(2, 4, 64)]), "goes on from a cache"),
    (attention([(1, 64, 64)], chunk=32), "chunked"),
])
def test_attention_peers_say_what_they_do_not_take(case, reason):
    for peer in PEERS:
        if peer.op == "attention":
            came = peer.refuses(case)
            assert came is None if reason is None else reason in came


# --- kernels

@dataclass(frozen=True)
class Fake(Peer):
    """Doubles: its output is what compare() is told."""

    off: float = 0.0

    def compare(self, prepared, launch):
        prepared.launch(0)
        return peers.row_error(prepared, prepared.sets[0]["out"] * (1 + self.off))


def norm_peer(name, off=0.0):
    return Fake(name, "rms_norm", "made up", lambda prepared: [lambda: None for _ in prepared.sets], off=off)


@pytest.fixture
def scripted(monkeypatch):
    """Sides of known times: ours 2 and 4 s, theirs 6 and 8 s a sample; the list of turns."""
    log = []

    def sides(clock, ours, theirs):
        return {"ours": Script("A", [2.0, 4.0], log), "theirs": Script("B", [6.0, 8.0], log)}
    monkeypatch.setattr(against_kernels, "timed_sides", sides)
    monkeypatch.setattr(against_kernels, "torch_running", nullcontext)
    monkeypatch.setattr(against_kernels, "rest_and_wake", None)
    return log


def run_kernels(case, fakes, **args):
    report = Report()
    args = Namespace(**{"repeats": 2, "seed": 0, "sets": 2, **args})
    return against_kernels.measure_kernels([case], fakes, CPU, args, report), report


NORM = KernelCase("rms_norm", "", "gemma-3-270m", {"n_tokens": 3, "hidden": 32})


def test_a_peer_that_agrees_is_timed_in_turns(scripted):
    is_good, report = run_kernels(NORM, [norm_peer("good", off=1e-7)])
    row, = report.rows
    assert is_good and "".join(scripted) == "ABAB"
    assert row.stats["ours"].samples == (1.0, 2.0)                  # of two sets, each launched once
    assert row.stats["ratio"].median == pytest.approx(7 / 3)
    assert row.stats["error"].median == pytest.approx(1e-7, rel=0.5)
    assert (row.name, row.shape["peer"], row.shape["n_tokens"]) == ("rms_norm", "good: made up", 3)


def test_beside_a_peer_without_a_graph_ours_is_timed_without_one_too(monkeypatch):
    log, asked = [], []

    class Clock:
        is_real = True

        def timed(self, launches, graph=True):
            asked.append(graph)
            return Script("A" if graph else "E", [2.0, 4.0] if graph else [12.0, 14.0], log)

    def theirs(clock, launches):
        side = Script("B", [6.0, 8.0], log)
        side.why_eager = "it waits for the host"
        return side
    monkeypatch.setattr(against_kernels, "TheirLaunches", theirs)
    monkeypatch.setattr(against_kernels, "clock_of", lambda lane: Clock())
    monkeypatch.setattr(against_kernels, "torch_running", nullcontext)
    monkeypatch.setattr(against_kernels, "rest_and_wake", None)
    is_good, report = run_kernels(NORM, [norm_peer("eager")])
    row, = report.rows
    assert is_good and "".join(log) == "ABEABE" and asked == [True, False]
    assert row.stats["ours"].samples == (1.0, 2.0) and row.stats["ours_eagerly"].samples == (6.0, 7.0)
    assert row.stats["ratio"].median == pytest.approx(7 / 3)
    assert [note for note in row.notes if "eager" in note] == ["theirs runs eagerly: it waits for the host"]


@pytest.mark.parametrize("off", [1e-3, np.nan])
def test_a_peer_that_is_wrong_is_reported_and_not_timed(scripted, off):
    is_good, report = run_kernels(NORM, [norm_peer("bad", off), norm_peer("good")])
    bad, good = report.rows
    assert not is_good and "".join(scripted) == "ABAB"              # the other is timed all the same
    assert "ours" not in bad.stats and "not timed: a row is off ours by" in bad.notes[0]
    assert "ours" in good.stats


def test_rows_that_are_compared_are_spread_over_all(monkeypatch):
    monkeypatch.setattr(peers, "MOST_ROWS", 4)
    prepared = replace(NORM, sizes={"n_tokens": 9, "hidden": 32}).prepare(CPU, np.random.default_rng(0))
    prepared.launch()
    theirs = prepared.sets[0]["out"].copy()
    theirs[8] *= 2
    assert peers.row_error(prepared, theirs)[0] == pytest.approx(1)
    assert peers.row_error(prepared, prepared.sets[0]["out"].copy())[0] == 0


@pytest.mark.parametrize("error, is_good, why", [
    (MemoryPlanError("no room"), True, "no room"), (KernelError("refused"), False, "ours is wrong: refused")])
def test_a_case_of_ours_that_fails_does_not_end_the_run(scripted, monkeypatch, error, is_good, why):
    def fail(*args):
        raise error
    monkeypatch.setattr(KernelCase, "prepare", fail)
    came, report = run_kernels(NORM, [norm_peer("good")])
    assert came == is_good and [one["why"] for one in report.skipped] == [why] and not report.rows


def test_a_peer_that_fails_is_skipped_and_the_others_go_on(scripted):
    def fail(prepared):
        raise RuntimeError("no such kernel\nand a page of stack")
    is_good, report = run_kernels(NORM, [replace(norm_peer("broken"), build=fail), norm_peer("good")])
    assert is_good and [row.shape["peer"] for row in report.rows] == ["good: made up"]
    assert report.skipped[0]["why"] == "RuntimeError: no such kernel"
    assert report.skipped[0]["what"].endswith("broken: made up")


def test_a_shape_that_a_peer_does_not_take_is_said(scripted):
    picky = replace(norm_peer("picky"), refuses=lambda case: "rows too short")
    is_good, report = run_kernels(NORM, [picky])
    assert is_good and not report.rows and report.skipped[0]["why"] == "rows too short"


def test_drawn_tokens_must_be_among_those_that_are_left():
    case = KernelCase("sample", "", "none", {"n_rows": 3, "vocab": 8, "temperature": 0.5, "top_k": 4, "top_p": 0.9})
    logits = np.tile(np.log(np.array([8, 4, 2, 1, 1, 1, 1, 1], np.float32)), (3, 1))
    prepared = Namespace(case=case, lane=CPU, sets=[{"logits": logits}])
    # at temperature 0.5 the four likeliest have 64, 16, 4 and 1 of 85: 0.9 takes the first two
    assert peers.drawn_error(prepared, np.array([[0], [1], [1]])) == (0.0, 0.0)
    assert peers.drawn_error(prepared, np.array([[0], [2], [7]])) == (pytest.approx(2 / 3), 0.0)


# --- whole models

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


def test_our_decode_steps_compute_every_sequence():
    case = parse_case("decode=3*1@40")
    core, _ = against_model.open_core("tiny", SPEC, CPU, RandomCheckpoint(SPEC), [case], 8, Report(), 0)
    ours = against_model.Ours(core, case, np.random.default_rng(0), 2)
    with ours.seated() as sequences:
        assert [sequence.n_cached for sequence in sequences] == [39] * 3
        ours.samples(2)
        assert [len(sequence.tokens) for sequence in sequences] == [44] * 3
        assert [sequence.n_cached for sequence in sequences] == [43] * 3
    assert all(pages.n_free == pages.n_pages for pages in core.kv_cache.allocators)


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


# --- the command

def test_bad_arguments_are_named(capsys):
    for arguments, message in [(["--peer", "torch,vllm"], "'vllm' is none of transformers,torch,compiled"),
                               (["--shapes", "huge"], "'huge' is none of tiny,small,270m"),
                               (["--tokens", "1"], "1")]:
        with pytest.raises(SystemExit):
            bench.main(["against", *arguments])
        assert message in capsys.readouterr().err


def test_a_peer_of_models_has_no_kernels(capsys):
    assert bench.main(["against", "--lane", "emulated", "--peer", "transformers", "--op", "linear"]) == 2
    assert ("against: everything was skipped: kernels: transformers: it is compared as a whole model: --case, without "
            "--op") in capsys.readouterr().err


def test_an_op_that_is_none_is_refused(capsys):
    assert bench.main(["against", "--lane", "cpu", "--peer", "torch", "--op", "linea"]) == 2
    assert "no op 'linea'" in capsys.readouterr().err


def test_without_torch_every_peer_is_skipped_and_nothing_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(against, "is_installed", lambda package: False)
    file = tmp_path / "out.json"
    assert bench.main(["against", "--lane", "cpu", "--peer", ",".join(against.PEERS), "--json", str(file)]) == 2
    document = load_document(file)
    assert not document["rows"] and document["incomplete"].startswith("against: everything was skipped: ")
    what = " ".join(line["what"] for line in document["skipped"])
    for name in against.PEERS:
        assert name in what
