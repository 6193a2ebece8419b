"""bench.py load: random checkpoints as files, what the sides answer, and the rows that come of it."""

import json
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import bench
import ml_dtypes
import numpy as np
import pytest
from measure import checkpoint_files, load
from measure.models import Model, models_of, sliced, text_of
from measure.random_weights import RandomCheckpoint
from measure.report import BenchError, load_document, rows_of
from safetensors.numpy import load_file

from engine import LLM, SamplingParams
from engine.models import describe
from engine.models.presets import PRESETS, preset
from loaders.config import Config
from loaders.safetensors import Checkpoint
from tests import tiny

DEMO = Path(__file__).resolve().parents[2] / "demo/checkpoint"
ANSWER = {"import_s": 0.2, "lane_s": 0.01, "open_s": 1.25, "weights_s": 1.0, "n_bytes": 4_000_000, "extra_bytes": 500,
          "largest_bytes": 1000, "peak_bytes": 9_000_000, "versions": {}}
PEER = {"import_s": 0.5, "weights_s": 2.0, "n_bytes": 4_000_000, "extra_bytes": 3000, "peak_bytes": 8_000_000,
        "versions": {}}


def model_of(family="gemma4", **fields):
    config = tiny.flat(family, **fields)
    return Model("tiny", describe(Config(config)), None, config)


# --- which model

@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_slices_that_config_json_can_say(name):
    config, spec = sliced(name, PRESETS[name], preset(name), 3)
    assert spec.layers == preset(name).layers[:3]
    assert describe(Config(config)) == spec
    assert len(preset(name).layers) > 3                             # the preset itself is as it was


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_measured_reads_text(name):
    """Nothing of a preset's vision part is written, planned or counted, and its config.json says so."""
    config, spec = text_of(name)
    assert spec == describe(Config(config)) == preset(name).text_only()
    assert "vision_config" not in config and not spec.has_blocks
    args = SimpleNamespace(model=None, preset=[name], layers=None)
    assert [(model.config, model.spec) for model in models_of(args, [])] == [(config, spec)]


def test_a_slice_has_the_readers_of_others_k_and_v_that_lie_in_it():
    config, spec = sliced("gemma-4-e2b", PRESETS["gemma-4-e2b"], preset("gemma-4-e2b"), 20)
    assert config["text_config"]["num_kv_shared_layers"] == 5
    assert [layer.kv_from for layer in spec.layers[13:]] == [None, None, 13, 13, 13, 13, 14]


def test_a_model_is_a_preset_or_a_directory():
    args = SimpleNamespace(model=None, preset=None, layers=2)
    assert [(one.name, one.n_layers, one.path) for one in models_of(args, ["gemma-3-1b"])] == [("gemma-3-1b", 2, None)]
    [model] = models_of(SimpleNamespace(model=DEMO, preset=None, layers=None), [])
    assert (model.name, model.path, model.spec.hidden) == ("checkpoint", DEMO, 128)
    with pytest.raises(BenchError, match="--model DIR came with --preset or --layers"):
        models_of(SimpleNamespace(model=DEMO, preset=["gemma-3-1b"], layers=None), [])
    with pytest.raises(BenchError, match="27 layers of a model that has 26"):
        models_of(SimpleNamespace(model=None, preset=["gemma-3-1b"], layers=27), [])


# --- checkpoints as files

@pytest.mark.parametrize("shard_bytes, is_one", [(1 << 20, True), (16_000, False)])
def test_written_files_hold_the_random_weights(tmp_path, monkeypatch, shard_bytes, is_one):
    monkeypatch.setattr(checkpoint_files, "PART", 1000)              # tensors are written in several parts
    model, n_written = model_of(), []
    directory = checkpoint_files.written(model, tmp_path, 3, shard_bytes, n_written.append)
    files = sorted(directory.glob("*.safetensors"))
    assert ([file.name for file in files] == ["model.safetensors"]) == is_one
    arrays = {name: array for file in files for name, array in load_file(file).items()}     # the format's own reader
    expected = RandomCheckpoint(model.spec, 3)
    assert arrays.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        values = np.empty(int(np.prod(tensor.shape)), ml_dtypes.bfloat16)
        expected.read_range(name, 0, values.size, values)
        assert arrays[name].shape == tensor.shape and arrays[name].tobytes() == values.tobytes()
    assert sum(n_written) == sum(tensor.n_bytes for tensor in expected.tensors.values())
    assert all(file.stat().st_size <= shard_bytes + 4096 for file in files)
    with Checkpoint.open(directory) as checkpoint:
        assert checkpoint.n_bytes == sum(n_written)


def test_the_engine_runs_what_was_written(tmp_path):
    llm = LLM(checkpoint_files.written(model_of("gemma3"), tmp_path, 0), device="cpu", progress=False)
    output = llm.generate([3, 4, 5], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    assert len(output.token_ids) == 4


def test_a_checkpoint_is_written_once_for_a_shape_and_seed(tmp_path):
    first = checkpoint_files.written(model_of(), tmp_path, 0)
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert checkpoint_files.written(model_of(), tmp_path, 0) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == before
    assert checkpoint_files.written(model_of(), tmp_path, 1) != first
    changed = checkpoint_files.written(model_of(num_attention_heads=8), tmp_path, 0)        # the same name, other sizes
    assert changed == first and not checkpoint_files.is_written(first, model_of().config)
    (first / "config.json").unlink()                                 # as an interrupted write leaves it
    (first / "model.safetensors").write_bytes(b"half")
    checkpoint_files.written(model_of(), tmp_path, 0)
    assert checkpoint_files.is_written(first, model_of().config) and len(load_file(first / "model.safetensors")) > 10


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(BenchError, match=r"tiny takes \d+ bytes, 1000 are free there; --layers N writes less"):
        checkpoint_files.written(model_of(), tmp_path, 0)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_shards_keep_the_order_and_the_limit():
    assert checkpoint_files.split({"a": 3, "b": 3, "c": 9, "d": 1, "e": 5}, 6) == [["a", "b"], ["c"], ["d", "e"]]


# --- rows

def test_rows_of_both_sides():
    slow = {**PEER, "weights_s": 4.0}
    shape = {"lane": "cuda", "layers": None}
    ours, theirs, pinned = load.rows_of("m", shape, {"rawgem": [ANSWER, ANSWER], "safetensors.numpy": [PEER, slow]},
                                        limit=5_000_000)
    assert (ours.name, theirs.name, pinned.name) == ("m, rawgem", "m, safetensors.numpy", "m, pinned copies")
    assert ours.stats["rate"].samples == (4e6, 4e6) and ours.stats["rate"].unit == "bytes/s"
    assert ours.stats["of pinned"].median == pytest.approx(80)
    assert ours.is_met is False                                      # the goal is 90 %
    assert ours.stats["extra over largest"].median == 0.5
    assert theirs.stats["extra over largest"].median == 3
    assert theirs.stats["rawgem ahead"].median == pytest.approx(3)   # of medians, 3 s to 1 s
    assert theirs.goal is None and "open" not in theirs.stats


def test_without_a_gpu_there_is_no_pinned_limit():
    [ours] = load.rows_of("m", {"lane": "cpu"}, {"rawgem": [ANSWER]})
    assert "of pinned" not in ours.stats and ours.goal is None


def test_peers_that_are_not_installed_are_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert load.peers("cuda:1") == {"safetensors.numpy": "safetensors is not installed",
                                    "safetensors.torch": "torch is not installed"}
    assert list(load.peers("cpu")) == ["safetensors.numpy"]


# --- the run, over real processes

def test_load_on_the_cpu_lane(tmp_path, capsys):
    out = tmp_path / "load.json"
    assert bench.main(["load", "--lane", "cpu", "--model", str(DEMO), "--repeats", "1", "--json", str(out)]) == 0
    ours, theirs = rows_of(load_document(out))
    assert (ours.name, theirs.name) == ("checkpoint, rawgem", "checkpoint, safetensors.numpy")
    n_bytes = Checkpoint.open(DEMO).n_bytes
    for row in (ours, theirs):
        seconds = row.stats["weights"].median
        assert row.shape["bytes"] == n_bytes and row.stats["rate"].median == pytest.approx(n_bytes / seconds)
        assert row.stats["host peak"].median > 2 * n_bytes           # NumPy, and the weights as float32
    assert ours.stats["open"].median > ours.stats["weights"].median
    assert "safetensors" in json.loads(out.read_text())["versions"]


def test_a_side_that_fails_is_named(tmp_path):
    with pytest.raises(BenchError, match=r"load: rawgem: \w+Error: .*config.json"):
        load.ask("rawgem", tmp_path, "cpu")
    with pytest.raises(BenchError, match="load: nobody: KeyError"):
        load.ask("nobody", tmp_path, "cpu")


def test_a_side_that_hangs_ends(monkeypatch):
    monkeypatch.setattr(load, "LIMIT_S", 0.01)
    with pytest.raises(BenchError, match=r"load: rawgem did not end within 0.01 s"):
        load.ask("rawgem", DEMO, "cpu")


def test_load_wants_a_clock(capsys):
    assert bench.main(["load", "--lane", "emulated", "--model", str(DEMO)]) == 2
    assert "load measures time" in capsys.readouterr().err
