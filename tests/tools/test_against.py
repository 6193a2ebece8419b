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
from measure.kernel.kernel_cases import KernelCase, cases_of
from measure.peer import against_kernels, peers, turns
from measure.peer.peers import PEERS, Peer, kernel_peers
from measure.peer.turns import compared, take_turns, times_better
from measure.report import Report, load_document
from measure.sm_clock import SideClocks

from engine.backend import open_lane
from engine.errors import KernelError, MemoryPlanError

CPU = open_lane("cpu", "auto")
ALL_OPS = {peer.op for peer in PEERS}


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
    assert kernel_peers(["torch", "flashinfer", "triton"], ALL_OPS, CPU, report) == []
    why = {line["what"]: line["why"] for line in report.skipped}
    assert why["moe_linear: triton: fused experts, tuned"] == "torch and triton not installed"
    assert why["moe_linear: torch: F.grouped_mm"] == "torch not installed"
    assert why["linear: torch: F.linear"] == "torch not installed"
    assert why["attention: flashinfer: paged, on our pages"] == "torch and flashinfer not installed"


def test_a_peer_of_the_gpu_is_skipped_elsewhere(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name)
    report = Report()
    assert kernel_peers(["flashinfer", "triton"], ALL_OPS, CPU, report) == []
    assert {line["why"] for line in report.skipped} == {"it does not run on the cpu lane"}
    assert [peer.what for peer in kernel_peers(["sdpa"], ALL_OPS, CPU, Report())] == ["contiguous K and V"]


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


def test_the_clock_is_read_after_each_turn(scripted, monkeypatch):
    left = [1980, 1500, 1980, 1500]
    monkeypatch.setattr(against_kernels, "side_clocks", lambda lane: SideClocks(lambda: left.pop(0)))
    _, report = run_kernels(NORM, [norm_peer("good")])
    assert not left
    assert "no fair comparison: SM clock 1980 MHz for ours, 1500 for theirs" in report.rows[0].notes


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


# --- the command

def test_bad_arguments_are_named(capsys):
    for arguments, message in [(["--peer", "torch,vllm"], "'vllm' is none of transformers,torch,compiled"),
                               (["--shapes", "huge"], "'huge' is none of tiny,small,270m"),
                               (["--tokens", "1"], "1")]:
        with pytest.raises(SystemExit):
            bench.main(["against", *arguments])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    (["--lane", "emulated", "--peer", "transformers", "--op", "linear"],
     "everything was skipped: kernels: transformers: it has none of these ops"),
    (["--lane", "cpu", "--peer", "sdpa", "--op", "rms_norm"],
     "everything was skipped: kernels: sdpa: it has none of these ops"),
    (["--lane", "cpu", "--peer", "sdpa", "--case", "decode=1*1@32"],
     "everything was skipped: whole models: sdpa: it is none, as torch, compiled, transformers are"),
    (["--lane", "cpu", "--peer", "torch", "--op", "moe_linear", "--preset", "gemma-3-270m"],
     "no preset that was asked for runs moe_linear")], ids=str)
def test_where_all_is_skipped_it_says_why(arguments, message, capsys):
    assert bench.main(["against", *arguments]) == 2
    assert message in capsys.readouterr().err


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
