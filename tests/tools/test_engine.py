"""tools/bench.py engine: whole runs on every lane, and marks for a profiler."""

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import bench
import pytest
from measure.report import Report, load_document, rows_of
from measure.step import engine_case
from measure.step.engine_case import EngineCase
from measure.step.seats import WARMUPS
from measure.step.timeline import NEGATIVE, PARTS

from engine.cost import Ceilings, floor
from engine.models import describe
from engine.models.presets import PRESETS
from loaders.config import Config
from tests import tiny
from tests.golden import GOLDENS
from tests.tools.tiny_core import spec_of

CEILINGS = ["--bandwidth", "1e10", "--flops", "1e12"]
MODEL = ["--model", str(GOLDENS / "gemma3-text" / "checkpoint")]


@pytest.fixture
def bench_json(tmp_path):
    """run(*argv) -> (status, document, rows) of `bench.py engine`, with the preset "tiny"."""
    def run(*argv):
        path = tmp_path / "out.json"
        with mock.patch.dict(PRESETS, {"tiny": tiny.flat("gemma4")}):
            status = bench.main(["engine", *argv, "--json", str(path)])
        document = load_document(path) if path.exists() else None
        return status, document, rows_of(document) if document else []
    return run


def sections(rows, case):
    """{(section, name): row} of a case, ops but the first of a name left out."""
    found = {}
    for row in rows:
        if row.shape.get("case") == case:
            found.setdefault((row.section, row.name), row)
    return found


def test_a_run_on_the_cpu(bench_json):
    status, document, rows = bench_json(
        "--preset", "tiny", "--lane", "cpu", "-r", "3", "--steps", "4", "--max-batch-tokens", "32", *CEILINGS,
        "--case", "prefill=2*20", "--case", "decode=2*1@40", "--case", "verify=2*3@40", "--case", "mix=9,2*1@30",
        "--case", "decode=1*1@500", "--case", "chunk=50@90")
    assert status == 0
    assert [(skipped["what"], skipped["why"]) for skipped in document["skipped"]] == [
        ("tiny: decode=1@500", "the model's max_position_embeddings is 128"),
        ("tiny: chunk=50@90", "a step of 50 tokens, --max-batch-tokens is 32")]
    prefill = sections(rows, "prefill=2*20")
    assert list(prefill) == [("engine", "prefill")]                 # 40 tokens are no step of 32
    assert prefill["engine", "prefill"].stats["steps"].samples == (2,)
    assert len(prefill["engine", "prefill"].stats["ttft"].samples) == 6

    found = sections(rows, "decode=2*1@40")
    stats = found["engine", "step"].stats
    least = floor(spec_of("gemma4"), [(2, 1, 40)], weight_bytes=4, kv_bytes=4)
    assert stats["floor"].median == least.time_s(Ceilings(1e10, 1e12, "given"))
    assert {"wall", "ops", "host_gap", "rate", "floor", "percent_of_floor", "memory", "tokens"} <= set(stats)
    assert {"tpot", "itl p50", "itl p90", "itl p99", "rate", "floor"} <= set(found["engine", "decode"].stats)
    assert len(found["engine", "decode"].stats["tpot"].samples) == 3
    for name in ("linear qkv local", "linear qkv global", "attention decode local", "gated_linear", "linear head"):
        assert {"time", "bytes", "flops", "floor", "percent_of_roof", "share"} <= set(found["step", name].stats)
    assert found["step", "attention decode local"].shape["n_launches"] == 4

    for case in ("decode=2*1@40", "verify=2*3@40", "mix=9,2*1@30"):
        found = sections(rows, case)
        parts = [found["step", name].stats["time"].median for name in PARTS]
        wall = found["engine", "step"].stats["wall"].median
        assert sum(parts) == pytest.approx(wall, rel=1e-9)
        kernels = sum(row.stats["time"].median for row in rows if row.section == "step" and "order" in row.shape
                      and row.shape["case"] == case)
        assert parts[3] == pytest.approx(found["engine", "step"].stats["ops"].median - kernels, abs=1e-9)
    assert sections(rows, "verify=2*3@40")["step", "linear head"].shape["n_rows"] == 6
    assert sections(rows, "mix=9,2*1@30")["step", "linear head"].shape["n_rows"] == 3


def test_a_run_with_the_per_layer_table_on_the_host_says_so(bench_json):
    model = ["--model", str(GOLDENS / "gemma4-e" / "checkpoint"), "--lane", "emulated", "--case", "decode=2*1@20"]
    shapes, names = [], []
    for ple in ("host", "device"):
        _, _, rows = bench_json(*model, "--ple", ple)
        shapes.append({row.shape.get("ple") for row in rows})
        names.append({row.name for row in rows})
    assert shapes == [{"host"}, {None}] and names[1] - names[0] == {"embed per layer"}


def test_a_run_on_the_emulated_lane_counts_and_times_nothing(bench_json):
    status, _, rows = bench_json(*MODEL, "--lane", "emulated", "--case", "decode=2*1@32", "--case", "prefill=20",
                                 "--max-batch-tokens", "16")
    assert status == 0 and not {stat.unit for row in rows for stat in row.stats.values()} & {"s", "tokens/s", "%"}
    found = sections(rows, "decode=2*1@32")
    assert found["engine", "decode"].stats["tokens"].samples == (4,)
    assert sections(rows, "prefill=20")["engine", "prefill"].stats["steps"].samples == (2,)
    n_bytes = sum(row.stats["bytes"].median for row in rows if "order" in row.shape)
    assert n_bytes > found["step", "floor"].stats["bytes"].median > 0


def test_a_slice_of_a_preset_without_its_ops(bench_json):
    status, document, rows = bench_json("--preset", "tiny", "--layers", "2", "--lane", "cpu", "-r", "1", "--steps", "2",
                                        "--no-ops", "--case", "decode=1*1@20", *CEILINGS)
    assert status == 0 and {row.section for row in rows} == {"engine"}
    assert all(row.shape["layers"] == 2 and row.shape["preset"] == "tiny" for row in rows)
    assert document["settings"]["seed"] == 0


def test_a_decode_case_on_a_gpu_is_replayed_as_the_graph_pads_it(bench_json, gpu, monkeypatch):
    monkeypatch.setattr(engine_case, "GPU_LAUNCHES", 2)             # each is emulated
    status, _, rows = bench_json(*MODEL, "--lane", "cuda", "-r", "2", "--steps", "2", "--case", "decode=3*1@20",
                                 "--case", "verify=2*2@20", *CEILINGS)
    assert status == 0 and gpu.counts["replays"] > 10
    found = sections(rows, "decode=3*1@20")
    assert {"gpu", "wall", "host_gap", "memory"} <= set(found["engine", "step"].stats)
    assert found["step", "linear qkv"].shape["n_rows"] == 4         # its bucket
    assert any("in a cache" in note for note in found["step", "linear qkv"].notes)
    assert not [note for row in rows for note in row.notes if "eager" in note or "one by one" in note]
    assert sections(rows, "verify=2*2@20")["engine", "step"].notes == (
        "the target's rows alone, each sampled: no draft model, no graph",)


def test_figures_follow_from_the_times(bench_json, gpu, monkeypatch):
    """The host's clock goes on by a second each time it is read; the stand-in's launches take a millisecond."""
    monkeypatch.setattr(engine_case, "GPU_LAUNCHES", 8)                             # two turns of a group of 7
    monkeypatch.setattr(engine_case, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    status, _, rows = bench_json(*MODEL, "--lane", "cuda", "-r", "2", "--steps", "4", "--case", "decode=3*1@20",
                                 "--case", "prefill=2*9", "--max-batch-tokens", "9", *CEILINGS)
    spec, ceilings = describe(Config.load(Path(MODEL[1]))), Ceilings(1e10, 1e12, "given")

    def floor_s(*row):
        return floor(spec, [row]).time_s(ceilings)
    found = sections(rows, "decode=3*1@20")
    step, decode = found["engine", "step"].stats, found["engine", "decode"].stats
    gpu_s = (step["n_ops"].median + 2) / 1e3                                        # a draw is three launches
    assert status == 0 and step["wall"].samples == (1, 1) and step["gpu"].samples == pytest.approx(2 * [gpu_s])
    assert step["host_gap"].median == pytest.approx(100 * (1 - gpu_s)) and step["rate"].samples == (3, 3)
    assert step["floor"].median == floor_s(3, 1, 20)
    assert step["percent_of_floor"].samples == pytest.approx(2 * [100 * floor_s(3, 1, 20)])
    assert decode["tpot"].samples == (1, 1) and decode["itl p99"].median == 1 and decode["rate"].median == 3
    assert decode["floor"].median == floor_s(3, 1, 20 + WARMUPS + 2)                # in the middle of the four
    product = found["step", "linear qkv"]
    assert product.stats["time"].samples == pytest.approx(2 * [product.shape["n_launches"] / 1e3])
    assert product.stats["percent_of_roof"].median == pytest.approx(
        100 * product.stats["floor"].median / product.stats["time"].median)
    assert product.stats["share"].median == pytest.approx(100 * product.stats["time"].median)
    prefill = sections(rows, "prefill=2*9")["engine", "prefill"].stats
    assert prefill["ttft"].samples == (1, 3, 1, 3) and prefill["rate"].samples == (6, 6)     # 9, 1 + 8, 1 + 1 tokens
    assert prefill["percent_of_floor"].median == pytest.approx(100 * floor_s(2, 9, 9) / 3)


def test_a_part_that_is_negative_says_why():
    report = Report()
    EngineCase.add_parts(SimpleNamespace(ceilings=None, report=report, shape={}), [], 4.0, 3.0, 5.0)
    assert {row.name: (row.stats["time"].median, row.notes) for row in report.rows} == {
        "gaps": (-2.0, (PARTS["gaps"], NEGATIVE["gaps"])), "host": (1.0, (PARTS["host"],))}


def test_a_cache_is_blamed_for_bytes_alone(bench_json):
    """No cache makes arithmetic faster: where it bounds an op, the note would be wrong."""
    _, _, rows = bench_json("--preset", "tiny", "--lane", "cpu", "-r", "1", "--steps", "2", "--case", "decode=1*1@20",
                            "--bandwidth", "1e10", "--flops", "1")
    is_noted = {row.name: any("in a cache" in note for note in row.notes) for row in rows if "order" in row.shape}
    assert is_noted["add_norm"] and not is_noted["linear head"]


# --- profiler ranges

def test_nvtx_ranges_are_balanced_and_name_steps_layers_and_ops(bench_json, gpu):
    stack, seen = [], []

    def push(text):
        stack.append(text)
        seen.append(tuple(stack))
    fake = SimpleNamespace(push_range=push, pop_range=lambda: stack.pop())
    with mock.patch.dict(sys.modules, {"nvtx": fake}):
        status, _, rows = bench_json(*MODEL, "--lane", "cuda", "-r", "1", "--steps", "2", "--no-ops", "--nvtx",
                                     "--case", "decode=2*1@20", *CEILINGS)
    assert status == 0 and not stack
    assert ("step", "embed") in seen and ("step", "layer 0", "attention") in seen and ("step", "sample") in seen
    n_layers = len(describe(Config.load(Path(MODEL[1]))).layers)
    assert {names[1] for names in seen if len(names) == 2} >= {f"layer {i}" for i in range(n_layers)}
    assert seen.count(("step", "layer 1", "attention")) == seen.count(("step",))
    assert any("no graphs" in note for row in rows for note in row.notes)


def test_when_everything_was_skipped_it_could_not_run(bench_json, capsys):
    status, document, rows = bench_json("--preset", "tiny", "--lane", "cpu", "--case", "decode=1*1@500", *CEILINGS)
    assert status == 2 and not rows and len(document["skipped"]) == 1
    assert ("bench: engine: everything was skipped: tiny: decode=1@500: the model's max_position_embeddings is 128"
            in capsys.readouterr().err)


def test_without_nvtx_it_is_not_imported(bench_json):
    with mock.patch("measure.step.ranges.import_module", side_effect=AssertionError):
        assert bench_json("--preset", "tiny", "--lane", "cpu", "-r", "1", "--steps", "2", "--no-ops", "--case",
                          "decode=1*1@20", *CEILINGS)[0] == 0


def test_nvtx_that_is_not_there_is_said(bench_json, capsys):
    with mock.patch("measure.step.ranges.import_module", side_effect=ImportError):
        status, document, _ = bench_json("--preset", "tiny", "--lane", "cpu", "--nvtx", "--steps", "2", "--case",
                                         "decode=1*1@20", *CEILINGS)
    assert status == 2 and "--nvtx needs the package nvtx or CuPy" in capsys.readouterr().err
    assert document["incomplete"].startswith("--nvtx needs")
