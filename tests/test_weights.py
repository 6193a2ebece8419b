"""engine/weights.py: arrays hold what the file has, whatever its dtype and however large it is."""

import json
import math
import os
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from engine import LLM
from engine.backend import HostLane, open_lane
from engine.errors import CheckpointError
from engine.models import describe
from engine.tensors import account, n_weights, targets
from engine.weights import load
from loaders.config import Config
from loaders.safetensors import N_READERS, SCRATCH_BYTES, Checkpoint
from tests import tiny

IDS = [2, 5, 9, 13, 21, 34, 40, 3]


def logits(path):
    return LLM(path, device="cpu").forward([IDS], return_logits="all").logits[0]


def loaded(path, lane=None, ple="device", progress=lambda n_bytes: None):
    """(ModelSpec, Weights) of a checkpoint, by the loader alone."""
    spec = describe(Config.load(path))
    with Checkpoint.open(path) as checkpoint:
        accounts = account(spec, checkpoint.tensors, ple)
        return spec, load(spec, checkpoint, accounts, lane or open_lane("cpu", "auto"), progress)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_file_dtypes_are_read_exactly(tmp_path, family, dtype):
    config = tiny.flat(family)
    tensors = {name: values.astype(dtype) for name, values in tiny.random_tensors(config).items()}
    half = tiny.write_checkpoint(tmp_path / "half", config, tensors, dtype=dtype)
    full = tiny.write_checkpoint(tmp_path / "full", config, tensors, dtype=np.float32)
    np.testing.assert_array_equal(logits(half), logits(full))


# --- arrays

@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_fused_rows(tmp_path, family):
    """q over k over v, gate over up, each as the file has it; no v where v is the k projection."""
    config = tiny.flat(family)
    tensors = tiny.random_tensors(config)
    spec, weights = loaded(tiny.write_checkpoint(tmp_path / "c", config, tensors))
    for i, (layer, got) in enumerate(zip(spec.layers, weights.layers, strict=True)):
        def file(name, at=f"layers.{i}."):
            return tensors[at + name]
        parts = ["q", "k"] if layer.attention.v_is_k else ["q", "k", "v"]
        np.testing.assert_array_equal(got.qkv, np.concatenate([file(f"self_attn.{p}_proj.weight") for p in parts]))
        assert got.qkv.shape == (layer.attention.qkv_width, 32)
        np.testing.assert_array_equal(got.gate_up, np.concatenate([file("mlp.gate_proj.weight"),
                                                                   file("mlp.up_proj.weight")]))
        for name, tensor in {"o": "self_attn.o_proj", "down": "mlp.down_proj"}.items():
            np.testing.assert_array_equal(getattr(got, name), file(tensor + ".weight"))
        if family == "gemma4":
            np.testing.assert_array_equal(got.layer_scalar, file("layer_scalar"))
        else:
            assert got.layer_scalar is None
    np.testing.assert_array_equal(weights.embed, tensors["embed_tokens.weight"])
    assert weights.head is weights.embed
    assert {layer.attention.v_is_k for layer in spec.layers} == ({False} if family == "gemma3" else {False, True})


def test_gemma4_expert_arrays(tmp_path):
    """Experts as the file has them, [n_experts, out, in], beside the dense MLP; router and norms by their places."""
    config = tiny.flat("gemma4-moe")
    tensors = tiny.random_tensors(config)
    _, weights = loaded(tiny.write_checkpoint(tmp_path / "c", config, tensors))
    for i, got in enumerate(weights.layers):
        for name, tensor in {
                "router": "router.proj.weight", "router_scale": "router.scale",
                "per_expert_scale": "router.per_expert_scale", "experts_gate_up": "experts.gate_up_proj",
                "experts_down": "experts.down_proj", "down": "mlp.down_proj.weight",
                "post_mlp_norm": "post_feedforward_layernorm.weight",
                "post_mlp_norm_1": "post_feedforward_layernorm_1.weight",
                "pre_moe_norm": "pre_feedforward_layernorm_2.weight",
                "post_moe_norm": "post_feedforward_layernorm_2.weight"}.items():
            np.testing.assert_array_equal(getattr(got, name), tensors[f"layers.{i}.{tensor}"])
        assert got.experts_gate_up.shape == (8, 2 * 12, 32) and got.experts_down.shape == (8, 32, 12)


def test_llama4_arrays(tmp_path):
    """Experts as the file has them, [n_experts, in, out]; two norms a layer, none of q and k."""
    config = tiny.flat("llama4")
    tensors = tiny.random_tensors(config)
    spec, weights = loaded(tiny.write_checkpoint(tmp_path / "c", config, tensors))
    for i, (layer, got) in enumerate(zip(spec.layers, weights.layers, strict=True)):
        dense = "feed_forward.shared_expert" if layer.moe else "feed_forward"
        names = {"input_norm": "input_layernorm.weight", "pre_mlp_norm": "post_attention_layernorm.weight",
                 "down": f"{dense}.down_proj.weight"}
        if layer.moe:
            names |= {"router": "feed_forward.router.weight", "experts_gate_up": "feed_forward.experts.gate_up_proj",
                      "experts_down": "feed_forward.experts.down_proj"}
            assert got.experts_gate_up.shape == (8, 32, 2 * 24) and got.experts_down.shape == (8, 24, 32)
        for name, tensor in names.items():
            np.testing.assert_array_equal(getattr(got, name), tensors[f"layers.{i}.{tensor}"])
        np.testing.assert_array_equal(got.gate_up, np.concatenate([tensors[f"layers.{i}.{dense}.gate_proj.weight"],
                                                                   tensors[f"layers.{i}.{dense}.up_proj.weight"]]))
        assert all(getattr(got, name) is None for name in ("q_norm", "k_norm", "post_attention_norm", "post_mlp_norm"))
    np.testing.assert_array_equal(weights.head, tensors["lm_head.weight"])


def test_e_series_arrays(tmp_path):
    config = tiny.flat("gemma4-e")
    tensors = tiny.random_tensors(config)
    _, weights = loaded(tiny.write_checkpoint(tmp_path / "c", config, tensors))
    for name, tensor in {"per_layer_embed": "embed_tokens_per_layer.weight",
                         "per_layer_model_projection": "per_layer_model_projection.weight",
                         "per_layer_norm": "per_layer_projection_norm.weight"}.items():
        np.testing.assert_array_equal(getattr(weights, name), tensors[tensor])
    for i, got in enumerate(weights.layers):
        for name, tensor in {"per_layer_gate": "per_layer_input_gate.weight",
                             "per_layer_projection": "per_layer_projection.weight",
                             "post_per_layer_norm": "post_per_layer_input_norm.weight"}.items():
            np.testing.assert_array_equal(getattr(got, name), tensors[f"layers.{i}.{tensor}"])
        if i >= 3:                                                  # reads the K and V of layer 1 or 2
            np.testing.assert_array_equal(got.qkv, tensors[f"layers.{i}.self_attn.q_proj.weight"])
        assert (got.k_norm is None) is (i >= 3) and got.q_norm is not None
        assert got.gate_up.shape == (2 * (80 if i >= 3 else 40), 32)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_norm_offsets(tmp_path, family):
    """A lane that folds the offset adds it to every norm and to nothing else; one that does not is told to add it."""
    config = tiny.flat(family)
    path = tiny.write_checkpoint(tmp_path / "c", config)
    spec, folded = loaded(path)
    lane = HostLane("cpu", None, np.float32)
    lane.folds_norm_offset = False
    _, plain = loaded(path, lane)
    offset = 1 if family == "gemma3" else 0
    assert (folded.norm_offset, plain.norm_offset, spec.norm_offset) == (0, offset, offset)
    for target in targets(spec):
        owner, _, name = target.name.rpartition(".")
        of = [weights.layers[int(owner.split(".")[1])] if owner else weights for weights in (folded, plain)]
        added = offset if target.name.endswith("norm") else 0
        np.testing.assert_array_equal(getattr(of[0], name), getattr(of[1], name) + np.float32(added))


# --- a table of per-layer inputs that stays in the file

@pytest.mark.parametrize("file_dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("lane_dtype", [ml_dtypes.bfloat16, np.float32])
def test_rows_of_a_table_in_the_file(tmp_path, file_dtype, lane_dtype):
    """The same bits as rows of a loaded table, which is rounded to the lane's dtype and again when it is scaled."""
    config = tiny.flat("gemma4-e")
    tensors = tiny.random_tensors(config)
    name = "embed_tokens_per_layer.weight"
    tensors[name] = tensors[name] * np.float32(1.001)                   # no bfloat16 any more
    path = tiny.write_checkpoint(tmp_path / "c", config, tensors, dtype=file_dtype)
    lane, ids = HostLane("any", None, lane_dtype), np.array([3, 111, 3, 0, *range(112)], np.int32)
    n_read = {"device": [], "host": []}
    _, on_lane = loaded(path, lane, progress=n_read["device"].append)
    _, in_file = loaded(path, lane, ple="host", progress=n_read["host"].append)
    assert in_file.per_layer_embed is None and on_lane.per_layer_rows is None
    scale = np.float32(lane.dtype.type(8**0.5))
    expected = (on_lane.per_layer_embed[ids].astype(np.float32) * scale).astype(lane_dtype)
    rows = in_file.per_layer_rows(ids)
    assert rows.dtype == lane_dtype and rows.shape == (116, 6 * 8)
    np.testing.assert_array_equal(rows, expected)
    out = np.empty_like(expected)
    assert in_file.per_layer_rows(ids, out=out) is out
    np.testing.assert_array_equal(out, expected)
    assert in_file.per_layer_rows(np.array([], np.int32)).shape == (0, 48)
    table_bytes = 112 * 48 * np.dtype(file_dtype).itemsize
    assert sum(n_read["device"]) - sum(n_read["host"]) == table_bytes           # it was not read


def test_a_table_of_another_dtype(tmp_path):
    config = tiny.flat("gemma4-e")
    tensors = tiny.random_tensors(config)
    table = tensors.pop("embed_tokens_per_layer.weight")
    path = tiny.write_checkpoint(tmp_path / "c", config, tensors,
                                 extra={"model.embed_tokens_per_layer.weight": table.astype(np.int32)})
    with pytest.raises(CheckpointError, match=r"embed_tokens_per_layer\.weight is int32, expected one of bfloat16"):
        loaded(path, ple="host")


# --- large tensors

def test_loading_takes_no_memory_beside_the_arrays(tmp_path):
    """Experts go to the lane in pieces: 22 MiB of weights, and at most the reader's two blocks on their way."""
    config = tiny.flat("llama4", hidden_size=256, intermediate_size=256)
    path = tiny.write_checkpoint(tmp_path / "c", config)
    loaded(path)                                                        # imports and caches
    tracemalloc.start()
    spec, weights = loaded(path)
    left, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 4 * n_weights(spec) > 20 * SCRATCH_BYTES
    assert most - left < N_READERS * SCRATCH_BYTES + 2**18
    assert weights.layers[1].experts_gate_up.nbytes == 8 * 256 * 512 * 4


def test_experts_beyond_32_bit_offsets(tmp_path):
    """Maverick's experts: 10.7e9 elements, 21.5 GB, in a file with holes. The last element of the last expert is read,
    and the one where an offset of 32 bits would look for it is another."""
    shape, name = (128, 5120, 16384), "model.layers.1.feed_forward.experts.gate_up_proj"
    n_elements = math.prod(shape)
    header = json.dumps({name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 2 * n_elements]}}).encode()
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + 2 * n_elements)
        file.seek(-4, os.SEEK_END)
        file.write(np.array([2.5, -7.0], ml_dtypes.bfloat16).tobytes())
    with Checkpoint.open(tmp_path) as checkpoint:
        out = np.ones(3, np.float32)
        checkpoint.read_range(name, n_elements - 3, n_elements, out)
        np.testing.assert_array_equal(out, [0, 2.5, -7])
        assert checkpoint.view(name)[127, 5119, 16383] == -7 and checkpoint.view(name)[127, 5119, 16382] == 2.5
        for wrapped in ((n_elements - 1) % 2**31, (n_elements - 1) % 2**32):
            checkpoint.read_range(name, wrapped - 2, wrapped + 1, out)
            np.testing.assert_array_equal(out, 0)
