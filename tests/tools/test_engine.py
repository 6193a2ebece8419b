"""tools/bench.py engine: seated sequences, the ops of a step, and whole runs on every lane."""

import itertools
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import bench
import numpy as np
import pytest
from measure.cases import parse_case
from measure.models import kind_of
from measure.random_weights import RandomCheckpoint
from measure.report import Report, load_document, rows_of
from measure.step import engine_case
from measure.step.seats import WARMUPS, Needs, config_of, open_core, seated, step_of
from measure.step.timeline import PARTS, Op, attribution, grouped, ops_of, recording

from engine.backend import open_lane
from engine.cost import Ceilings, Cost, floor, floor_parts
from engine.models import describe
from engine.models.presets import PRESETS
from engine.tasks import Probe
from loaders.config import Config
from tests import tiny
from tests.golden import GOLDENS

CEILINGS = ["--bandwidth", "1e10", "--flops", "1e12"]
MODEL = ["--model", str(GOLDENS / "gemma3-text" / "checkpoint")]
CPU = open_lane("cpu", "auto")


def spec_of(family, **fields):
    return describe(Config(tiny.flat(family, **fields)))


def core_of(spec, *texts, lane=CPU, n_steps=4, max_batch_tokens=64, report=None):
    needs = [Needs(parse_case(text), n_steps, spec.max_positions, max_batch_tokens) for text in texts]
    return open_core("tiny", spec, needs, lane, RandomCheckpoint(spec, 3), report or Report(), {}, 3)


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


# --- seats

@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_a_seated_sequence_holds_the_pages_of_one_that_was_computed(family):
    core, _ = core_of(spec_of(family), "decode=2*1@60", "prefill=60")
    with seated(core, [(1, 1, 60)], np.random.default_rng(0)) as (sequence,):
        held = [(pages.first, len(pages.pages)) for pages in sequence.page_lists]
    probe = Probe(59, 58, core.spec, False)
    computed = core.loop.submit(list(range(3, 62)), probe)
    core.scheduler.commit(core.scheduler.next_batch())
    assert computed.n_cached == 59
    assert held == [(pages.first, len(pages.pages)) for pages in computed.page_lists]


def test_seats_are_free_again():
    core, _ = core_of(spec_of("gemma4"), "mix=2*1@40,9@30")
    free = [pages.n_free for pages in core.kv_cache.allocators]
    with seated(core, parse_case("mix=2*1@40,9@30").rows, np.random.default_rng(0)) as sequences:
        assert [sequence.n_left for sequence in sequences] == [1, 1, 9]
        step_of(core, sequences, False)()
        assert [pages.n_free for pages in core.kv_cache.allocators] != free
    assert [pages.n_free for pages in core.kv_cache.allocators] == free and not core.scheduler.running


def test_a_core_has_room_for_each_case_at_its_time():
    """Many short sequences and few long ones share pools whose sizes the memory plan chooses."""
    texts = "decode=40*1@8", "decode=3*1@120", "prefill=100", "mix=64,8*1@50"
    core, needs = core_of(spec_of("gemma3"), *texts, max_batch_tokens=128)
    assert [str(need.case) for need in needs] == [str(parse_case(text)) for text in texts]
    for need in needs:
        with seated(core, need.case.rows, np.random.default_rng(0)) as sequences:
            step_of(core, sequences, False)
    plan = core.plan
    assert plan.kv_bytes <= 2.5 * sum(                              # and little more
        max(need.pages(pool.spec, 16) for need in needs) * pool.page_bytes for pool in plan.pools)


def test_what_has_no_room_is_skipped():
    spec, report = spec_of("gemma3", max_position_embeddings=1 << 20), Report()
    lane = mock.Mock(wraps=CPU, memory_bytes=lambda: 4 << 20, dtype=CPU.dtype)
    lane.name = "cpu"
    needs = [Needs(parse_case(text), 4, spec.max_positions, 64) for text in ("decode=1*1@100", "decode=9*1@90000")]
    assert config_of(spec, needs[:1], lane, {}).max_seq_len == 104
    with mock.patch("measure.step.seats.Core.open"), mock.patch("measure.step.seats.fill_cache"):
        _, left = open_core("big", spec, needs, lane, None, report, {}, 0)
    assert left == needs[:1] and [skipped["what"] for skipped in report.skipped] == ["big: decode=9*1@90000"]
    assert "cannot hold" in report.skipped[0]["why"]


def test_verify_samples_what_each_position_says():
    core, _ = core_of(spec_of("gemma4", tie_word_embeddings=False), "verify=2*9")
    with seated(core, [(2, 9, 9)], np.random.default_rng(5)) as sequences:
        batch = step_of(core, sequences, True)()
        tokens = [token for token, _ in core.step.run(batch).slots]
        ids = [sequence.tokens for sequence in sequences]
    probes = [Probe(9, 0, core.spec, False) for _ in ids]
    for row, probe in zip(ids, probes, strict=True):
        core.loop.submit(row, probe)
    core.loop.step()
    assert tokens == [int(token) for probe in probes for token in probe.logits.argmax(axis=1)]


# --- the ops of a step

def op(name, role="", kind="", sizes=(), cost=None, n_rows=1):
    return Op(name, role, kind, sizes, n_rows, cost or Cost(), None)


def test_equal_ops_are_one_group_and_kinds_are_named_where_they_differ():
    ops = [op("linear", "qkv", "local", (1,)), op("attention", "decode", "local", (5,), Cost(10, 1, 7)),
           op("add_norm"), op("linear", "qkv", "global", (1,)), op("attention", "decode", "global", (9,)),
           op("add_norm"), op("linear", "qkv", "local", (1,)), op("attention", "decode", "local", (5,), Cost(10, 1, 7)),
           op("linear", "head", "", (2,))]
    groups = grouped(ops)
    assert [(group.name, group.order, len(group.ops)) for group in groups] == [
        ("linear qkv", 0, 3), ("attention decode local", 1, 2), ("add_norm", 2, 2), ("attention decode global", 4, 1),
        ("linear head", 8, 1)]
    assert groups[1].cost == Cost(20, 2, 14)
    of_two_kinds = [op("linear", "qkv", kind, sizes) for kind, sizes in (
        ("local", (1,)), ("global", (1,)), ("chunked", (2,)))]
    assert [group.name for group in grouped(of_two_kinds)] == ["linear qkv", "linear qkv chunked"]


def test_a_group_costs_launch_by_launch():
    """A roof is of each launch by itself: what is bound by memory does not make up for what is bound by arithmetic."""
    found, = grouped([op("linear", cost=Cost(10, 5, 20)), op("linear", cost=Cost(10, 5, 20))])
    ceilings = SimpleNamespace(bytes_per_s=1, flops_per_s=1)
    assert found.roof_s(ceilings) == 40 and found.traffic_s(ceilings) == 40
    ceilings.flops_per_s = 100
    assert found.roof_s(ceilings) == 20 and found.traffic_s(ceilings) == 30


def test_parts_add_up_to_the_wall_time():
    parts = attribution(wall_s=16.0, launches_s=11.5, kernels_s=9.25, traffic_s=6.5, floor_s=6.0)
    assert parts == {"floor": 6.0, "extra bytes": 0.5, "below roof": 2.75, "gaps": 2.25, "host": 4.5}
    assert sum(parts.values()) == 16.0 and list(parts) == list(PARTS)
    parts = attribution(wall_s=1.0, launches_s=1.5, kernels_s=1.75, traffic_s=0.5, floor_s=0.75)
    assert sum(parts.values()) == 1.0 and parts["gaps"] == -0.25


@pytest.mark.parametrize("family", ["gemma4", "gemma4-moe", "gemma4-e", "llama4"])
@pytest.mark.parametrize("text, n_kept, phase", [
    ("decode=3*1@40", None, "decode"), ("mix=20,3*1@40", 4, "mixed"), ("mix=3*1@40,20", 4, "mixed"),
    ("verify=2*4@30", None, "mixed"), ("prefill=2*1", None, "prefill"), ("prefill=2*9", 2, "prefill")])
def test_recorded_ops_are_the_steps_and_cost_at_least_the_floor(family, text, n_kept, phase):
    spec, case = spec_of(family), parse_case(text)
    core, (need,) = core_of(spec, text)
    with seated(core, case.rows, np.random.default_rng(0)) as sequences:
        batch = step_of(core, sequences, case.label == "verify")()
        before = core.step.ops, core.step.layers.ops, core.step.graphs
        with recording(core) as calls:
            expected = core.step.run(batch).slots
        assert (core.step.ops, core.step.layers.ops, core.step.graphs) == before
        ops = ops_of(calls, core, batch)
        logits = core.workspace.rows("logits", need.n_logits, spec.vocab)
        logits[...] = 0
        for one in ops:
            one.launch()
        np.testing.assert_array_equal(logits.argmax(axis=1), [token for token, _ in expected])
    assert len(ops) == len(calls) and (batch.kept is None) == (n_kept is None)
    names = Counter(one.name for one in ops)
    assert (names["attention"], names["gated_linear"], names["sample"]) == (6, 6, 1)
    n_dropping = 1 if spec.first_shared is None else len(spec.layers) - spec.first_shared
    assert [one.n_rows for one in ops if one.role.endswith("kept") and one.name == "gated_linear"] == [
        n_kept] * n_dropping * bool(n_kept)
    n_full = len(spec.layers) - n_dropping * bool(n_kept)
    assert [one.role for one in ops if one.name == "attention"] == [phase] * n_full + (
        ["decode kept"] * n_dropping if n_kept else [])
    attended = sum((one.cost.flops for one in ops if one.name == "attention"), 0)
    kept = [(n_seqs, 1, context) for n_seqs, _, context in case.rows] if n_kept else case.rows
    assert attended == sum(floor_parts(replace(spec, layers=layers), rows)["attention"].flops for layers, rows in (
        (spec.layers[:n_full], case.rows), (spec.layers[n_full:], kept)))
    if family == "gemma4":
        assert {one.name for one in ops if one.role.endswith("kept")} == (
            {"attention", "linear", "add_norm", "gated_linear"} if n_kept else set())
        n_rows = {(one.name, one.n_rows) for one in ops if one.name in ("embed", "select_rows")}
        assert n_rows == {("embed", case.n_tokens), ("select_rows", need.n_logits)}
    total = sum((one.cost for one in ops), Cost())
    least = floor(spec, need.rows(), weight_bytes=4, kv_bytes=4)
    assert total.bytes > least.bytes
    if n_kept is None:                                              # else layers drop rows that a floor has
        assert total.flops == least.flops


def groups_of(spec, text):
    core, _ = core_of(spec, text)
    case = parse_case(text)
    with seated(core, case.rows, np.random.default_rng(0)) as sequences:
        batch = step_of(core, sequences, False)()
        with recording(core) as calls:
            core.step.run(batch)
        return {group.name: group for group in grouped(ops_of(calls, core, batch))}


@pytest.mark.parametrize("family, launches", [
    ("gemma4-moe", {"linear router": 6, "router_norm": 6, "moe_route": 6, "moe_gated_linear": 6, "moe_linear down": 6,
                    "moe_combine": 6, "add_norms": 6, "gated_linear": 6, "linear down": 6}),
    ("gemma4-e", {"embed per layer": 1, "linear per-layer context": 1, "mix_per_layer": 1, "linear per-layer gate": 6,
                  "gate_per_layer": 6, "linear per-layer out": 6, "gated_linear": 3, "gated_linear wide": 3,
                  "linear down wide": 3, "linear q local": 2, "linear q global": 1, "qk_norm_rope_cache q local": 2}),
    ("llama4", {"linear router": 3, "scale_rows": 3, "moe_gated_linear": 3, "moe_linear down": 3, "gated_linear": 3,
                "gated_linear shared expert": 3, "linear down shared expert": 3, "attention_temperature": 1,
                "attention decode chunked": 4 + 1, "qk_norm_rope_cache global": 1})])
def test_ops_of_other_families_by_name(family, launches):
    groups = groups_of(spec_of(family), "decode=3*1@40")
    assert {name: len(groups[name].ops) if name in groups else 0 for name in launches} == launches


def test_products_by_expert_keep_the_routes_of_their_layer():
    """A prompt's last layer computes one row: its few experts are not those of the layers before."""
    spec = spec_of("gemma4-moe")
    groups = groups_of(spec, "prefill=24")
    n_pairs = 24 * spec.layers[0].moe.experts_per_token
    for op in groups["moe_gated_linear"].ops:
        routes = op.launch.args[2]
        assert routes.begins[-1] == n_pairs and op.cost.flops == 2 * n_pairs * 32 * 2 * 12
    assert groups["moe_gated_linear kept"].ops[0].launch.args[2].begins[-1] == n_pairs // 24


def test_layers_of_pools_that_differ_in_size_alone_are_one_group():
    core, _ = core_of(spec_of("gemma3"), "decode=3*1@60")
    assert len({len(pages) for pages in core.kv_cache.k}) == 2
    with seated(core, [(3, 1, 60)], np.random.default_rng(0)) as sequences:
        batch = step_of(core, sequences, False)()
        with recording(core) as calls:
            core.step.run(batch)
    names = [group.name for group in grouped(ops_of(calls, core, batch))]
    assert names.count("qk_norm_rope_cache") == 1 and "attention decode global" in names


def test_kinds_of_attention_by_name():
    attention = spec_of("gemma4").layers[-1].attention
    assert [kind_of(replace(attention, window=window, chunk=chunk)) for window, chunk in (
        (None, None), (8, None), (None, 8))] == ["global", "local", "chunked"]


# --- whole runs

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
    assert "bench: engine: everything was skipped" in capsys.readouterr().err


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
