"""bench.py against --lane cpu --peer transformers: checkpoints, arithmetic, goals, the run; no figure is measured."""

from argparse import Namespace

import bench
import numpy as np
import pytest
from measure import against
from measure.peer import against_cpu
from measure.peer.against_cpu import Samples
from measure.peer.checkpoints import SHAPES, kv_bytes, matrices, shape, token_bytes, weight_bytes
from measure.report import BenchError, load_document, rows_of

SLIDING, GLOBAL = "sliding_attention", "full_attention"
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 24,
         "vocab_size": 40, "bos_token_id": 2, "eos_token_id": [1], "pad_token_id": 0}
GEMMA4 = {"global_head_dim": 16, "sliding_window": 4, "layer_types": [SLIDING, GLOBAL] * 2, "num_hidden_layers": 4,
          "vocab_size_per_layer_input": 40}
MINI = shape("mini", "gemma-3-270m", "Gemma3ForCausalLM", **SIZES, query_pre_attn_scalar=8, num_hidden_layers=7,
             layer_types=[*[SLIDING, SLIDING, GLOBAL] * 2, SLIDING], sliding_window=4, _sliding_window_pattern=3)
MOE = shape("moe", "gemma-4-26b-a4b", "Gemma4ForCausalLM", **SIZES, **GEMMA4, num_global_key_value_heads=1,
            num_experts=4, top_k_experts=2, moe_intermediate_size=12)
PER_LAYER = shape("e", "gemma-4-e2b", "Gemma4ForCausalLM", **SIZES, **GEMMA4, num_kv_shared_layers=2,
                  hidden_size_per_layer_input=4)
LLAMA = shape("llama", "llama-4-scout", "Llama4ForCausalLM", **SIZES, num_hidden_layers=4, intermediate_size_mlp=20,
              num_local_experts=4, attention_chunk_size=4, floor_scale=4)


# --- checkpoints

def test_270m_has_the_published_size():
    spec = SHAPES["270m"].spec
    assert weight_bytes(spec) == 4 * 268_098_176                    # as published
    norms = 18 * (4 * 640 + 2 * 256) + 640
    assert token_bytes(spec) == 4 * (268_098_176 - norms)


def test_kv_bytes_keep_one_window_in_sliding_layers():
    one = 2 * 1 * 8 * 4                                             # k and v, one head of 8, float32
    assert kv_bytes(MINI.spec, 3) == 7 * 3 * one
    assert kv_bytes(MINI.spec, 10) == (2 * 10 + 5 * 4) * one        # layers 2 and 5 are global
    assert kv_bytes(PER_LAYER.spec, 10) == (4 + 2 * 10) * one       # the last two own none; global heads are of 16
    assert kv_bytes(LLAMA.spec, 10) == (3 * 4 + 10) * one           # three layers keep a chunk


def test_a_token_multiplies_by_its_own_experts():
    found = matrices(MOE.spec)
    assert found.count((24, 16)) == 4 * (2 + 2)                     # gate and up; of two experts, one array of both
    assert found.count((16, 12)) == 4 * 2 and found.count((4, 16)) == 4     # what experts give, the router
    transposed = matrices(LLAMA.spec)                               # its files hold [in, out]
    assert transposed.count((48, 16)) == 4 and transposed.count((16, 24)) == 4 * 2      # one expert, the shared one


def test_of_tables_only_a_tied_head_multiplies():
    assert matrices(PER_LAYER.spec).count((40, 16)) == 1            # the embedding is the head; the other table is not
    assert matrices(LLAMA.spec).count((40, 16)) == 1                # a head of its own


def test_every_family_is_there_at_two_sizes():
    families = {(model.spec.architecture, bool(model.spec.per_layer_input), any(layer.moe for layer in
                                                                               model.spec.layers))
                for name, model in SHAPES.items() if name.endswith("tiny")}
    assert families == {("gemma3", False, False), ("gemma4", False, True), ("gemma4", True, False),
                        ("llama4", False, True)}
    assert {name.replace("tiny", "small") for name in SHAPES if name.endswith("tiny")} <= set(SHAPES)


# --- arithmetic

@pytest.mark.parametrize("shape, measure, stat, bound", [
    ("tiny", "decode, batch 1", "ratio", (4.0, None)), ("small", "decode, batch 1", "ratio", (2.5, None)),
    ("270m", "decode, batch 1", "ratio", (1.2, None)), ("tiny", "decode, batch 8", "ratio", (1.0, None)),
    ("tiny", "prefill", "ratio", (1.0, None)), ("small", "load, fresh process", "ratio", (1.0, None)),
    ("270m", "load, again", "ratio", (1.0, None)), ("llama4-small", "prefill", "ratio", (1.0, None)),
    ("gemma4-moe-tiny", "decode, batch 1", "ratio", (1.0, None)), ("tiny", "import", "ours", (None, 0.3)),
    ("270m", "peak over weights + KV", "ours", (None, 1.15)), ("270m", "of the GEMV rate", "ours", (85.0, None)),
])
def test_goals(shape, measure, stat, bound):
    goal = against_cpu.goal_of(shape, measure)
    assert (goal.stat, (goal.at_least, goal.at_most)) == (stat, bound)


@pytest.mark.parametrize("shape, measure", [("tiny", "peak over weights + KV"), ("small", "of the GEMV rate"),
                                            ("270m", "import to first token"), ("mini", "decode, batch 1")])
def test_what_has_no_goal(shape, measure):
    assert against_cpu.goal_of(shape, measure) is None


def test_agreement_counts_leading_tokens():
    assert against_cpu.agreement([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 0, 6]]) == [3, 1]


def test_prompts_are_new_each_repeat_and_the_same_each_run():
    first, again, other = (against_cpu.random_prompts(MINI, 3, 20, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert [len(prompt) for prompt in first] == [20, 20, 20]
    assert {token for prompt in first for token in prompt} <= set(range(3, 40))


def test_rows_carry_units_shares_and_notes():
    samples = Samples()
    for side, factor in (("rawgem", 1), ("transformers", 4)):
        for name in ("import", "load, fresh process", "load, again", "import to first token", "prefill"):
            samples.add(name, side, 0.5 * factor)
        for name in ("memory after import", "peak memory"):
            samples.add(name, side, 3e6 * factor)
        samples.add("decode, batch 1", side, 0.002 * factor)
    for rate in (1e9, 2e9):
        samples.add("gemv", "gemv", rate)
    samples.add("gemv, square", "gemv", 4e9)
    facts = {"token_bytes": 1_000_000, "floor_bytes": 2_000_000, "agree": {1: [16]}, "agree_of": 16}
    rows = {row.name: row for row in against_cpu.rows_of(SHAPES["tiny"], samples, facts, Namespace(batch=[1]))}
    ours = {name: (row.stats["ours"].median, row.stats["ours"].unit) for name, row in rows.items()}
    assert ours["import"] == ours["prefill"] == (0.5, "s")
    assert ours["decode, batch 1"] == (0.002, "s")
    assert ours["of the GEMV rate"] == (pytest.approx(25), "%")                 # 1 MB in 2 ms, of the best, 2 GB/s
    assert ours["of square GEMV's rate"] == (pytest.approx(12.5), "%")
    assert ours["peak memory"] == (3e6, "bytes")
    assert ours["peak over weights + KV"] == (1.5, "x")
    assert {row.stats["ratio"].median for row in rows.values()} == {4.0}        # whether less or more is better
    assert rows["decode, batch 1"].notes == ("equal greedy tokens, of 16 a row: 16",)
    assert rows["of the GEMV rate"].notes == ("GEMV in NumPy, best: 2.0 GB/s",)


# --- the run

class StandIn:
    """Answers like a worker: rawgem takes 1 ms a token, transformers 5; in a batch, the last row parts at token 9, and
    their log-probabilities differ by `off`."""

    off = 0.001

    def __init__(self, side, options):
        self.side, self.scale = side, {"rawgem": 0.001, "transformers": 0.005}.get(side)
        self.hello = {"import_s": 100 * self.scale if self.scale else 0, "import_bytes": 1e7, "versions": {side: "1.0"}}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def ask(self, do, prompts=(), n_tokens=0, path=None, matrices=(), n=0, tokens=()):
        if do == "generate":
            rows = [[7] * n_tokens for _ in prompts]
            if self.side == "transformers" and n_tokens > 8 and len(rows) > 1:
                rows[-1][8] = 6
            return {"seconds": self.scale * (len(prompts[0]) + n_tokens), "token_ids": rows}
        if do == "likeliest":
            each = [[[-1.0, -2.0]] * n_tokens for _ in prompts]
            return {"token_ids": [[7] * n_tokens for _ in prompts], "likeliest": [[[7, 9]] * n_tokens for _ in prompts],
                    "logprobs": each}
        if do == "logprobs":
            off = self.off if len(prompts) > 1 else 0.0
            return {"logprobs": [[[-1.0, -2.0 - off] for _ in row] for row in tokens], "largest": 5.0}
        return {"load": {"seconds": self.scale}, "peak": {"bytes": 5e7}, "gemv": {"bytes_per_s": 2e10}}[do]


def test_run_measures_every_shape_and_writes_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(against_cpu, "Worker", StandIn)
    monkeypatch.setattr(against, "is_installed", lambda package: True)
    status = bench.main(["against", "--lane", "cpu", "--peer", "transformers", "--shapes", "tiny", "-r", "3", "--batch",
                         "1,8", "--cache", str(tmp_path / "cache"), "--json", str(tmp_path / "out.json")])
    assert status == 0
    document = load_document(tmp_path / "out.json")
    rows = {row.name: row for row in rows_of(document)}
    decode = rows["decode, batch 1"]
    assert decode.shape == {"model": "tiny", "peer": "transformers"}
    assert decode.stats["ours"].samples == pytest.approx([0.001] * 3)       # (80 - 17) ms over 63 tokens
    assert decode.stats["ratio"].median == pytest.approx(5.0)
    assert decode.stats["by_round"].samples == pytest.approx([5.0, 5.0, 5.0])
    assert decode.is_met and decode.goal.at_least == 4
    assert rows["outputs"].stats["error"].median == pytest.approx(0.001 / 5)
    assert rows["decode, batch 8"].notes == ("equal greedy tokens, of 16 a row: 16, 16, 16, 16, 16, 16, 16, 8",)
    assert document["facts"]["models"]["tiny"]["agree"] == {"1": [16], "8": [16] * 7 + [8]}
    assert document["versions"]["transformers"] == "1.0"
    assert "decode, batch 1" in capsys.readouterr().out


@pytest.mark.parametrize("off, said", [(0.003, "0.0006 of the largest logit, expected 0.0004"), (np.nan, "nan")])
def test_outputs_that_differ_are_not_timed_and_fail(tmp_path, monkeypatch, capsys, off, said):
    """After the long prompt they are alike, in the batch they are not."""
    monkeypatch.setattr(against_cpu, "Worker", type("Wrong", (StandIn,), {"off": off}))
    monkeypatch.setattr(against, "is_installed", lambda package: True)
    assert bench.main(["against", "--lane", "cpu", "--peer", "transformers", "--shapes", "tiny,small", "-r", "2",
                       "--cache", str(tmp_path / "cache"), "--json", str(tmp_path / "out.json")]) == 1
    rows = rows_of(load_document(tmp_path / "out.json"))
    assert [(row.name, row.shape["model"]) for row in rows] == [("outputs", "tiny"), ("outputs", "small")]
    assert said in rows[0].notes[0] and rows[0].notes[0] in capsys.readouterr().out


def test_a_decode_time_that_is_not_above_zero_is_not_judged(tmp_path, monkeypatch, capsys):
    """It is the difference of two times, and other work may have lengthened the shorter run."""
    class Disturbed(StandIn):
        def ask(self, do, prompts=(), n_tokens=0, **others):
            return super().ask(do, prompts, 64 if n_tokens == 1 else n_tokens, **others)
    monkeypatch.setattr(against_cpu, "Worker", Disturbed)
    monkeypatch.setattr(against, "is_installed", lambda package: True)
    assert bench.main(["against", "--lane", "cpu", "--peer", "transformers", "--shapes", "tiny", "-r", "2", "--batch",
                       "1", "--cache", str(tmp_path / "cache"), "--json", str(tmp_path / "out.json")]) == 0
    rows = {row.name: row for row in rows_of(load_document(tmp_path / "out.json"))}
    for name in ("decode, batch 1", "of the GEMV rate", "of square GEMV's rate"):
        assert rows[name].stats == {} and rows[name].goal is None and "not judged" in rows[name].notes[0]
    assert "not judged" in capsys.readouterr().out and rows["prefill"].stats


def test_without_transformers_it_is_skipped_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(against, "is_installed", lambda package: package != "torch")
    assert bench.main(["against", "--lane", "cpu", "--json", str(tmp_path / "out.json")]) == 2
    document = load_document(tmp_path / "out.json")
    assert document["rows"] == []
    assert document["skipped"] == [{"what": "transformers",
                                    "why": "torch is not installed; the extra `parity` brings it"}]


# --- the worker, over its real pipe

def test_a_worker_answers_fails_loudly_and_ends():
    with against_cpu.Worker("gemv", {"threads": 1}) as worker:
        assert worker.hello["versions"] == {"numpy": np.__version__}
        assert worker.hello["import_bytes"] > 1e6
        assert worker.ask("gemv", matrices=[[64, 32], [32, 64]])["bytes_per_s"] > 0
        with pytest.raises(BenchError, match=r"(?s)the gemv worker failed.*no_such_request"):
            worker.ask("no_such_request")
        with pytest.raises(BenchError, match="the gemv worker ended"):
            worker.ask("peak")
    assert worker.process.returncode is not None


def test_a_worker_counts_its_own_memory_only():
    """As large as this process is made, a worker that it starts says what it holds itself."""
    held = np.ones(1 << 26)                                         # 512 MB
    with against_cpu.Worker("gemv", {"threads": 1}) as worker:
        assert worker.hello["import_bytes"] < held.nbytes


def test_both_workers_find_the_same_log_probabilities(tmp_path):
    pytest.importorskip("transformers")
    models = (MINI, MOE, PER_LAYER, LLAMA)
    options = {"device": "cpu", "threads": 1, "max_seqs": 2, "max_seq_len": 20, "architecture": "Gemma4ForCausalLM"}
    with against_cpu.Worker("rawgem", options) as ours, against_cpu.Worker("transformers", options) as theirs:
        for model in models:
            for worker in (ours, theirs):
                worker.ask("load", path=str(against_cpu.ready_checkpoint(model, tmp_path, 0)))
            prompts = against_cpu.random_prompts(model, 2, 9, 0)
            assert 0 < against_cpu.error_of(ours, theirs, prompts, 5) < against_cpu.BOUND, model.name
            theirs.ask("load", path=str(against_cpu.ready_checkpoint(model, tmp_path, 1)))
            assert against_cpu.error_of(ours, theirs, prompts, 5) > 10 * against_cpu.BOUND, model.name


def test_the_engines_worker_generates(tmp_path):
    with against_cpu.Worker("rawgem", {"device": "cpu", "threads": 1, "max_seqs": 2, "max_seq_len": 20}) as worker:
        worker.ask("load", path=str(against_cpu.ready_checkpoint(MINI, tmp_path, 0)))
        answer = worker.ask("generate", prompts=[[3, 4, 5], [6, 7, 8]], n_tokens=4)
    assert [len(row) for row in answer["token_ids"]] == [4, 4]
