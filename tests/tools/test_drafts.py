"""Drafts in the bench: shapes of released ones, break-evens by count and by the clock, texts that must be the same."""

import itertools
import json
from types import SimpleNamespace
from unittest import mock

import bench
import numpy as np
import pytest
from measure import serve
from measure.cases import parse_case
from measure.drafts import DraftTimes, chances, draft_counts, drafting_cost, times_by_count
from measure.random_weights import RandomCheckpoint, RandomDraft
from measure.report import BenchError, Report, load_document, rows_of
from measure.step import drafted_case, engine_case
from measure.step.seats import Needs, open_core, seated, step_of
from measure.step.timeline import grouped, ops_of, recording

from engine.assistant_weights import load_assistant, n_weights
from engine.backend import open_lane
from engine.cost import Ceilings, Cost, break_even, draft_step, floor, speculation_ceiling
from engine.errors import ConfigError
from engine.models import describe
from engine.models.gemma4_assistant import describe_assistant
from engine.models.presets import DRAFTS, PRESETS, draft_preset, preset
from engine.speculative import Speculation
from engine.step import Step
from loaders.config import Config
from tests import tiny
from tests.golden import GOLDENS
from tests.test_assistant_spec import RELEASED

H200 = Ceilings(4.3e12, 790e12, "given")
GIVEN = ["--bandwidth", "1e10", "--flops", "1e12"]
CPU = open_lane("cpu", "auto")
PAIR = ["--model", str(GOLDENS / "gemma4-assistant/checkpoint"), "--draft", str(GOLDENS / "gemma4-assistant/assistant")]


@pytest.fixture
def run(tmp_path):
    """run(*argv) -> (status, document, rows) of bench.py, with presets "tiny", which has a draft, and "alone"."""
    def run(*argv):
        path = tmp_path / "out.json"
        with mock.patch.dict(PRESETS, {"tiny": tiny.flat("gemma4"), "alone": tiny.flat("gemma3")}), \
                mock.patch.dict(DRAFTS, {"tiny": tiny.draft("gemma4")}):
            status = bench.main([*argv, "--json", str(path)])
        document = load_document(path) if path.exists() else None
        return status, document, rows_of(document) if document else []
    return run


def tiny_pair(family="gemma4", **fields):
    target = describe(Config(tiny.flat(family)))
    return target, describe_assistant(Config({**tiny.draft(family), **fields}), target)


# --- shapes, and what is counted

@pytest.mark.parametrize("name", DRAFTS)
def test_drafts_of_presets_are_the_released_ones(name):
    spec, n_published = draft_preset(name), RELEASED[name][-1]
    assert spec == describe_assistant(Config(RELEASED[name][0]), preset(name))
    assert n_weights(spec) == pytest.approx(n_published, rel=0.01)


def test_a_preset_without_a_draft_is_said():
    with pytest.raises(ConfigError, match="no draft model of 'gemma-3-1b' is known, expected one of gemma-4-e2b, "):
        draft_preset("gemma-3-1b")


@pytest.mark.parametrize("n_drafts, slowdown, chance", [
    (1, 1.5, 0.5), (2, 1.75, 0.5), (4, 5, 1), (4, 1, 0), (3, 0.5, 0)])
def test_the_break_even(n_drafts, slowdown, chance):
    assert break_even(n_drafts, slowdown) == pytest.approx(chance, abs=1e-9)
    assert break_even(n_drafts, n_drafts + 1.001) is None


def test_at_the_break_even_nothing_is_gained():
    for name, n_seqs, n in itertools.product(("gemma-4-31b", "gemma-4-26b-a4b", "gemma-4-e4b"), (1, 64), (1, 4, 16)):
        times = times_by_count(preset(name), draft_preset(name), [(n_seqs, 1, 1024)], n, H200)
        assert times.gain(break_even(n, times.slowdown)) == pytest.approx(1)
        assert times.gain(0.7) == pytest.approx(speculation_ceiling(
            [0.7 ** (i + 1) for i in range(n)], times.plain_s, times.check_s, times.draft_s / n))


def test_times_by_count_are_floors_and_gaps():
    spec, draft, rows = preset("gemma-4-31b"), draft_preset("gemma-4-31b"), [(8, 1, 4096)]
    times = times_by_count(spec, draft, rows, 3, H200, (0.5, 1, 2))
    assert times.plain_s == floor(spec, [(8, 1, 4096)], 0.5, 1).time_s(H200)
    assert times.check_s == floor(spec, [(8, 4, 4099, 4)], 0.5, 1).time_s(H200)
    assert times.draft_s == pytest.approx(3 * draft_step(draft, 8, 4096, 2, 1).time_s(H200))
    with_gaps = times_by_count(spec, draft, rows, 3, H200, (0.5, 1, 2), 1e-6)
    assert with_gaps.plain_s - times.plain_s == pytest.approx(9 * 61e-6)
    assert with_gaps.check_s - times.check_s == pytest.approx(9 * 61e-6)
    assert with_gaps.draft_s - times.draft_s == pytest.approx(3 * 9 * 5e-6)


def test_a_draft_of_31b_takes_about_the_time_of_its_published_bytes():
    assert draft_step(draft_preset("gemma-4-31b"), 1, 1).time_s(H200) == pytest.approx(940e6 / 4.3e12, rel=0.02)


def test_drafting_of_unlike_contexts():
    """The weights once a round, the keys of each."""
    _, draft = tiny_pair()
    assert drafting_cost(draft, [(2, 40), (3, 9)], 0) == Cost()
    one = draft_step(draft, 5, 40)
    assert drafting_cost(draft, [(2, 40), (3, 40)], 1) == one
    assert drafting_cost(draft, [(5, 40)], 4).bytes == 4 * one.bytes
    mixed = drafting_cost(draft, [(2, 40), (3, 9)], 1)
    n_keys = 40 - 9                                         # which one layer of three sees
    kv_width, q_width = (getattr(draft.layers[2].attention, name) for name in ("kv_width", "q_width"))
    assert mixed.bytes == one.bytes - 3 * n_keys * 2 * kv_width * 2
    assert mixed.flops == one.flops - 3 * n_keys * 4 * q_width


def test_floors_say_what_drafting_does(run):
    status, document, rows = run(
        "floors", "--preset", "gemma-4-26b-a4b,gemma-3-1b", "--case", "decode={1,64}*1@1024", "--case", "prefill=2048",
        "--n-draft-tokens", "1,4", "--acceptance", "0,0.75", "--bandwidth", "4.3e12", "--flops", "790e12",
        "--launch-gap", "1e-6")
    found = {(row.shape["case"], row.shape["n_draft_tokens"]): row for row in rows if "n_draft_tokens" in row.shape}
    assert status == 0 and list(found) == [("decode=1@1024", 1), ("decode=1@1024", 4), ("decode=64*1@1024", 1),
                                           ("decode=64*1@1024", 4)]
    times = times_by_count(preset("gemma-4-26b-a4b"), draft_preset("gemma-4-26b-a4b"), [(1, 1, 1024)], 4, H200,
                           gap_s=1e-6)
    stats = {name: stat.median for name, stat in found["decode=1@1024", 4].stats.items()}
    assert stats == pytest.approx({
        "plain": times.plain_s, "check": times.check_s, "draft": times.draft_s, "break-even tokens": times.slowdown,
        "break-even": 100 * break_even(4, times.slowdown), "gain at 0": 1 / times.slowdown,
        "gain at 0.75": times.gain(0.75)})
    assert document["skipped"] == [{"what": "gemma-3-1b: drafts", "why": "no draft model of it is known, only of "
                                    + ", ".join([*DRAFTS, "tiny"])}]


def test_where_no_acceptance_pays_it_is_said(run):
    """Where arithmetic bounds a step, each row that is checked costs its share."""
    _, _, rows = run("floors", "--preset", "gemma-4-31b", "--case", "decode=64*1@64", "--n-draft-tokens", "4",
                     "--bandwidth", "1e12", "--flops", "1e12")
    assert rows[-1].notes == ("drafting 4 tokens loses even if all of them hold",)
    assert "break-even" not in rows[-1].stats and rows[-1].stats["break-even tokens"].median > 5
    assert rows[-1].stats["gain at 1"].median < 1


@pytest.mark.parametrize("parse, text, message", [
    (draft_counts, "2,17", "'17' drafted tokens, expected 1 to 16, or auto"), (draft_counts, "0", "'0' drafted tokens"),
    (draft_counts, "", "'' drafted"), (draft_counts, "two", "'two' drafted"),
    (chances, "0.5,1.1", "'1.1' is no chance"),
    (chances, "often", "'often' is no chance"), (chances, "nan", "'nan' is no chance")])
def test_bad_numbers_are_named(parse, text, message):
    with pytest.raises(BenchError, match=message):
        parse(text)
    assert draft_counts("1,auto,16") == [1, "auto", 16] and chances("0,0.5,1") == [0, 0.5, 1]


# --- random weights of a draft

@pytest.mark.parametrize("is_ordered", [True, False])
def test_a_random_draft_is_a_checkpoint(is_ordered):
    _, spec = tiny_pair(use_ordered_embeddings=is_ordered)
    one, again, other = (load_assistant(spec, RandomDraft(spec, seed), CPU, lambda n_bytes: None) for seed in (0, 0, 1))
    assert np.array_equal(one.head, again.head) and not np.array_equal(one.head, other.head)
    assert one.head.std() == pytest.approx(spec.hidden ** -0.5, rel=0.1)
    assert one.norm.mean() == pytest.approx(1, abs=0.15) and one.norm.std() > 0
    assert one.layers[0].layer_scalar.tolist() == [1]
    assert (one.ordering is None) != is_ordered
    if is_ordered:
        assert sorted(one.ordering.ravel().tolist()) == list(range(spec.vocab))


# --- the step that checks drafts and drafts anew

@pytest.mark.parametrize("family", ["gemma4", "gemma4-moe", "gemma4-e"])
def test_a_verify_case_with_a_draft_is_the_engines_own_step(family):
    spec, draft = tiny_pair(family)
    case = parse_case("verify=3*4@30")
    options = {"draft": "random weights", "n_draft_tokens": 3}
    core, (need,) = open_core("tiny", spec, [Needs(case, 4, spec.max_positions, 64, 3)], CPU, RandomCheckpoint(spec, 3),
                              Report(), options, 3, (draft, RandomDraft(draft, 3)))
    with seated(core, case.rows, np.random.default_rng(0)) as sequences:
        batch = step_of(core, sequences, True)()
        assert batch.is_decode and batch.n_wanted == (3, 3, 3) and batch.n_tokens == 12
        with recording(core) as calls:
            sampled = core.step.run(batch)
        contexts = [sequence.n_cached + 1 + n for sequence, n in zip(sequences, sampled.n_accepted, strict=True)]
        ops = ops_of(calls, core, batch)
        free = [pages.n_free for pages in core.kv_cache.allocators]
    assert [len(drafts) for drafts in sampled.drafts] == [3, 3, 3] and len(ops) == len(calls)
    assert [pages.n_free for pages in core.kv_cache.allocators] > free and not core.scheduler.running
    own = [op for op in ops if not op.role.startswith("draft")]
    assert {"accept_drafts", "sample", "select_rows"} <= {op.name for op in own}
    drafting = [op for op in ops if op.role.startswith("draft")]
    names = {group.name for group in grouped(drafting)}
    assert {"linear draft in", "linear draft out", "linear draft q local", "linear draft q global",
            "gated_linear draft", "linear draft centroids", "attention draft local", "attention draft global",
            "candidate_argmax draft"} <= names
    least = drafting_cost(draft, [(1, context) for context in contexts], 3, 4, 4)
    last_out = 2 * 3 * draft.hidden * draft.backbone        # a floor projects the last token's state too
    assert sum(op.cost.flops for op in drafting) == least.flops - last_out
    assert sum(op.cost.flops for op in own) == floor(spec, need.rows(), 4, 4).flops
    assert sum(op.cost.bytes for op in drafting) > least.bytes - 4 * draft.hidden * draft.backbone


def test_it_is_a_graph_on_a_gpu(run, gpu, monkeypatch):
    monkeypatch.setattr(engine_case, "GPU_LAUNCHES", 2)
    status, _, rows = run("engine", *PAIR, "--lane", "cuda", "-r", "2", "--steps", "2", "--no-ops", "--n-draft-tokens",
                          "2", "--acceptance", "1", "--case", "verify=2*3@20", "--case", "decode=2*1@20", *GIVEN)
    assert status == 0 and gpu.counts["replays"] > 10
    assert not [note for row in rows for note in row.notes
                if "eager" in note or "one by one" in note or "graph" in note]
    found = {(row.name, row.shape["case"]): row.stats for row in rows}
    assert found["step", "verify=2*3@20"]["tokens"].median == 6
    assert found["drafts", "decode=2*1@20"]["tokens a check"].median == 3


# --- decoding with drafts beside decoding without

def by_way(rows):
    return {(row.shape["n_draft_tokens"], row.shape["acceptance"]): row
            for row in rows if "n_draft_tokens" in row.shape}


def test_turns_with_and_without_drafts(run, monkeypatch):
    """The clock goes on by a second each time it is read: every step takes one."""
    monkeypatch.setattr(drafted_case, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    status, document, rows = run("engine", *PAIR, "--lane", "cpu", "-r", "3", "--steps", "8", "--no-ops",
                                 "--n-draft-tokens", "1,3", "--acceptance", "0,1", "--case", "decode=2*1@24", *GIVEN)
    found = by_way(rows)
    assert status == 0 and not document["skipped"]
    assert list(found) == [(0, None), (1, 0), (1, 1), (3, 0), (3, 1)]
    assert [found[way].name for way in found] == ["no drafts", *["drafts"] * 4]
    for (n, chance), row in found.items():
        n_tokens = 1 + n * (chance == 1)                    # of a sequence in a step
        n_steps = 3 * 8 // (1 + n)
        assert (row.stats["steps"].median, row.stats["tokens"].median) == (n_steps, 2 * n_tokens * n_steps)
        assert row.stats["tokens a step"].median == 2 * n_tokens
        assert row.stats["step"].samples == (1, 1, 1) and row.stats["rate"].samples == 3 * (2 * n_tokens,)
        if n:
            assert row.stats["tokens a check"].median == n_tokens and row.stats["speed-up"].median == n_tokens
            assert row.stats["accepted"].median == 100 * chance
            assert row.stats["break-even tokens, measured"].median == 1
            assert row.stats["break-even, measured"].median == pytest.approx(0, abs=1e-9)
            assert row.notes == ("acceptance by place: " + " ".join(["100" if chance else "0"] * n) + " %",)
    model = Config.load(GOLDENS / "gemma4-assistant/checkpoint")
    spec = describe(model)
    draft = describe_assistant(Config.load(GOLDENS / "gemma4-assistant/assistant"), spec)
    times = times_by_count(spec, draft, [(2, 1, 24)], 3, Ceilings(1e10, 1e12, "given"), (4, 4, 4))
    assert found[3, 1].stats["break-even tokens, floors"].median == pytest.approx(times.slowdown)


def test_a_longer_step_moves_the_break_even(run, monkeypatch):
    """Steps that draft take three times as long: of two tokens a check the half is lost."""
    now, go_on = [0.0], Step.run

    def run_slowly(step, batch):
        now[0] += 3.0 if batch.n_drafts else 1.0
        return go_on(step, batch)
    monkeypatch.setattr(Step, "run", run_slowly)
    monkeypatch.setattr(drafted_case, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    _, _, rows = run("engine", *PAIR, "--lane", "cpu", "-r", "2", "--steps", "4", "--no-ops", "--n-draft-tokens", "1,4",
                     "--acceptance", "1", "--case", "decode=1*1@24", *GIVEN)
    found = by_way(rows)
    assert found[1, 1].stats["speed-up"].median == pytest.approx(2 / 3)
    assert found[1, 1].stats["break-even tokens, measured"].median == 3
    assert "break-even, measured" not in found[1, 1].stats
    assert "measured: drafting 1 tokens loses even if all of them hold" in found[1, 1].notes
    assert found[4, 1].stats["speed-up"].median == pytest.approx(5 / 3)
    assert found[4, 1].stats["break-even, measured"].median == pytest.approx(100 * break_even(4, 3.0))


def test_a_draft_of_random_weights_beside_a_preset(run):
    status, document, rows = run("engine", "--preset", "tiny", "--lane", "cpu", "-r", "2", "--steps", "4", "--no-ops",
                                 "--n-draft-tokens", "2,auto", "--case", "decode=2*1@20,1@30", "--case", "verify=1*3@9",
                                 "--case", "verify=1*18@30", "--case", "decode=1*1@100", *GIVEN)
    found = by_way([row for row in rows if row.shape["case"] == "decode=2*1@20,1@30"])
    assert status == 0 and list(found) == [(0, None), (2, None), ("auto", None)]
    assert found[2, None].stats["tokens a check"].median < 2 and "speed-up" in found["auto", None].stats
    assert not any(name.startswith("break-even") for name in found["auto", None].stats)
    why = {one["what"]: one["why"] for one in document["skipped"]}
    assert why.pop("tiny: decode=1@100, drafts").endswith("max_position_embeddings is 128; lower --repeats or --steps")
    assert why == {"tiny: verify=18@30": "17 drafted tokens of a sequence, at most 16 are"}


def test_the_emulated_lane_counts_steps_and_tokens(run):
    status, _, rows = run("engine", *PAIR, "--lane", "emulated", "--no-ops", "--n-draft-tokens", "2", "--acceptance",
                          "1", "--case", "decode=2*1@20", *GIVEN)
    stats = by_way(rows)[2, 1].stats
    assert status == 0 and {stat.unit for stat in stats.values()} == {"1", "%"}
    assert stats["tokens a check"].median == 3 and "break-even, floors" in stats


def accept_all(speculation, states, slot_rows, slots, results, go_on=Speculation.go_on):
    """A fault: whatever was drafted is taken to hold."""
    go_on(speculation, states, slot_rows, slots, results)
    results.n_accepted[...] = np.diff(slots.begin) - 1
    results.tokens[...] = np.where(slots.drafts < 0, results.tokens, slots.drafts)


@pytest.mark.parametrize("command", [["engine", "--case", "decode=2*1@24", "--no-ops", "--steps", "6", *GIVEN],
                                     ["serve", "--rate", "inf", "--requests", "3", "--input", "9", "--output", "8"]])
def test_no_figure_of_another_text(run, monkeypatch, command):
    monkeypatch.setattr(Speculation, "go_on", accept_all)
    _, document, rows = run(*command, *PAIR, "--lane", "cpu", "-r", "1", "--n-draft-tokens", "2")
    said = json.dumps(document["skipped"]) + str(document["incomplete"])
    assert "drafts change the text" in said and not any("n_draft_tokens" in row.shape for row in rows)


# --- serving

def test_serving_with_and_without_drafts(run):
    status, _, rows = run("serve", *PAIR, "--lane", "cpu", "--rate", "100,inf", "--requests", "5", "--input", "9",
                          "--output", "7", "--length-spread", "0.4", "--max-seqs", "3", "-r", "2", "--n-draft-tokens",
                          "2,auto")
    assert status == 0
    assert [(row.shape["rate"], row.shape["n_draft_tokens"]) for row in rows] == list(
        itertools.product((100.0, "inf"), (0, 2, "auto")))
    for row in rows:
        n = row.shape["n_draft_tokens"]
        assert ("tokens a check" in row.stats) == ("accepted" in row.stats) == (n != 0)
        assert all(len(stat.samples) == 2 for stat in row.stats.values())
    assert 1 <= rows[1].stats["tokens a check"].median <= 3


def test_warming_up_captures_graphs_with_drafts(gpu, tmp_path, monkeypatch):
    cores, warm_up = [], serve.warm_up

    def keep(core, args):
        warm_up(core, args)
        cores.append(str(core.graphs))
    monkeypatch.setattr(serve, "warm_up", keep)
    assert bench.main(["serve", "--lane", "cuda", *PAIR, "--requests", "2", "--rate", "inf", "--input", "6", "--output",
                       "4", "--max-seqs", "2", "--max-batch-tokens", "64", "--n-draft-tokens", "2", "--json",
                       str(tmp_path / "serve.json")]) == 0
    assert "with 2 drafts" not in cores[0] and "2 with 2 drafts" in cores[1] and "1 with 2 drafts" in cores[1]


# --- what does not go together

@pytest.mark.parametrize("argv, message", [
    (["--preset", "tiny", *PAIR[2:]], "--draft DIR goes with --model DIR"),
    ([*PAIR[:2], "--n-draft-tokens", "2"], "--n-draft-tokens with --model DIR needs its draft model, --draft DIR"),
    ([*PAIR[:2], "--draft", PAIR[1]], "this is no draft model"),
    (["--model", str(GOLDENS / "gemma4-dense/checkpoint"), *PAIR[2:]], "the draft was made for another target"),
    (["--preset", "tiny", "--layers", "2", "--n-draft-tokens", "2"], "the target has no such layer")])
@pytest.mark.parametrize("command", ["engine", "serve"])
def test_what_cannot_be_drafted_is_said_in_a_line(run, capsys, command, argv, message):
    status, document, rows = run(command, *argv, "--lane", "cpu", *(GIVEN if command == "engine" else ()))
    assert status == 2 and not rows and message in document["incomplete"]


def test_chances_are_of_drafts(run):
    status, document, _ = run("engine", "--preset", "tiny", "--lane", "cpu", "--acceptance", "1", *GIVEN)
    assert status == 2 and "it goes with --n-draft-tokens" in document["incomplete"]
    status, document, _ = run("floors", "--preset", "tiny", "--n-draft-tokens", "auto", *GIVEN)
    assert status == 2 and "expected numbers" in document["incomplete"]


def test_a_preset_without_a_draft_is_measured_without(run):
    status, document, rows = run("engine", "--preset", "alone", "--lane", "cpu", "-r", "1", "--steps", "2", "--no-ops",
                                 "--case", "decode=1*1@9", "--n-draft-tokens", "2", *GIVEN)
    assert status == 0 and {row.name for row in rows} == {"step", "decode"}
    assert document["skipped"][0]["what"] == "alone: drafts"


def test_times_tell_gains():
    times = DraftTimes(2.0, 2.5, 0.5, 2)
    assert times.slowdown == 1.5 and times.gain(1) == 2 and times.gain(0.5) == pytest.approx(1.75 / 1.5)
