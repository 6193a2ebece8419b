"""bench.py kernels: figures follow from times and costs, wrong kernels are not timed, counts are held."""

import json
from argparse import Namespace
from contextlib import nullcontext
from types import SimpleNamespace

import bench
import ml_dtypes
import numpy as np
import pytest
from measure import ceilings, kernels
from measure.kernel import compiled, goals, kernel_cases, traffic
from measure.kernel.kernel_cases import OPS, KernelCase, cases_of
from measure.kernel.kernel_inputs import Data
from measure.report import Goal, Report

from engine.backend import HostLane, open_lane
from engine.cuda_lane import CudaLane
from engine.errors import ConfigError
from engine.kernels import ops
from engine.kernels.resources import Resources
from engine.models import describe
from engine.models.presets import PRESETS
from engine.roofline import Ceilings, Cost
from loaders.config import Config
from tests import tiny

BF16 = np.dtype(ml_dtypes.bfloat16)
H200 = Ceilings(4.3e12, 790e12, "given")


@pytest.fixture
def tiny_preset(monkeypatch):
    spec = describe(Config(tiny.flat("gemma4")))
    monkeypatch.setattr(kernel_cases, "preset", lambda name: spec)


def arguments(**changed):
    return Namespace(**{"lane": "cpu", "preset": ["tiny"], "op": None, "n_tokens": [1, 20], "context": [40],
                        "batch": [1, 3], "sets": None, "repeats": 2, "seed": 0, "bandwidth": 1e9, "flops": 1e10,
                        "ceilings": None, **changed})


def document_of(tmp_path, *options):
    path = tmp_path / "document.json"
    status = bench.main([*options, "--json", str(path)])
    return status, json.loads(path.read_text())


# --- kernels

def test_a_document_of_kernels(tmp_path, capsys):
    status, document = document_of(
        tmp_path, "kernels", "--lane", "cpu", "--preset", "gemma-3-270m", "--op", "rms_norm,select_rows,rope_angles",
        "--n-tokens", "1,3", "--batch", "2", "-r", "3", "--sets", "2", "--bandwidth", "1e9", "--flops", "1e10")
    assert status == 0 and not document["skipped"]
    assert [(row["name"], row["shape"]["n_tokens"]) for row in document["rows"]] == [
        ("rms_norm", 1), ("rms_norm", 3), ("rope_angles", 1), ("rope_angles", 3), ("select_rows", 2)]
    for row in document["rows"]:
        stats = row["stats"]
        time_s, n_bytes = stats["time"]["median"], stats["bytes"]["median"]
        assert len(stats["time"]["samples"]) == 3 and row["notes"] == ["warm: all sets together fit a cache"]
        assert stats["bytes_per_s"]["median"] == pytest.approx(n_bytes / time_s)
        assert stats["percent_of_roof"]["median"] == pytest.approx(100 * n_bytes / 1e9 / time_s)
        assert "flops_per_s" not in stats                   # these compute nothing
    assert document["rows"][1]["stats"]["bytes"]["median"] == 4 * (2 * 3 + 1) * 640
    assert "rope_angles" in capsys.readouterr().out


def test_figures_of_a_launch():
    stats = kernels.stats_of(Cost(2e6, 5e6, 8e9), [0.001, 0.002, 0.004], Ceilings(1e10, 1e13, "given"))
    assert stats["percent_of_roof"].samples == (80, 40, 20)             # bound by the 0.8 ms of its operations
    assert stats["bytes_per_s"].median == 1e9 and stats["flops_per_s"].median == 4e12
    assert stats["bytes"].median == 2e6                                 # what any implementation moves


def test_a_wrong_kernel_is_not_timed_and_the_others_are(tiny_preset, monkeypatch, capsys):
    class Broken:
        def __getattr__(self, name):
            return {"rms_norm": lambda *_: None}.get(name) or getattr(ops, name)
    monkeypatch.setattr(kernels, "open_lane", lambda *_: HostLane("cpu", Broken(), BF16))
    report = Report()
    assert kernels.run(arguments(op=["rms_norm", "add_norm"], n_tokens=[2]), report) == 1
    add, rms = report.rows
    assert "time" in add.stats and add.notes == ("warm: all sets together fit a cache",)
    assert not rms.stats and rms.notes[0].startswith("not timed: tiny rms_norm (preset=tiny, n_tokens=2, size=32): ")


def test_what_has_no_room_is_skipped(tiny_preset, monkeypatch, gpu):
    lane = CudaLane(0, ops, BF16)
    monkeypatch.setattr(kernels, "open_lane", lambda *_: lane)
    monkeypatch.setattr(kernels, "cases_of", lambda *_: [
        KernelCase("embed", "", "tiny", {"n_tokens": 2, "vocab": vocab, "hidden": 256}) for vocab in (1 << 20, 64)])
    report = Report()
    assert kernels.run(arguments(lane="cuda"), report) == 0
    assert [row.shape["size"] for row in report.rows] == ["64 x 256"]
    assert report.skipped[0]["what"] == "tiny embed (preset=tiny, n_tokens=2, size=1048576 x 256)"
    assert "no room left" in report.skipped[0]["why"]


def test_a_fault_ends_the_run_and_says_at_which_case(tiny_preset, monkeypatch):
    def fault(*_):
        raise RuntimeError("illegal memory access")
    monkeypatch.setattr(kernels, "measured", fault)
    report = Report()
    with pytest.raises(RuntimeError, match="illegal"):
        kernels.run(arguments(op=["rms_norm"], n_tokens=[1]), report)
    assert report.skipped == [{"what": "tiny rms_norm (preset=tiny, n_tokens=1, size=32)",
                               "why": "RuntimeError: illegal memory access"}]


def test_short_kernels_are_timed_many_at_a_time(tiny_preset, monkeypatch, gpu):
    lane = CudaLane(0, ops, BF16)
    monkeypatch.setattr(kernels, "open_lane", lambda *_: lane)
    report = Report()
    assert kernels.run(arguments(lane="cuda", op=["rms_norm"], n_tokens=[1], sets=3), report) == 0
    assert report.rows[0].stats["time"].samples == pytest.approx((0.001, 0.001))    # 1 ms a launch on the stand-in
    assert gpu.counts["launches"] == 1 + 2 * 3 * (int(kernels.SAMPLE_S / (3 * kernels.LAUNCH_S)) + 1)


def test_options_that_cannot_be(capsys):
    with pytest.raises(SystemExit):
        bench.main(["kernels", "--op", "gemm"])
    assert "no op 'gemm', expected some of linear,gated_linear," in capsys.readouterr().err
    for lane in ("cpu", "emulated"):
        assert bench.main(["kernels", "--lane", lane, "--preset", "gemma-3-270m", "--op", "moe_route,add_norms"]) == 2
        assert "no preset that was asked for runs moe_route or add_norms" in capsys.readouterr().err


# --- goals

@pytest.mark.parametrize("op, sizes, goal", [
    ("linear", {"n_tokens": 1, "n_in": 5376, "n_out": 16384}, Goal("percent_of_roof", at_least=93)),
    ("linear", {"n_tokens": 64, "n_in": 5376, "n_out": 16384}, Goal("percent_of_roof", at_least=90)),
    ("gated_linear", {"n_tokens": 16, "n_in": 5376, "intermediate": 21504}, Goal("percent_of_roof", at_least=93)),
    ("linear", {"n_tokens": 1, "n_in": 1152, "n_out": 1536}, None),
    ("linear", {"n_tokens": 2048, "n_in": 5376, "n_out": 16384}, None),
    ("add_norm", {"n_tokens": 8192, "hidden": 5376}, Goal("percent_of_roof", at_least=85)),
    ("attention", {"rows": [(64, 1, 1024)], "head_dim": 256, "window": 1024}, Goal("percent_of_roof", at_least=90)),
    ("attention", {"rows": [(64, 1, 1024)], "head_dim": 256, "window": None}, None),
    ("attention", {"rows": [(1, 8192, 8192)], "head_dim": 512, "window": None}, Goal("flops_per_s", at_least=450e12)),
    ("sample", {"n_rows": 1, "vocab": 262144, "top_k": 64}, Goal("time", at_most=20e-6)),
    ("sample", {"n_rows": 1, "vocab": 262144, "top_k": 0}, None)])
def test_goals(op, sizes, goal):
    case = KernelCase(op, "", "any", sizes)
    assert goals.goal_of(case, H200) == goal
    slower = goals.goal_of(case, Ceilings(3e12, 790e12, "given"))
    assert slower == (goal if goal and goal.stat == "percent_of_roof" else None)


def test_goals_are_for_shapes_that_are_measured():
    cases = cases_of(["gemma-3-12b", "gemma-3-27b", "gemma-4-31b"], [1, 16, 64, 8192, 32768], [1024, 32768], [1, 8, 64])
    for which, is_for, goal, _ in goals.GOALS:
        assert any(case.op in which and is_for(case.sizes) for case in cases), (which, goal)


# --- counted, not timed

def test_traffic_is_counted_and_held(tiny_preset, monkeypatch):
    report, args = Report(), arguments(lane="emulated", op=["linear", "rms_norm", "embed"], n_tokens=[5], batch=[1])
    assert traffic.run(args, report, open_lane("emulated", "auto")) == 0
    rows = {row.name: row for row in report.rows if row.section == "traffic"}
    assert list(rows) == ["linear qkv local", "linear o local", "linear qkv global", "linear o global", "linear down",
                          "linear head", "rms_norm", "embed"]
    norm = {name: stat.median for name, stat in rows["rms_norm"].stats.items()}
    assert norm["cost"] == norm["distinct"] == 2 * (2 * 5 + 1) * 32 and norm["moved / cost"] == 1
    assert norm["distinct / cost"] == 1
    assert norm["small rereads"] == 4 * 2 * 32              # five rows read the weight
    assert all(row.is_met for row in rows.values())
    monkeypatch.setattr(traffic, "SLACK", 0.9)
    assert traffic.run(args, Report(), open_lane("emulated", "auto")) == 1


def test_what_may_move_more_says_why():
    def bound(op, cost=1000, **sizes):
        return traffic.bound(KernelCase(op, "", "any", sizes), cost)
    assert bound("rms_norm", n_tokens=64, hidden=64) == (1.1, [])
    assert bound("linear", n_tokens=1, n_in=5376, n_out=256) == (1.1, [])
    cost = 2 * 5376 * (256 + 64)
    most, notes = bound("linear", cost, n_tokens=64, n_in=5376, n_out=256)      # two tiles of 128 rows
    assert most == pytest.approx(1.1 * (cost + 2 * 64 * 5376) / cost) and "anew" in notes[0]
    assert bound("linear", cost, n_tokens=16, n_in=2048, n_out=256)[1]           # x is 64 KB, which no longer stays
    assert bound("linear", cost, n_tokens=15, n_in=2048, n_out=256) == (1.1, [])
    twice, _ = bound("gated_linear", cost, n_tokens=64, n_in=5376, intermediate=128)        # as many rows
    assert twice == most
    routed = {"n_tokens": 4, "n_experts": 16, "experts_per_token": 2, "in_out": False, "n_in": 64, "n_out": 128}
    again = {"moe_linear": 8, "moe_gated_linear": 3 * 8 + 4}        # rows of x, by two tiles of 64 rows and by four
    for op, extra in (("moe_linear", {}), ("moe_gated_linear", {"by_pair": False})):
        most, notes = bound(op, 1000, **routed, **extra)
        assert most == pytest.approx(1.1 * (1000 + 2 * 64 * again[op]) / 1000) and "anew" in notes[0]
    for op in ("apply_edits", "attention_temperature", "moe_route"):
        most, notes = bound(op)
        assert most is None and notes


def test_a_tile_of_queries_may_read_the_keys_that_it_sees():
    """16 queries of 8 heads in two tiles of 8 queries, which see 24 and 32 keys; K, V and out have rows of 512."""
    heads = {"rows": [(3, 16, 32)], "n_heads": 8, "n_kv_heads": 1, "head_dim": 512}
    row = 2 * 512
    for seen, changed in ((24 + 32, {}), (32 + 32, {"sees_all": True})):
        most, notes = traffic.bound(KernelCase("attention", "", "any", {**heads, **changed}), 1e6)
        assert most == pytest.approx(1.1 * (1 + 3 * row * (2 * (seen - 32) + 16 * 8) / 1e6)) and "anew" in notes[0]


@pytest.mark.parametrize("op, sizes, logit_bytes", [
    ("sample", {"temperature": 0.0}, 12), ("sample", {"temperature": 1.0}, 12), ("top_logprobs", {}, 12),
    ("sample_drafts", {}, 20), ("relax_drafts", {}, 8)])
def test_one_more_pass_over_the_logits_is_a_goal_missed(op, sizes, logit_bytes):
    """A pass reads 4 bytes of a logit, the cost has logit_bytes of it."""
    case = next(case for case in traffic.sliced(cases_of(["gemma-3-1b"], [1], [1024], [1], [op]))
                if sizes.items() <= case.sizes.items())
    with Data(open_lane("emulated", "auto"), np.random.default_rng(0)) as data:
        row, _ = traffic.counted(case, data.lane, data)
    assert row.is_met and row.stats["moved / cost"].median + 4 / logit_bytes > row.goal.at_most


def test_bank_conflicts_are_a_goal_missed_but_for_bins(monkeypatch):
    launch = SimpleNamespace(traffic=SimpleNamespace(distinct_bytes=100, moved_bytes=100, small_reread_bytes=0,
                                                     bank_conflicts=3))
    prepared = SimpleNamespace(cost=Cost(100), check=lambda: 0.0)
    monkeypatch.setattr(KernelCase, "prepare", lambda *_: prepared)
    monkeypatch.setattr(traffic.host, "checking", lambda: nullcontext([launch]))
    data = SimpleNamespace(rng=None)
    cases = cases_of(["gemma-3-1b"], [1], [1024], [1], ["rms_norm", "top_logprobs"])
    norm, tops = (traffic.counted(case, None, data)[0] for case in cases)
    assert norm.goal == Goal("bank conflicts", at_most=0) and norm.is_met is False
    assert tops.goal == Goal("moved / cost", at_most=traffic.ADDED_TO_BINS["top_logprobs"])
    launch.traffic.bank_conflicts = 0
    assert traffic.counted(cases[0], None, data)[0].goal == Goal("moved / cost", at_most=1.1)


def test_slices_keep_rows_whole():
    for case in traffic.sliced(cases_of(["gemma-4-31b"], [1, 64], [1024], [1])):
        s = case.sizes
        if "tower" in case.label or case.op in ("add_rows", "pool_rows", "place_rows"):
            assert s.get("n_places", 0) <= 4096 and s.get("n_kv_heads", 0) <= 4 and s.get("n_tokens", 0) <= 63
            assert s.get("head_dim", 72) == 72 and s.get("hidden", 1152) == 1152 and s.get("n_out", 0) <= 256
            continue
        assert s.get("n_out", 0) <= 256 and (case.op != "qk_norm_rope_cache" or s["n_tokens"] in (1, 32))
        assert s.get("n_in", 5376) in (5376, 8192, 16384, 21504) and s.get("hidden", 5376) == 5376
        assert s.get("head_dim", 256) in (256, 512) and s.get("n_kv_heads", 0) <= 4
        if case.op == "attention":
            assert s["n_heads"] // s["n_kv_heads"] == {256: 2, 512: 8}[s["head_dim"]]


@pytest.mark.parametrize("op, sizes, factor, note", [
    ("add_rows", {"n_tokens": 64, "hidden": 1152, "n_axes": 1}, 1.1, None),
    ("add_rows", {"n_tokens": 64, "hidden": 1152, "n_axes": 2}, 1.1 * (1 + 2 * 1152 * (128 - 16) / 1e5), "PLACES"),
    ("rope_angles", {"n_tokens": 64, "n_pairs": 32}, 1.1, None),
    ("rope_angles", {"n_tokens": 64, "n_pairs": 36}, 1.1 * (1 + 64 * 64 / 1e5), "SECTORS"),
    ("qk_norm_rope_cache", {"n_tokens": 32, "head_dim": 64}, 1.1, None),
    ("qk_norm_rope_cache", {"n_tokens": 32, "head_dim": 72}, None, "HALVES"),
    ("linear", {"n_tokens": 9, "n_in": 588, "n_out": 256}, None, "ODD_ROWS"),
    ("attention", {"rows": [(1, 64, 64)], "n_heads": 1, "n_kv_heads": 1, "head_dim": 72, "sees_all": True},
     1.1 * (1 + 64 * 144 / 1e5), "TEN_CHUNKS")])
def test_what_a_tower_moves_beyond_its_cost_is_bounded_or_said(op, sizes, factor, note):
    most, notes = traffic.bound(KernelCase(op, "", "any", sizes), 1e5)
    assert most == pytest.approx(factor) if factor else most is None
    assert note is None or getattr(traffic, note) in notes


def test_of_further_models_only_what_takes_another_way_is_counted():
    def of(preset):
        return cases_of([preset], [1, 64], [1024], [1])
    first = of(traffic.PRESETS[0])
    found = traffic.with_other_ways(first, *(of(preset) for preset in traffic.MORE))
    assert found[:len(first)] == first and {case.op for case in found} == set(OPS)
    more = [case for case in found[len(first):] if case.preset == "llama-4-scout"]
    assert {case.op for case in more} >= {"scale_rows", "attention_temperature", "moe_route", "moe_linear"}
    assert [case for case in more if case.op in ("linear", "select_rows", "embed", "sample")] == []
    assert {case.sizes["activation"] for case in more if case.op == "gated_linear"} == {"silu"}
    assert traffic.with_other_ways(found, *(of(preset) for preset in traffic.MORE)) == found


def test_resources_of_every_architecture(monkeypatch):
    build = ceilings.kernels.COPY(**ceilings.kernels.CONSTANTS)
    spills = Resources(32, spill_stores=8, spill_loads=4)
    monkeypatch.setattr(traffic.device, "nvrtc", lambda: None)
    monkeypatch.setattr(traffic.compiled, "check", lambda built, arches, n_workers: [
        compiled.Row("ceilings.cu", repr(build), arch, 256, 0, spills if arch == "sm_80" else Resources(32))
        for arch in arches])
    rows = list(traffic.resources([(build, 256, 0)], Report()))
    assert [(row.name, row.shape["arch"], row.is_met, row.goal.stat) for row in rows] == [
        ("copy", "sm_80", False, "spills"), ("copy", "sm_90a", True, "blocks an SM"),
        ("copy", "sm_100a", True, "blocks an SM")]
    assert rows[0].stats["spills"].median == 12 and rows[0].notes == ("spills 8 + 4 bytes",)
    assert rows[1].stats["blocks an SM"].median == 8 and rows[1].stats["warps an SM"].median == 64


def test_resources_are_those_of_all_that_presets_launch(tiny_preset, monkeypatch):
    asked = []
    monkeypatch.setattr(traffic, "resources", lambda built, report: asked.append(built) or [])
    monkeypatch.setattr(traffic, "sliced", lambda cases: [])
    every = {repr(build) for build, *_ in compiled.variants(list(PRESETS))}
    for preset, op in ((None, None), (["gemma-3-1b"], None), (None, ["rms_norm"])):
        traffic.run(arguments(lane="emulated", preset=preset, op=op), Report(), open_lane("emulated", "auto"))
    whole, of_one, launched = ({repr(build) for build, *_ in built} for built in asked)
    assert whole == every and of_one < every and len(of_one) > 10 and not launched


def test_no_compiler_is_no_failure(monkeypatch):
    def missing():
        raise ConfigError("NVRTC was not found")
    monkeypatch.setattr(traffic.device, "nvrtc", missing)
    report = Report()
    assert list(traffic.resources([], report)) == []
    assert report.skipped == [{"what": "registers, spills and occupancy", "why": "NVRTC was not found"}]
