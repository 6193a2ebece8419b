"""engine/models/gemma4_assistant.py and engine/assistant_weights.py: a draft model's config and tensors, and what is
refused because it was made for another target."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine.assistant_weights import _half_reader, load_assistant, n_weights, weights_bytes
from engine.backend import open_lane
from engine.errors import CheckpointError, ConfigError
from engine.kernels import ops
from engine.models import describe
from engine.models.gemma4_assistant import describe_assistant
from engine.models.presets import preset
from loaders.config import Config
from loaders.generation_config import load_suppressed
from loaders.safetensors import Checkpoint
from tests import tiny
from tests.configs import refuses, without
from tests.golden import GOLDENS
from tests.released import GLOBAL, SLIDING

CASES = ("gemma4-assistant", "gemma4-assistant-dense")
TARGET = describe(Config(tiny.flat("gemma4")))


def spec_of(config, target=TARGET, suppressed=()):
    return describe_assistant(Config(config), target, suppressed)


def refuses_draft(config, *expected, target=TARGET):
    refuses(config, *expected, by=lambda config: describe_assistant(config, target))


def released(hidden, backbone, n_heads, n_kv_heads, n_global_kv_heads, window, ordered, v_is_k, intermediate,
             kind="gemma4_assistant"):
    """The config.json of a released draft: speculative decoding notes, table of published drafts."""
    return {"model_type": kind, "backbone_hidden_size": backbone, "use_ordered_embeddings": ordered,
            "num_centroids": 2048, "centroid_intermediate_top_k": 32,
            "text_config": {
                "model_type": "gemma4_text", "hidden_size": hidden, "intermediate_size": intermediate,
                "num_hidden_layers": 4, "layer_types": [SLIDING] * 3 + [GLOBAL], "num_attention_heads": n_heads,
                "num_key_value_heads": n_kv_heads, "num_global_key_value_heads": n_global_kv_heads, "head_dim": 256,
                "global_head_dim": 512, "sliding_window": window, "attention_k_eq_v": v_is_k, "vocab_size": 262144,
                "num_kv_shared_layers": 4, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}


RELEASED = {
    "gemma-4-e2b": (released(256, 1536, 4, 1, None, 512, True, False, 2048), 13, 14, 78e6),
    "gemma-4-e4b": (released(256, 2560, 4, 2, None, 512, True, False, 2048), 22, 23, 79e6),
    "gemma-4-12b": (released(1024, 3840, 16, 8, 1, 1024, False, True, 8192, "gemma4_unified_assistant"), 46, 47, None),
    "gemma-4-26b-a4b": (released(1024, 2816, 16, 8, 2, 1024, False, True, 8192), 28, 29, 420e6),
    "gemma-4-31b": (released(1024, 5376, 32, 16, 4, 1024, False, True, 8192), 58, 59, 469e6),
}


# --- the spec

@pytest.mark.parametrize("name", RELEASED)
def test_released_drafts_read_the_last_own_layer_of_each_kind(name):
    config, sliding, full, n_params = RELEASED[name]
    spec = spec_of(config, preset(name))
    assert spec.reads == (sliding, sliding, sliding, full)
    assert (spec.pos_offset, spec.extra_keys) == (0, 0)
    assert [layer.attention.kind for layer in spec.layers] == [layer.attention.kind for layer in spec.seen_layers] \
        == [f"sliding({config['text_config']['sliding_window']})"] * 3 + ["global"]
    assert {layer.attention.scale for layer in spec.layers} == {1.0}
    assert (spec.n_centroids, spec.centroids_per_token) == ((2048, 32) if "e" in name[-3:] else (0, 0))
    if n_params:
        assert abs(n_weights(spec) / n_params - 1) < 0.02
    ops.check(spec)


def test_geometry_is_of_the_windows():
    spec = replace(spec_of(tiny.draft("gemma4")), extra_keys=1)
    assert [layer.attention.window for layer in spec.seen_layers] == [6, 6, None]
    assert [layer.attention.window for layer in spec.layers] == [5, 5, None]


@pytest.mark.parametrize("case", CASES)
def test_both_spellings_describe_one_model(case):
    target = describe(Config.load(GOLDENS / case / "checkpoint"))
    one, other = (describe_assistant(Config.load(GOLDENS / case / "assistant", name), target)
                  for name in ("config.json", "config_v5.json"))
    assert one == other and one.reads == ((2, 2, 1) if case == CASES[0] else (2, 2, 3))


@pytest.mark.parametrize("family", ["gemma4", "gemma4-moe", "gemma4-e"])
def test_every_kind_of_target(family):
    target = describe(Config(tiny.flat(family)))
    assert spec_of(tiny.draft(family), target).reads == ((1, 1, 2) if family == "gemma4-e" else (4, 4, 5))


def test_the_class_may_be_named_by_either():
    config = tiny.draft("gemma4")
    assert spec_of(without(config, "model_type")) == spec_of(without(config, "architectures")) == spec_of(config)


@pytest.mark.parametrize("name, window", [("Gemma4AssistantForCausalLM", 512),
                                          ("Gemma4UnifiedAssistantForCausalLM", 1024)])
def test_a_window_left_out_is_that_of_the_class(name, window):
    config = without({**tiny.draft("gemma4"), "architectures": [name]}, "model_type")
    del config["text_config"]["sliding_window"]
    refuses_draft(config, f"layer 0 (sliding_attention) of the draft has a window of {window}, layer 4 of the target, "
                          "whose K and V it reads, has a window of 5")


def test_no_shared_layers_are_all():
    for n in (None, 0, 3):
        assert spec_of(tiny.draft("gemma4", num_kv_shared_layers=n)) == spec_of(tiny.draft("gemma4"))


def test_suppressed_ids(tmp_path):
    assert spec_of(tiny.draft("gemma4"), suppressed=(9, 3, 9)).suppressed == (3, 9)
    with pytest.raises(ConfigError, match="suppress_tokens has 64, expected ids below 64"):
        spec_of(tiny.draft("gemma4"), suppressed=(64,))
    assert load_suppressed(tmp_path) == ()
    (tmp_path / "generation_config.json").write_text(json.dumps({"suppress_tokens": [5, 7]}))
    assert load_suppressed(tmp_path) == (5, 7)
    (tmp_path / "generation_config.json").write_text(json.dumps({"suppress_tokens": "all"}))
    with pytest.raises(ConfigError, match='suppress_tokens is "all"'):
        load_suppressed(tmp_path)


# --- a draft for another target

@pytest.mark.parametrize("fields, expected", [
    ({"vocab_size": 96}, "text_config.vocab_size is 96, expected 64, the target's"),
    ({"num_key_value_heads": 4}, "layer 0 (sliding_attention) of the draft has 4 KV heads, layer 4 of the target, "
                                 "whose K and V it reads, has 2 KV heads: the draft was made for another target"),
    ({"num_global_key_value_heads": 2}, "layer 2 (full_attention) of the draft has 2 KV heads, layer 5 of the target, "
                                        "whose K and V it reads, has 1 KV heads"),
    ({"head_dim": 32}, "layer 0 (sliding_attention) of the draft has heads of 32, layer 4 of the target, whose K and V "
                       "it reads, has heads of 16"),
    ({"global_head_dim": 16}, "layer 2 (full_attention) of the draft has heads of 16, layer 5"),
    ({"sliding_window": 6}, "layer 0 (sliding_attention) of the draft has a window of 6"),
    ({"attention_k_eq_v": False, "num_key_value_heads": 2}, "layer 2 (full_attention) of the draft has 2 KV heads"),
    ({"attention_k_eq_v": False, "per_layer_config": {"2": {"num_key_value_heads": 1, "head_dim": 32}}},
     "layer 2 (full_attention) of the draft has attention_k_eq_v False, layer 5 of the target, whose K and V it reads, "
     "has attention_k_eq_v True"),
    ({"rope_parameters": {SLIDING: {"rope_type": "default", "rope_theta": 2e4},
                          GLOBAL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}}},
     "layer 0 (sliding_attention) of the draft has RopeSpec(theta=20000.0"),
])
def test_what_does_not_fit_the_target_is_named(fields, expected):
    refuses_draft(tiny.draft("gemma4", **fields), "config.json: ", expected)


def test_a_target_of_another_width():
    refuses_draft({**tiny.draft("gemma4"), "backbone_hidden_size": 48},
                  "config.json: backbone_hidden_size is 48, expected 32, the target's hidden_size")


def test_a_kind_of_layer_that_the_target_has_not():
    sliding = replace(TARGET, layers=tuple(layer for layer in TARGET.layers if layer.attention.window))
    refuses_draft(tiny.draft("gemma4"), "text_config.layer_types",
                  "no full_attention: the target has no such layer with K and V of its own", target=sliding)


def test_targets_of_other_families():
    for family in ("gemma3", "llama4"):
        target = describe(Config(tiny.flat(family)))
        refuses_draft(tiny.draft("gemma4"), f"the target is {target.architecture}", target=target)


def test_what_is_no_draft_and_a_draft_alone():
    refuses_draft(tiny.flat("gemma4"), "this is no draft model", "Gemma4AssistantForCausalLM")
    for config in (tiny.draft("gemma4"), without(tiny.draft("gemma4"), "architectures")):
        refuses(config, "this one drafts for another, pass it as `draft`", by=describe)


# --- its tensors

def loaded(path, spec, device="cpu"):
    lane = open_lane(device, "auto")
    read = []
    with lane.running(), Checkpoint.open(path) as checkpoint:
        weights = load_assistant(spec, checkpoint, lane, read.append)
        used = sum(info.n_bytes for name, info in checkpoint.tensors.items() if not name.endswith("token_ordering"))
    assert sum(read) == used
    return weights


def copied(case, tmp_path):
    """(a copy of a golden's draft, its spec, its tensors)"""
    path = tmp_path / "assistant"
    shutil.copytree(GOLDENS / case / "assistant", path)
    path.chmod(0o755)
    for file in path.iterdir():
        file.chmod(0o644)
    spec = describe_assistant(Config.load(path), describe(Config.load(GOLDENS / case / "checkpoint")))
    return path, spec, load_file(path / "model.safetensors")


@pytest.fixture(params=CASES)
def draft(request, tmp_path):
    return copied(request.param, tmp_path)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_every_tensor_has_its_place(draft, device):
    path, spec, tensors = draft
    weights = loaded(path, spec, device)
    f32 = {name: values.astype(np.float32) for name, values in tensors.items()}
    pairs = {"head": "model.embed_tokens.weight", "norm": "model.norm.weight", "post": "post_projection.weight"}
    for name, tensor in pairs.items():
        np.testing.assert_array_equal(getattr(weights, name).astype(np.float32), f32[tensor])
    halves = np.hsplit(f32["pre_projection.weight"], 2)
    for array, half in zip((weights.pre_embed, weights.pre_state), halves, strict=True):
        np.testing.assert_array_equal(array.astype(np.float32), half)
    layer, at = weights.layers[1], "model.layers.1."
    np.testing.assert_array_equal(layer.qkv.astype(np.float32), f32[at + "self_attn.q_proj.weight"])
    np.testing.assert_array_equal(layer.gate_up.astype(np.float32), np.concatenate(
        [f32[at + f"mlp.{half}_proj.weight"] for half in ("gate", "up")]))
    assert layer.k_norm is None and layer.layer_scalar.shape == (1,)
    if spec.n_centroids:
        np.testing.assert_array_equal(weights.ordering.reshape(-1), tensors["masked_embedding.token_ordering"])
        assert weights.ordering.dtype == np.int32 and weights.ordering.shape == (32, 12)
    else:
        assert weights.ordering is None and weights.centroids is None
    n = sum(values.size for name, values in tensors.items() if name != "masked_embedding.token_ordering")
    assert n_weights(spec) == n and weights_bytes(spec, 2) == 2 * n + 4 * 384 * bool(spec.n_centroids)


def test_large_matrices_come_in_pieces(draft):
    """Ranges that begin and end within a row, as a GPU's pinned buffers cut them."""
    path, spec, tensors = draft
    whole = tensors["pre_projection.weight"].astype(np.float32)
    with Checkpoint.open(path) as checkpoint:
        for first in (0, spec.backbone):
            read, got = _half_reader(checkpoint, first, spec.backbone, lambda n: None), np.empty(32 * 64, np.float32)
            for begin, end in ((0, 1), (1, 64), (64, 190), (190, 2048)):
                read(begin, end, got[begin:end])
            np.testing.assert_array_equal(got.reshape(32, 64), whole[:, first:first + 64])


def test_suppressed_ids_leave_the_ordering(tmp_path):
    path, spec, tensors = copied(CASES[0], tmp_path)
    ordering = loaded(path, replace(spec, suppressed=(0, 17))).ordering.reshape(-1)
    known = tensors["masked_embedding.token_ordering"]
    np.testing.assert_array_equal(ordering, np.where(np.isin(known, [0, 17]), -1, known))


def rewritten(path, tensors, **changes):
    """The draft with tensors changed; None removes one."""
    kept = {name: values for name, values in {**tensors, **changes}.items() if values is not None}
    save_file(kept, path / "model.safetensors")


@pytest.mark.parametrize("changes, message", [
    ({"post_projection.weight": None}, r"the checkpoint has no post_projection.weight \[64, 32\]"),
    ({"pre_projection.weight": np.zeros((32, 64), np.float32)},
     r"pre_projection.weight is \[32, 64\], expected \[32, 128\] by config.json"),
    ({"model.layers.0.self_attn.k_proj.weight": np.zeros((32, 32), np.float32)},
     "model.layers.0.self_attn.k_proj.weight is not a tensor of a draft model with 3 layers; the nearest name is "
     "model.layers.0.self_attn.[qo]_proj.weight"),
    ({"model.norm.weight": np.zeros(32, np.int32)}, "model.norm.weight is I32, which is not supported as a weight"),
])
def test_tensors_that_are_wrong_are_named(draft, changes, message):
    path, spec, tensors = draft
    rewritten(path, tensors, **changes)
    with pytest.raises(CheckpointError, match=message):
        loaded(path, spec)


def test_the_head_may_be_there_twice(draft):
    path, spec, tensors = draft
    rewritten(path, tensors, **{"lm_head.weight": tensors["model.embed_tokens.weight"]})
    lane = open_lane("cpu", "auto")
    with Checkpoint.open(path) as checkpoint:
        assert load_assistant(spec, checkpoint, lane, lambda n: None).unused == ("lm_head.weight",)


@pytest.mark.parametrize("ordering", [
    np.arange(384)[::-1].copy() + 1, np.zeros(384, np.int64), np.arange(384, dtype=np.float32), np.arange(384) - 384])
def test_an_ordering_that_is_no_permutation(tmp_path, ordering):
    path, spec, tensors = copied(CASES[0], tmp_path)
    rewritten(path, tensors, **{"masked_embedding.token_ordering": ordering})
    with pytest.raises(CheckpointError, match=r"token_ordering is \w+ \[384\], expected each token id below 384 once"):
        loaded(path, spec)
