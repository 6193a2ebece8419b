"""tools/bench.py: its arguments, checkpoints, arithmetic, tables and JSON; no figure here is a measured one."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import bench
import bench_checkpoints
import bench_engine
import bench_report
from bench_checkpoints import SHAPES, Shape
from bench_report import Row, Samples

TESTS = Path(__file__).resolve().parent
MINI = Shape("mini", hidden=16, layers=7, heads=2, kv_heads=1, head_dim=8, intermediate=24, vocab=32,
             window=4, pattern=3)


# --- checkpoints

def test_270m_has_the_published_size():
    assert SHAPES["270m"].weight_bytes() == 4 * 268_098_176        # as published
    norms = 18 * (4 * 640 + 2 * 256) + 640
    assert SHAPES["270m"].token_bytes() == 4 * (268_098_176 - norms)


def test_kv_bytes_keep_one_window_in_sliding_layers():
    one = 2 * 1 * 8 * 4                                             # k and v, one head of 8, float32
    assert MINI.kv_bytes(3) == 7 * 3 * one
    assert MINI.kv_bytes(10) == (2 * 10 + 5 * 4) * one              # layers 2 and 5 are global


def test_config_has_the_keys_of_a_released_file():
    released = json.loads((TESTS / "goldens/gemma3-text/checkpoint/config.json").read_text())
    assert set(MINI.config()) == set(released) - {"initializer_range", "transformers_version"}


def test_written_checkpoint_holds_every_tensor_in_bfloat16(tmp_path):
    bench_checkpoints.write_checkpoint(MINI, tmp_path, seed=3)
    released = load_file(TESTS / "goldens/gemma3-text/checkpoint/model.safetensors")
    weights = load_file(tmp_path / "model.safetensors")
    assert set(weights) == set(released)                            # seven layers there too
    assert {name: value.shape for name, value in weights.items()} == MINI.tensors()
    assert {value.dtype for value in weights.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [1, 106]


def test_weights_depend_on_the_seed_alone():
    first, again, other = (bench_checkpoints.random_weights(MINI, seed) for seed in (3, 3, 4))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not any(np.array_equal(first[name], other[name]) for name in first)
    embedding = first["model.embed_tokens.weight"].astype(np.float32)
    assert embedding.std() * 16 ** 0.5 == pytest.approx(1, abs=0.1)


def test_a_checkpoint_is_reused_only_when_it_is_whole_and_this_shape(tmp_path):
    assert not bench_checkpoints.is_written(MINI, tmp_path / "nowhere")
    bench_checkpoints.write_checkpoint(MINI, tmp_path)
    assert bench_checkpoints.is_written(MINI, tmp_path)
    assert not bench_checkpoints.is_written(SHAPES["tiny"], tmp_path)
    (tmp_path / "config.json").unlink()                             # as an interrupted write leaves it
    assert not bench_checkpoints.is_written(MINI, tmp_path)


# --- arguments

def test_engine_arguments():
    args = bench.build_parser().parse_args(
        ["engine", "--against", "transformers", "--shapes", "small,tiny", "--batch", "1,4", "--json", "out.json",
         "--metadata", "place=desk", "--metadata", "note=a=b"])
    assert (args.run, args.device, args.against) == (bench_engine.run, "cpu", "transformers")
    assert (args.shapes, args.batch, args.json) == (["small", "tiny"], [1, 4], Path("out.json"))
    assert dict(args.metadata) == {"place": "desk", "note": "a=b"}
    assert (args.repeats, args.prefill, args.decode, args.threads) == (5, 512, 64, 2)


@pytest.mark.parametrize("arguments, message", [
    (["engine", "--shapes", "tiny,huge"], "unknown shape 'huge', expected some of tiny,small,270m"),
    (["engine", "--decode", "1"], "'1' is not a whole number >= 2"),
    (["engine", "--batch", "1,0"], "'0' is not a whole number >= 1"),
    (["engine", "--metadata", "desk"], "'desk' is not key=value"),
    (["engine", "--device", "tpu"], "invalid choice: 'tpu'"),
    ([], "command"),
])
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench.build_parser().parse_args(arguments)
    assert message in capsys.readouterr().err


# --- arithmetic

def test_ratio_is_of_medians_and_pairs_are_of_turns():
    row = Row("tiny", "decode, batch 1", "ms/step", ours=(1.0, 2.0, 4.0), theirs=(9.0, 8.0, 8.0))
    assert row.ratio == 4.0
    assert row.pairs == [9.0, 4.0, 2.0]
    assert (row.best(row.ours), row.best(row.theirs), row.best_ratio) == (1.0, 8.0, 8.0)


def test_where_higher_is_better_the_ratio_turns_round():
    row = Row("270m", "of the GEMV rate", "%", ours=(80.0, 90.0, 100.0), theirs=(45.0, 45.0, 50.0), better="higher")
    assert row.ratio == 2.0
    assert row.best(row.ours) == 100.0
    assert row.best_ratio == 2.0


@pytest.mark.parametrize("shape, measure, ours, theirs, goal, is_met", [
    ("tiny", "decode, batch 1", 1.0, 4.0, "ratio >= 4", True),
    ("small", "decode, batch 1", 1.0, 2.4, "ratio >= 2.5", False),
    ("270m", "decode, batch 1", 1.0, 1.3, "ratio >= 1.2", True),
    ("tiny", "prefill", 1.0, 0.9, "ratio >= 1", False),
    ("tiny", "prefill", 1.0, None, "", None),
    ("tiny", "import", 0.3, None, "<= 0.3 s", True),
    ("tiny", "import", 0.31, 9.0, "<= 0.3 s", False),
    ("270m", "peak over weights + KV", 1.2, None, "<= 1.15 s", False),
    ("tiny", "peak over weights + KV", 90.0, None, "", None),
    ("270m", "of the GEMV rate", 86.0, None, ">= 85 s", True),
    ("tiny", "import to first token", 1.0, 2.0, "", None),
])
def test_goals(shape, measure, ours, theirs, goal, is_met):
    row = Row(shape, measure, "s", (ours,), (theirs,) if theirs else ())
    assert row.goal == (goal, is_met)


def test_agreement_counts_leading_tokens():
    assert bench_engine.agreement([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 0, 6]]) == [3, 1]


def test_prompts_are_new_each_repeat_and_the_same_each_run():
    first, again, other = (bench_engine.random_prompts(MINI, 3, 20, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert [len(prompt) for prompt in first] == [20, 20, 20]
    assert {token for prompt in first for token in prompt} <= set(range(3, 32))


# --- tables

@pytest.mark.parametrize("value, text",
                         [(0, "0"), (0.01234, "0.0123"), (1.2345, "1.23"), (41.87, "41.9"), (1234.5, "1234")])
def test_numbers_have_three_digits_and_no_exponent(value, text):
    assert bench_report.number(value) == text


def test_table_lines_up():
    assert bench_report.table([["name", "s"], ["a", "1.25"], ["longer", ""]]) == "name       s\na       1.25\nlonger"


def test_rows_carry_units_and_shares():
    samples = Samples()
    for name in ("import", "load, fresh process", "load, again", "import to first token", "prefill"):
        samples.add(name, "rawgem", 0.5)
    for name in ("memory after import", "peak memory"):
        samples.add(name, "rawgem", 3e6)
    samples.add("decode, batch 1", "rawgem", 0.002)
    samples.add("gemv", "gemv", 1e9)
    samples.add("gemv", "gemv", 2e9)
    samples.add("gemv, square", "gemv", 4e9)
    facts = {"token_bytes": 1_000_000, "floor_bytes": 2_000_000}
    rows = bench_report.rows_of(SHAPES["tiny"], samples, ["rawgem"], facts, Namespace(batch=[1]))
    values = {row.measure: (row.ours[0], row.unit) for row in rows}
    assert values["import"] == (0.5, "s")
    assert values["prefill"] == (500, "ms")
    assert values["decode, batch 1"] == (2, "ms/step")
    assert values["of the GEMV rate"] == (pytest.approx(25), "%")               # 1 MB in 2 ms, of the best, 2 GB/s
    assert values["of square GEMV's rate"] == (pytest.approx(12.5), "%")
    assert values["peak memory"] == (3, "MB")
    assert values["peak over weights + KV"] == (1.5, "x")


@pytest.mark.parametrize("load, is_said", [(0.2, False), (2.2, True)])
def test_a_busy_machine_is_said(load, is_said):
    settings = {"threads": 2, "repeats": 5, "prefill": 512, "decode": 64, "against": None}
    document = {"command": "c", "commit": None, "date": "d", "machine": bench_report.machine(), "versions": {},
                "settings": settings, "metadata": {}, "load_average": [load, 3.0]}
    assert ("other work was running" in bench_report.header_text(document)) == is_said


def test_commit_is_none_outside_git(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_report, "ROOT", tmp_path)
    assert bench_report.commit() is None


# --- the run

class StandIn:
    """Answers like a worker: rawgem takes 1 ms a token, transformers 5; in a batch, the last row parts at token 9."""

    def __init__(self, side, options):
        self.side, self.scale = side, {"rawgem": 0.001, "transformers": 0.005}.get(side)
        self.hello = {"import_s": 100 * self.scale if self.scale else 0, "import_bytes": 1e7, "versions": {side: "1.0"}}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def ask(self, do, prompts=(), n_tokens=0, path=None, matrices=()):
        if do == "generate":
            rows = [[7] * n_tokens for _ in prompts]
            if self.side == "transformers" and n_tokens > 8 and len(rows) > 1:
                rows[-1][8] = 6
            return {"seconds": self.scale * (len(prompts[0]) + n_tokens), "token_ids": rows}
        return {"load": {"seconds": self.scale}, "peak": {"bytes": 5e7}, "gemv": {"bytes_per_s": 2e10}}[do]


def test_run_prints_a_table_and_writes_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_engine, "Worker", StandIn)
    command = ["engine", "--against", "transformers", "--shapes", "tiny", "--repeats", "3", "--batch", "1,8",
               "--cache", str(tmp_path / "cache"), "--json", str(tmp_path / "out.json"), "--metadata", "note=stand-in"]
    bench.main(command)
    text = capsys.readouterr().out
    document = json.loads((tmp_path / "out.json").read_text())
    rows = {row["measure"]: row for row in document["shapes"]["tiny"]["rows"]}
    decode = rows["decode, batch 1"]
    assert decode["ours"]["median"] == pytest.approx(1.0)          # (80 - 17) ms over 63 tokens
    assert decode["ratio"] == pytest.approx(5.0)
    assert decode["pairs"] == pytest.approx([5.0, 5.0, 5.0])
    assert (decode["goal"], decode["is_met"]) == ("ratio >= 4", True)
    assert document["shapes"]["tiny"]["agree"] == {"1": [16], "8": [16] * 7 + [8]}
    assert document["settings"]["batch"] == [1, 8]
    assert document["metadata"] == {"note": "stand-in"}
    assert document["versions"]["transformers"] == "1.0"
    assert {"cpu", "cores", "memory_bytes", "system"} <= set(document["machine"])
    line = next(line for line in text.splitlines() if line.startswith("decode, batch 1"))
    assert " ".join(line.split()) == "decode, batch 1 ms/step 1.00 1.00 5.00 5.00 5.00 5.00 5.00-5.00 ratio >= 4 pass"
    assert "command: python tools/bench.py engine --against transformers" in text
    assert "note: stand-in" in text


def test_run_alone_has_no_other_side(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_engine, "Worker", StandIn)
    bench.main(["engine", "--shapes", "tiny", "--repeats", "1", "--cache", str(tmp_path)])
    text = capsys.readouterr().out
    assert "transformers" not in text and "ratio" not in text
    assert "import" in text and "<= 0.3 s" in text


# --- the worker, over its real pipe

def test_a_worker_answers_fails_loudly_and_ends():
    with bench_engine.Worker("gemv", {"threads": 1}) as worker:
        assert worker.hello["versions"] == {"numpy": np.__version__}
        assert worker.hello["import_bytes"] > 1e6
        assert worker.ask("gemv", matrices=[[64, 32], [32, 64]])["bytes_per_s"] > 0
        with pytest.raises(bench_engine.BenchError, match=r"(?s)the gemv worker failed.*no_such_request"):
            worker.ask("no_such_request")
        with pytest.raises(bench_engine.BenchError, match="the gemv worker ended"):
            worker.ask("peak")
    assert worker.process.returncode is not None
