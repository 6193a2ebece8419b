"""engine/models: config.json → ModelSpec. Released shapes are exact; tests/test_model_fields.py has the fields."""

from dataclasses import replace

import numpy as np
import pytest

from engine.models import TemperatureSpec
from engine.models.registry import ARCHITECTURES, MODEL_TYPES
from engine.tensors import n_weights
from tests import tiny
from tests.configs import ABSENT, LINEAR, PLAIN, refuses, spec_of, without
from tests.released import GLOBAL, RELEASED, SLIDING

# --- which model

@pytest.mark.parametrize(("config", "expected"), [
    ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, 'architectures is ["LlamaForCausalLM"]'),
    ({"architectures": ["Gemma3TextModel"], "model_type": "gemma3_text"}, 'architectures is ["Gemma3TextModel"]'),
    ({"architectures": "Gemma3ForCausalLM"}, "expected a list"),
    ({"architectures": [["Gemma3ForCausalLM"]]}, 'architectures is [["Gemma3ForCausalLM"]]'),
    ({"model_type": "llama"}, 'model_type is "llama", expected one of gemma3_text, gemma3'),
    ({"model_type": 3}, "model_type is 3"),
    ({"architectures": [], "hidden_size": 8}, "architectures is [], expected one of Gemma3ForCausalLM"),
    ({"hidden_size": 8}, "architectures is missing, expected one of Gemma3ForCausalLM"),
    ({**tiny.flat("gemma3"), "model_type": "gemma4_text"}, "model_type"),
])
def test_models_that_are_not_supported(config, expected):
    refuses(config, "config.json: ", expected)


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "llama4"])
@pytest.mark.parametrize("form", [tiny.flat, tiny.nested])
def test_the_architecture_may_be_named_by_model_type(form, family):
    config = form(family)
    assert spec_of(without(config, "architectures")) == spec_of({**config, "architectures": []}) == spec_of(config)
    assert spec_of(without(config, "model_type")) == spec_of(config)
    assert spec_of({**config, "architectures": ["MyWrapper", *config["architectures"]]}) == spec_of(config)


def test_every_architecture_has_a_model_type():
    assert sorted(MODEL_TYPES.values()) == sorted(ARCHITECTURES)


@pytest.mark.parametrize(("fields", "expected"), [
    ({"use_bidirectional_attention": "all"}, ('text_config.use_bidirectional_attention is "all"',)),
    ({"quantization_config": {"quant_method": "fp8"}}, ("text_config.quantization_config", "quantised")),
])
def test_gemma4_variants_that_are_not_supported(fields, expected):
    refuses(tiny.nested("gemma4", **fields), *expected)


def test_other_models_that_are_not_supported():
    refuses(tiny.flat("gemma3", use_bidirectional_attention=True), "use_bidirectional_attention is true", "embedding")
    for config in (tiny.flat("gemma3"), tiny.nested("gemma4"), tiny.flat("llama4"), tiny.nested("llama4")):
        refuses({**config, "quantization_config": {"quant_method": "modelopt"}}, "quantization_config", "quantised")


# --- released models

@pytest.mark.parametrize("name", RELEASED)
def test_released_shapes(name):
    released = RELEASED[name]
    spec = spec_of(released.config)
    n, is_llama = len(spec.layers), spec.architecture == "llama4"
    by_kind = {is_global: [layer.attention for layer in spec.layers if (layer.attention.kind == "global") is is_global]
               for is_global in (True, False)}
    assert (len(by_kind[True]), len(by_kind[False])) == (released.n_global, released.n_local)
    period = {"gemma-4-e2b": 5}.get(name, 4 if is_llama else 6)
    assert [i for i, layer in enumerate(spec.layers) if layer.attention.kind == "global"] == \
        list(range(period - 1, n, period))
    assert {attention.chunk if is_llama else attention.window for attention in by_kind[False]} == {released.reach}
    assert {attention.head_dim for attention in by_kind[True]} == {released.global_head_dim}
    assert {round(layer.attention.scale, 7) for layer in spec.layers} == {released.scale}
    assert n_weights(spec.text_only()) == released.n_params
    assert spec.max_positions == released.max_positions
    assert spec.eos_ids == ((200001, 200007, 200008) if is_llama else (1, 106))
    assert (spec.tied, spec.norm_eps) == ((False, 1e-5) if is_llama else (True, 1e-6))
    assert spec.logit_softcap == (30.0 if spec.architecture == "gemma4" else None)


def test_e_series_layers():
    """Consumers read the last layer of their kind that has K and V of its own; E2B's are twice as wide."""
    e2b, e4b = (spec_of(RELEASED[name].config) for name in ("gemma-4-e2b", "gemma-4-e4b"))
    assert (e2b.first_shared, e4b.first_shared) == (15, 24)
    for spec, sliding, full in ((e2b, 13, 14), (e4b, 22, 23)):
        first = spec.first_shared
        assert [layer.kv_from for layer in spec.layers] == [None] * first + [
            full if layer.attention.window is None else sliding for layer in spec.layers[first:]]
    assert [layer.dense.intermediate for layer in e2b.layers] == [6144] * 15 + [12288] * 20
    assert {layer.dense.intermediate for layer in e4b.layers} == {10240}
    for spec, width in ((e2b, 8960), (e4b, 10752)):
        assert (spec.per_layer_input, spec.per_layer_vocab, spec.per_layer_width) == (256, 262144, width)
    assert spec_of(RELEASED["gemma-4-31b"].config).first_shared is None


def test_26b_a4b_experts():
    spec = spec_of(RELEASED["gemma-4-26b-a4b"].config)
    for layer in spec.layers:
        moe = layer.moe
        assert (moe.n_experts, moe.experts_per_token, moe.intermediate, layer.dense.intermediate) == (128, 8, 704, 2112)
        assert (moe.routing, moe.activation, moe.in_out) == ("softmax", "gelu_tanh", False)


def test_llama4_layers():
    """Experts in every layer of Scout and every second of Maverick, whose q and k have no norm."""
    scout, maverick = (spec_of(RELEASED[name].config) for name in ("llama-4-scout", "llama-4-maverick"))
    assert [i for i, layer in enumerate(maverick.layers) if layer.moe] == list(range(1, 48, 2))
    assert all(layer.moe for layer in scout.layers)
    for spec, n_experts, qk_norm in ((scout, 16, "plain"), (maverick, 128, None)):
        for i, layer in enumerate(spec.layers):
            attention, rope = layer.attention, i % 4 != 3
            assert (attention.rope is not None, attention.chunk) == (rope, 8192 if rope else None)
            assert attention.qk_norm == (qk_norm if rope else None)
            assert attention.temperature == (None if rope else TemperatureSpec(0.1, 8192))
            assert not layer.sandwich and layer.dense.activation == "silu"
            assert layer.dense.intermediate == (8192 if layer.moe else 16384)
            if layer.moe:
                moe = layer.moe
                assert (moe.n_experts, moe.experts_per_token, moe.intermediate) == (n_experts, 1, 8192)
                assert (moe.routing, moe.activation, moe.in_out) == ("sigmoid", "silu", True)
        assert spec.norm_rounds_first and spec.embed_scale == 1


def test_llama4_rope():
    """Of Scout's 64 pairs 29 are divided by 16; with factor 8 and high 4, 29 stay, 6 are blended and 29 divided."""
    config = RELEASED["llama-4-scout"].config
    plain = 5e5 ** -(np.arange(64) / 64)
    rope = spec_of(config).layers[0].attention.rope
    assert rope.interleaved
    np.testing.assert_allclose(rope.inv_freq(128), np.where(np.arange(64) < 35, plain, plain / 16), rtol=1e-7)
    other = {**config["text_config"]["rope_scaling"], "factor": 8.0, "high_freq_factor": 4.0}
    blended = spec_of({**config, "text_config": {**config["text_config"], "rope_scaling": other}}).layers[0].attention
    share = blended.rope.inv_freq(128) / plain
    assert (int((share > 1 - 1e-6).sum()), int((share < 1 / 8 + 1e-6).sum())) == (29, 29)
    maverick = spec_of(RELEASED["llama-4-maverick"].config).layers[0].attention
    np.testing.assert_allclose(maverick.rope.inv_freq(128), plain, rtol=1e-7)


def test_gemma3_rope():
    """Linear scaling by 8 on global layers from 4B on, none on 270M and 1B; sliding layers are never scaled."""
    for name, first in {"gemma-3-270m": 1.0, "gemma-3-1b": 1.0, "gemma-3-4b": 0.125, "gemma-3-27b": 0.125}.items():
        layers = spec_of(RELEASED[name].config).layers
        sliding, full = layers[0].attention, layers[5].attention
        assert sliding.rope.inv_freq(sliding.head_dim)[0] == 1.0
        assert full.rope.inv_freq(full.head_dim)[0] == first
        assert (sliding.rope.theta, full.rope.theta) == (1e4, 1e6)
        assert sliding.rope.n_pairs(256) == full.rope.n_pairs(256) == 128


def test_gemma4_rope():
    """64 of the 256 pairs of a global head rotate; the exponent divides by the whole 512."""
    layers = spec_of(RELEASED["gemma-4-31b"].config).layers
    sliding, full = layers[0].attention, layers[5].attention
    assert full.rope.n_pairs(full.head_dim) == 64 and sliding.rope.n_pairs(sliding.head_dim) == 128
    inv_freq = full.rope.inv_freq(full.head_dim)
    assert inv_freq.shape == (64,) and inv_freq.dtype == np.float32
    np.testing.assert_allclose(inv_freq[[0, 1, 63]], [1, 0.9475, 0.0334], atol=5e-5)      # printed to four places
    np.testing.assert_allclose(sliding.rope.inv_freq(256), 10000.0 ** -(np.arange(128) / 128), rtol=1e-7)
    assert (sliding.v_norm, sliding.v_is_k, sliding.n_kv_heads) == (True, False, 16)
    assert (full.v_norm, full.v_is_k, full.n_kv_heads) == (True, True, 4)


# --- one model, several spellings

@pytest.mark.parametrize("changes", [
    {"rope_scaling": {"type": "linear", "factor": 8.0}},
    {"rope_scaling": ABSENT, "rope_theta": ABSENT, "rope_local_base_freq": ABSENT, "rope_parameters": {
        SLIDING: PLAIN, GLOBAL: {**LINEAR, "rope_theta": 1e6}}},
    {"rope_scaling": ABSENT, "rope_parameters": {SLIDING: {"rope_type": "default"}, GLOBAL: LINEAR}},
    {"rope_parameters": {GLOBAL: LINEAR}},
    {"rope_theta": ABSENT, "rope_local_base_freq": ABSENT},
], ids=["type", "nested", "mixed", "both", "default bases"])
def test_gemma3_rope_spellings(changes):
    config = {key: value for key, value in tiny.flat("gemma3", **changes).items() if value is not ABSENT}
    assert spec_of(config) == spec_of(tiny.flat("gemma3"))


def test_gemma3_flat_bases_fill_the_nested_form():
    """A nested theta that is missing comes from the flat field, and only then from the default."""
    config = tiny.flat("gemma3", rope_theta=3e5, rope_local_base_freq=2e4,
                       rope_parameters={SLIDING: {}, GLOBAL: LINEAR})
    sliding, full = (layer.attention.rope for layer in spec_of(config).layers[:2])
    assert (sliding.theta, full.theta, sliding.factor, full.factor) == (2e4, 3e5, 1.0, 8.0)


@pytest.mark.parametrize("scaling", [{GLOBAL: {**LINEAR, "factor": 4.0}}, {GLOBAL: {}}, {}])
def test_gemma3_rope_spellings_that_contradict_each_other(scaling):
    refuses(tiny.flat("gemma3", rope_parameters=scaling), "rope_scaling is {", "rope_parameters.full_attention (factor")


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_without_layer_types_every_sixth_is_global(family):
    config = without(tiny.flat(family, num_hidden_layers=14), "layer_types", "sliding_window_pattern")
    listed = {**config, "layer_types": [GLOBAL if i in (5, 11) else SLIDING for i in range(14)]}
    assert spec_of(config) == spec_of(listed)


def test_gemma4_per_layer_config():
    """As transformers 5 saves it: zero-padded or not, in place of the two global sizes."""
    released = tiny.flat("gemma4")
    resaved = without(released, "global_head_dim", "num_global_key_value_heads")
    sizes = {"head_dim": 32, "num_key_value_heads": 1}
    for keys in (("2", "5"), ("02", "05"), ("02", "5")):
        assert spec_of({**resaved, "per_layer_config": dict.fromkeys(keys, sizes)}) == spec_of(released)
    # Layers that it leaves out have the sizes of a sliding layer, not 512: transformers fills in no other.
    left_out = spec_of({**resaved, "per_layer_config": {"2": sizes}}).layers[5].attention
    assert (left_out.head_dim, left_out.n_kv_heads) == (16, 2)


def test_gemma4_kv_heads_of_global_layers_need_k_eq_v():
    """num_global_key_value_heads counts only where V is the K projection."""
    full = spec_of(tiny.flat("gemma4", attention_k_eq_v=False)).layers[2].attention
    assert (full.n_kv_heads, full.head_dim, full.v_is_k) == (2, 32, False)


def test_unified_defaults():
    """The 12B class has other defaults than its siblings: no per-layer inputs, a window of 1024, 262144 positions."""
    config = RELEASED["gemma-4-12b"].config
    text = without(config["text_config"], "sliding_window", "max_position_embeddings", "hidden_size_per_layer_input",
                   "layer_types", "rope_parameters", "model_type")
    assert spec_of({**config, "text_config": text}) == spec_of(config)


def test_gemma3_defaults():
    """What gemma-3-4b leaves out, spelled in full."""
    config = RELEASED["gemma-3-4b"].config
    full = {**config["text_config"], "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4,
            "head_dim": 256, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "max_position_embeddings": 131072,
            "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6, "tie_word_embeddings": True}
    assert spec_of({**config, "text_config": full}) == spec_of(config)
    no_window = {**config, "text_config": without(full, "sliding_window")}
    assert spec_of(no_window).layers[0].attention.window == 4096


def test_gemma4_defaults():
    """What a config of this class means where it says nothing. Releases say all of it."""
    config = RELEASED["gemma-4-31b"].config
    text = without(config["text_config"], "vocab_size", "head_dim", "global_head_dim", "layer_types", "rope_parameters",
                   "rms_norm_eps", "tie_word_embeddings", "eos_token_id")
    assert spec_of({**config, "text_config": text}) == spec_of(config)
    text = without(text, "sliding_window", "max_position_embeddings", "num_attention_heads", "num_key_value_heads",
                   "num_global_key_value_heads", "attention_k_eq_v", "final_logit_softcapping")
    spec = spec_of({**config, "text_config": text})
    sliding, full = spec.layers[0].attention, spec.layers[5].attention
    assert (sliding.window, spec.max_positions, spec.logit_softcap) == (512, 131072, None)
    assert (sliding.n_heads, sliding.n_kv_heads, full.n_kv_heads, full.v_is_k) == (8, 4, 4, False)


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "gemma4-e"])
def test_text_ends_and_ties_on_two_levels(family):
    """The top level's ids of text ends go first. A contradiction about the head is refused: transformers 4 read the
    text section's word on it, transformers 5 reads the top level's."""
    config = tiny.nested(family)
    spec = spec_of(config)
    assert spec.eos_ids == (1,) and spec.tied
    assert spec_of({**config, "eos_token_id": [1, 106]}) == replace(spec, eos_ids=(1, 106))
    assert spec_of({**config, "eos_token_id": 0}).eos_ids == (0,)
    for top, inner in ((False, None), (None, False), (False, False)):
        text = {**config["text_config"], "tie_word_embeddings": inner}
        assert not spec_of({**config, "text_config": text, "tie_word_embeddings": top}).tied
    for top in (True, False):
        text = {**config["text_config"], "tie_word_embeddings": not top}
        refuses({**config, "text_config": text, "tie_word_embeddings": top}, "text_config.tie_word_embeddings is")


# --- Llama 4 spellings

TINY_LLAMA4 = tiny.flat("llama4")
TINY_SCALING = TINY_LLAMA4["rope_scaling"]


@pytest.mark.parametrize("changes", [
    {"rope_scaling": {**without(TINY_SCALING, "rope_type"), "type": "llama3"}},
    {"rope_theta": ABSENT},
    {"rope_scaling": ABSENT, "rope_theta": ABSENT, "rope_parameters": {**TINY_SCALING, "rope_theta": 5e5}},
    {"rope_scaling": ABSENT, "rope_parameters": TINY_SCALING},
    {"rope_parameters": TINY_SCALING},
    {"no_rope_layers": ABSENT},
    {"no_rope_layers": [1, 1, 1, 0, 1, 1]},
    {"layer_types": ["chunked_attention"] * 3 + [GLOBAL] + ["chunked_attention"] * 2},
    {"interleave_moe_layer_step": 5, "moe_layers": [1, 3, 5]},
    {"attn_temperature_tuning": 4},
    {"attn_temperature_tuning": True},
    {"attention_multiplier": 0.25},
    {"use_qk_norm": ABSENT, "num_experts_per_tok": ABSENT, "no_rope_layer_interval": 4, "tie_word_embeddings": ABSENT},
], ids=lambda changes: ",".join(changes))
def test_llama4_spellings(changes):
    config = {key: value for key, value in tiny.flat("llama4", **changes).items() if value is not ABSENT}
    assert spec_of(config) == spec_of(TINY_LLAMA4)


@pytest.mark.parametrize(("changes", "expected"), [
    ({"rope_parameters": {**TINY_SCALING, "factor": 8.0}}, "rope_scaling is {"),
    ({"rope_parameters": {**TINY_SCALING, "rope_theta": 1e6}}, "rope_theta is 500000.0, expected the 1000000.0"),
])
def test_llama4_rope_spellings_that_contradict_each_other(changes, expected):
    refuses(tiny.flat("llama4", **changes), expected)


def test_llama4_temperature_is_off_by_false_or_zero():
    for off in (False, 0):
        assert spec_of(tiny.flat("llama4", attn_temperature_tuning=off)).layers[3].attention.temperature is None


def test_llama4_without_experts():
    """An empty list of expert layers is a list: none has experts."""
    assert not any(layer.moe for layer in spec_of(tiny.flat("llama4", moe_layers=[])).layers)


def test_llama4_defaults():
    """What Scout's file would mean if it left out whatever equals the class default."""
    config = RELEASED["llama-4-scout"].config
    text = without(config["text_config"], "attention_chunk_size", "attn_scale", "attn_temperature_tuning",
                   "floor_scale", "head_dim", "intermediate_size_mlp", "no_rope_layers", "num_attention_heads",
                   "num_experts_per_tok", "num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings",
                   "vocab_size", "interleave_moe_layer_step", "num_local_experts", "use_qk_norm", "hidden_act",
                   "model_type")
    top = without(config, "tie_word_embeddings")
    assert spec_of({**top, "text_config": text}) == spec_of(config)
    assert spec_of({**top, "text_config": without(text, "max_position_embeddings")}).max_positions == 131072


def test_llama4_nulls_that_are_not_defaults():
    """The class derives these two from others where the file says null, and takes its own numbers where it says
    nothing."""
    attention = spec_of(tiny.flat("llama4", head_dim=None, num_key_value_heads=None)).layers[0].attention
    assert (attention.head_dim, attention.n_kv_heads) == (8, 4)


def test_unified_has_no_experts_and_no_per_layer_inputs():
    config = RELEASED["gemma-4-12b"].config
    for fields, name in (({"enable_moe_block": True, "num_experts": 4, "top_k_experts": 1, "moe_intermediate_size": 8},
                          "enable_moe_block"), ({"hidden_size_per_layer_input": 8}, "hidden_size_per_layer_input")):
        refuses({**config, "text_config": {**config["text_config"], **fields}}, f"text_config.{name} is")


def test_gemma4_per_layer_inputs_are_on_unless_told():
    """The text class turns them on where the key is absent, the unified one does not (test_unified_defaults)."""
    config = RELEASED["gemma-4-e4b"].config
    text = without(config["text_config"], "hidden_size_per_layer_input", "vocab_size_per_layer_input")
    assert spec_of({**config, "text_config": text}) == spec_of(config)
    assert spec_of(tiny.flat("gemma4-e", hidden_size_per_layer_input=0)).per_layer_width == 0
