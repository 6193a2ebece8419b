"""bench.py floors: figures of a step by count, what bounds it, and whether it fits."""

import json

import bench
import pytest
from measure.cases import parse_case
from measure.floors import floor_row, resident_bytes

from engine.cost import Ceilings, floor
from engine.models.presets import preset
from engine.tensors import n_weights

H200 = ["--bandwidth", "4.3e12", "--flops", "790e12"]


def run(tmp_path, *options):
    path = tmp_path / "floors.json"
    status = bench.main(["floors", *options, "--json", str(path)])
    return status, json.loads(path.read_text())


def test_a_document_of_floors(tmp_path, capsys):
    status, document = run(tmp_path, "--preset", "gemma-3-1b,gemma-4-31b", "--case", "decode={1,8}*1@1024",
                           "--case", "prefill=8192", *H200, "--metadata", "gpu=H200")
    assert status == 0
    assert [(row["name"], row["shape"]["case"]) for row in document["rows"]] == [
        (name, case) for name in ("gemma-3-1b", "gemma-4-31b")
        for case in ("decode=1@1024", "decode=8*1@1024", "prefill=8192")]
    assert document["facts"]["ceilings"] == {"bytes_per_s": 4.3e12, "flops_per_s": 790e12, "source": "given"}
    text = capsys.readouterr().out
    assert "floors: weight_bits 16, kv_bits 16" in text and "gpu: H200" in text


def test_figures_are_those_of_the_cost_model():
    spec, case, ceilings = preset("gemma-3-1b"), parse_case("mix=2048,16*1@4096"), Ceilings(1e12, 1e14, "given")
    cost = floor(spec, [(1, 2048, 2048), (16, 1, 4096)], weight_bytes=0.5, kv_bytes=1)
    row = floor_row("gemma-3-1b", spec, case, ceilings, weight_bits=4, kv_bits=8)
    figures = {name: stat.median for name, stat in row.stats.items()}
    assert (figures["bytes"], figures["flops"]) == (cost.bytes, cost.flops)
    assert figures["time"] == cost.time_s(ceilings) == max(cost.bytes / 1e12, cost.flops / 1e14)
    assert figures["rate"] == pytest.approx((2048 + 16) / figures["time"])
    assert row.goal is None


@pytest.mark.parametrize("case, bound", [("decode=1@1024", "of memory"), ("prefill=2048", "of compute")])
def test_what_bounds_stands_at_a_hundred_percent(case, bound):
    row = floor_row("x", preset("gemma-3-1b"), parse_case(case), Ceilings(4.3e12, 790e12, "given"))
    shares = {name: row.stats[name].median for name in ("of memory", "of compute")}
    assert shares.pop(bound) == pytest.approx(100)
    assert 0 < shares.popitem()[1] < 50


def test_resident_counts_weights_once_and_one_window_of_sliding_layers():
    spec = preset("gemma-3-1b")                             # 26 layers, 4 global, 1 KV head of 256, window 512
    one = 2 * 256 * 2
    assert resident_bytes(spec, parse_case("a=3*1@100"), 2, 2) == 2 * n_weights(spec) + 3 * 26 * 100 * one
    assert resident_bytes(spec, parse_case("a=1@4096,1@600"), 0.5, 1) == (
        n_weights(spec) / 2 + (4 * 4096 + 22 * 512 + 4 * 600 + 22 * 512) * one / 2)


@pytest.mark.parametrize("name, case, weight_bytes, printed", [
    ("gemma-4-31b", "64*1@1024", 2, 112), ("gemma-4-31b", "8*1@32768", 2, 83), ("gemma-4-31b", "64*1@8192", 2, 147),
    ("gemma-3-27b", "64*1@32768", 2, None), ("gemma-4-31b", "64*1@32768", 2, None),
    ("llama-4-scout", "64*1@32768", 1, None), ("llama-4-scout", "1@1", 2, None)])
def test_resident_is_that_of_tables_worked_out_apart_from_it(name, case, weight_bytes, printed):
    """GiB of one H200, which has 139; None is more."""
    resident = resident_bytes(preset(name).text_only(), parse_case(f"decode={case}"), weight_bytes, 2) / 2**30
    assert resident > 139 if printed is None else abs(resident - printed) <= 0.5


@pytest.mark.parametrize("name, case, ms", [("gemma-4-e2b", "prefill=8192", 14.4), ("gemma-3-1b", "prefill=8192", 15.1),
                                            ("gemma-4-e2b", "decode=8*1@8192", None)])
def test_a_prompt_whose_other_tokens_are_dropped_takes_less(name, case, ms):
    spec, case, ceilings = preset(name).text_only(), parse_case(case), Ceilings(4.3e12, 790e12, "given")
    stats = floor_row(name, spec, case, ceilings).stats
    assert ("if dropped" in stats) == (ms is not None)
    if ms is not None:
        time_s = stats["if dropped"].median
        assert time_s == floor(spec, case.rows, drops=True).time_s(ceilings) < stats["time"].median
        assert time_s == pytest.approx(ms / 1e3, abs=0.05e-3)


def test_floors_of_the_float32_lane(tmp_path):
    _, document = run(tmp_path, "--preset", "gemma-3-1b", "--case", "decode=1@512", "--weight-bits", "32", "--kv-bits",
                      "32", *H200)
    assert document["rows"][0]["stats"]["bytes"]["median"] == 2 * floor(preset("gemma-3-1b"), [(1, 1, 512)]).bytes


def test_what_does_not_fit_is_a_missed_goal(tmp_path, capsys):
    _, document = run(tmp_path, "--preset", "gemma-4-31b", "--case", "decode={1,64}*1@32768", *H200,
                      "--memory-bytes", "150e9")
    assert [row["goal"]["is_met"] for row in document["rows"]] == [True, False]
    assert "resident <= 150 GB  MISS" in capsys.readouterr().out


def test_a_context_that_the_model_has_not_is_skipped(tmp_path):
    _, document = run(tmp_path, "--preset", "gemma-3-1b", "--case", "decode=1@{1024,32768,65536}", *H200)
    assert len(document["rows"]) == 2
    assert document["skipped"] == [{"what": "gemma-3-1b: decode=1@65536",
                                    "why": "the model's max_position_embeddings is 32768"}]


def test_ceilings_come_from_an_earlier_run(tmp_path, capsys):
    _, first = run(tmp_path, "--preset", "gemma-3-1b", *H200)
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps(first))
    _, again = run(tmp_path, "--preset", "gemma-3-1b", "--ceilings", str(earlier))
    assert again["facts"]["ceilings"]["source"] == f"given, {earlier}"
    assert [row["stats"] for row in again["rows"]] == [row["stats"] for row in first["rows"]]
    earlier.write_text(json.dumps({**first, "facts": {}}))
    status, document = run(tmp_path, "--ceilings", str(earlier))
    assert (status, document["rows"]) == (2, [])
    assert "facts has no ceilings" in document["incomplete"]


def test_without_ceilings_nothing_is_made_up(capsys):
    assert bench.main(["floors"]) == 2
    assert "give --bandwidth BYTES_PER_S and --flops FLOP_PER_S, or --ceilings FILE.json" in capsys.readouterr().err
