"""engine/models: config.json → ModelSpec. The field tables are held row by row; released shapes are exact."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest

from engine.errors import ConfigError
from engine.models import describe, gemma3, gemma4
from engine.models.fields import Ignored, Only, Used
from engine.models.registry import ARCHITECTURES, MODEL_TYPES
from engine.weights import n_weights
from loaders.config import Config
from tests import tiny
from tests.released import GLOBAL, RELEASED, SLIDING

ABSENT = object()
LINEAR = {"rope_type": "linear", "factor": 8.0}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
QUARTER = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}


def without(values, *keys):
    return {key: value for key, value in values.items() if key not in keys}


def spec_of(config):
    return describe(Config(config))


def refuses(config, *expected, by=describe):
    """`by` raises a ConfigError that holds every text of `expected`."""
    with pytest.raises(ConfigError) as caught:
        by(Config(config))
    for text in expected:
        assert text in str(caught.value)


# --- the field tables, row by row

@dataclass(frozen=True)
class Place:
    """Where a table holds: in `section` (None is the top level) of `config`, which `describe` reads."""

    describe: Callable
    table: dict
    config: dict
    section: str | None = None

    def changed(self, key, value):
        config = copy.deepcopy(self.config)
        fields = config[self.section] if self.section else config
        fields[key] = value
        if value is ABSENT:
            del fields[key]
        return config

    def spec(self, config=None):
        return self.describe(Config(self.config if config is None else config))

    def refuses(self, key, value):
        name = f"{self.section}.{key}" if self.section else key
        refuses(self.changed(key, value), f"config.json: {name}", by=self.describe)


GEMMA4 = without(tiny.flat("gemma4"), "layer_types")        # as nothing may hide a field: every sixth layer is global
GEMMA4_NESTED = {**tiny.nested("gemma4"), "text_config": without(GEMMA4, "architectures")}
PLACES = {
    "gemma3": Place(gemma3.describe_text, gemma3.TEXT_FIELDS, tiny.flat("gemma3")),
    "gemma3 top": Place(gemma3.describe_multimodal, gemma3.MULTIMODAL_FIELDS, tiny.nested("gemma3")),
    "gemma3 nested": Place(gemma3.describe_multimodal, gemma3.TEXT_FIELDS, tiny.nested("gemma3"), "text_config"),
    "gemma4": Place(gemma4.describe_text, gemma4.TEXT_FIELDS, GEMMA4),
    "gemma4 top": Place(gemma4.describe_multimodal, gemma4.MULTIMODAL_FIELDS, GEMMA4_NESTED),
    "gemma4 nested": Place(gemma4.describe_multimodal, gemma4.TEXT_FIELDS, GEMMA4_NESTED, "text_config"),
}


def rows(kind):
    return [pytest.param(place, key, id=f"{name}-{key}") for name, place in PLACES.items()
            for key, row in place.table.items() if isinstance(row, kind)]


@pytest.mark.parametrize(("place", "key"), rows(Ignored))
def test_ignored_fields_change_nothing(place, key):
    for value in ("odd", 12345, -0.5, True, [None, {}], {"a": 1}):
        assert place.spec(place.changed(key, value)) == place.spec()


@pytest.mark.parametrize(("place", "key"), rows(Only))
def test_fields_that_must_have_one_value(place, key):
    allowed = place.table[key].values
    for value in (*allowed, None):
        assert place.spec(place.changed(key, value)) == place.spec()
    for value in ("odd", 12345, 0.5, True, False, 0, [False], {}):
        if not any(value == one and type(value) is type(one) for one in allowed):
            place.refuses(key, value)


# Of every Used field: another legal value, which must change the ModelSpec, and values that must be refused by name.
# None as the legal value: there is no other.
WHOLE = ("8", 0, -1, 2.5, True, [8], 2**63)
NUMBER = ("1", 0, -1.0, True, float("inf"), float("nan"), 10**400, [1.0])
TRUTH = ("no", 0, 1, [True])
IDS = ("1", -1, [1, "x"], [True], 1.5, {})
USED_IN_TEXT = {
    "vocab_size": (72, WHOLE),
    "hidden_size": (48, WHOLE),
    "intermediate_size": (48, WHOLE),
    "num_hidden_layers": (7, (*WHOLE, 10**9)),
    "num_attention_heads": (8, WHOLE),
    "num_key_value_heads": (4, (*WHOLE, 3)),
    "head_dim": (24, (*WHOLE, 15)),
    "sliding_window": (6, WHOLE),
    "rms_norm_eps": (1e-5, NUMBER),
    "max_position_embeddings": (64, WHOLE),
    "final_logit_softcapping": (15.0, NUMBER),
    "tie_word_embeddings": (False, TRUTH),
    "eos_token_id": ([1, 106], IDS),
}
USED_IN_GEMMA3 = {
    **USED_IN_TEXT,
    "query_pre_attn_scalar": (24, NUMBER),
    "layer_types": ([GLOBAL] * 5, ("x", [], [SLIDING] * 4, [*[SLIDING] * 4, "chunked"], [[]] * 5)),
    "sliding_window_pattern": (3, WHOLE),
    "rope_theta": (5e5, NUMBER),
    "rope_local_base_freq": (2e4, NUMBER),
    "rope_scaling": ({"type": "linear", "factor": 4.0}, (
        "linear", {"rope_type": "yarn", "factor": 8.0}, {"rope_type": "linear"}, {"rope_type": "linear", "factor": 0},
        {"factor": 8.0}, {**LINEAR, "low_freq_factor": 1.0}, {**LINEAR, "rope_theta": "x"})),
    "rope_parameters": ({GLOBAL: {**LINEAR, "rope_theta": 5e5}}, (
        "x", LINEAR, {"chunked_attention": {}}, {SLIDING: LINEAR}, {GLOBAL: 8.0}, {GLOBAL: {"rope_type": "yarn"}},
        {GLOBAL: {"rope_type": "default", "factor": 8.0}}, {GLOBAL: {**LINEAR, "beta_fast": 1.0}})),
}
USED_IN_GEMMA4 = {
    **USED_IN_TEXT,
    "layer_types": ([GLOBAL] * 6, ("x", [], [SLIDING] * 5, [*[SLIDING] * 5, "chunked"], [[]] * 6)),
    "global_head_dim": (48, (*WHOLE, 15)),
    "num_global_key_value_heads": (2, (*WHOLE, 3)),
    "attention_k_eq_v": (False, TRUTH),
    "per_layer_config": ({"2": {"head_dim": 48}}, (
        "x", {"6": {}}, {"-1": {}}, {"two": {}}, {"2": 32}, {"2": {"head_dim": 15}}, {"2": {}, "02": {}},
        {"2": {"num_key_value_heads": 3}}, {"2": {"sliding_window": 4}})),
    "hidden_size_per_layer_input": (None, (256, ABSENT, "0", -1, False)),
    "rope_parameters": ({SLIDING: PLAIN, GLOBAL: {**QUARTER, "factor": 2.0}}, (
        "x", PLAIN, {SLIDING: PLAIN}, {SLIDING: PLAIN, GLOBAL: QUARTER, "chunked_attention": {}},
        *({SLIDING: sliding, GLOBAL: QUARTER} for sliding in (
            {**PLAIN, "partial_rotary_factor": 0.5}, {**PLAIN, "factor": 8.0}, without(PLAIN, "rope_type"),
            without(PLAIN, "rope_theta"))),
        *({SLIDING: PLAIN, GLOBAL: rope} for rope in (
            {**QUARTER, "partial_rotary_factor": 1.5}, without(QUARTER, "partial_rotary_factor"),
            {**QUARTER, "rope_type": "llama3"}, {**QUARTER, "beta_fast": 1.0})))),
}


def used_on_top(family):
    return {"text_config": (without(tiny.flat(family, hidden_size=48), "architectures"), ("x", [], ABSENT)),
            "tie_word_embeddings": (False, TRUTH), "eos_token_id": (7, IDS)}


USED = {
    "gemma3": USED_IN_GEMMA3,
    "gemma3 top": used_on_top("gemma3"),
    "gemma3 nested": {**USED_IN_GEMMA3, "final_logit_softcapping": (None, (30.0,))},
    "gemma4": USED_IN_GEMMA4,
    "gemma4 top": used_on_top("gemma4"),
    "gemma4 nested": USED_IN_GEMMA4,
}


@pytest.mark.parametrize("name", PLACES)
def test_every_used_field_is_tried(name):
    assert set(USED[name]) == {key for key, row in PLACES[name].table.items() if isinstance(row, Used)}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, used in USED.items() for key in used])
def test_used_fields_count_and_are_checked(name, key):
    place, (other, illegal) = PLACES[name], USED[name][key]
    if other is not None:
        assert place.spec(place.changed(key, other)) != place.spec()
    for value in illegal:
        place.refuses(key, value)


@pytest.mark.parametrize("name", PLACES)
def test_unknown_fields(name):
    place = PLACES[name]
    place.refuses("attention_multiplier", 0.5)
    assert place.spec(place.changed("attention_multiplier", None)) == place.spec()


# --- which model

@pytest.mark.parametrize(("config", "expected"), [
    ({"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4"}, 'architectures is ["Llama4For'),
    ({"architectures": ["Gemma3TextModel"], "model_type": "gemma3_text"}, 'architectures is ["Gemma3TextModel"]'),
    ({"architectures": "Gemma3ForCausalLM"}, "expected a list"),
    ({"architectures": [["Gemma3ForCausalLM"]]}, 'architectures is [["Gemma3ForCausalLM"]]'),
    ({"model_type": "llama4"}, 'model_type is "llama4", expected one of gemma3_text, gemma3'),
    ({"model_type": 3}, "model_type is 3"),
    ({"architectures": [], "hidden_size": 8}, "architectures is [], expected one of Gemma3ForCausalLM"),
    ({"hidden_size": 8}, "architectures is missing, expected one of Gemma3ForCausalLM"),
    ({**tiny.flat("gemma3"), "model_type": "gemma4_text"}, "model_type"),
])
def test_models_that_are_not_supported(config, expected):
    refuses(config, "config.json: ", expected)


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
@pytest.mark.parametrize("form", [tiny.flat, tiny.nested])
def test_the_architecture_may_be_named_by_model_type(form, family):
    config = form(family)
    assert spec_of(without(config, "architectures")) == spec_of({**config, "architectures": []}) == spec_of(config)
    assert spec_of(without(config, "model_type")) == spec_of(config)
    assert spec_of({**config, "architectures": ["MyWrapper", *config["architectures"]]}) == spec_of(config)


def test_every_architecture_has_a_model_type():
    assert sorted(MODEL_TYPES.values()) == sorted(ARCHITECTURES)


@pytest.mark.parametrize(("fields", "expected"), [
    ({"enable_moe_block": True, "num_experts": 128}, ("text_config.enable_moe_block is true", "26B-A4B")),
    ({"hidden_size_per_layer_input": 256}, ("text_config.hidden_size_per_layer_input is 256", "E2B, E4B")),
    ({"num_kv_shared_layers": 20}, ("text_config.num_kv_shared_layers is 20", "E2B, E4B")),
    ({"use_double_wide_mlp": True}, ("text_config.use_double_wide_mlp is true", "E2B")),
    ({"use_bidirectional_attention": "all"}, ('text_config.use_bidirectional_attention is "all"',)),
    ({"quantization_config": {"quant_method": "fp8"}}, ("text_config.quantization_config", "quantised")),
])
def test_gemma4_variants_that_are_not_supported(fields, expected):
    refuses(tiny.nested("gemma4", **fields), *expected)


def test_other_models_that_are_not_supported():
    refuses(tiny.flat("gemma3", use_bidirectional_attention=True), "use_bidirectional_attention is true", "embedding")
    for config in (tiny.flat("gemma3"), tiny.nested("gemma4")):
        refuses({**config, "quantization_config": {"quant_method": "modelopt"}}, "quantization_config", "quantised")


# --- released models

@pytest.mark.parametrize("name", RELEASED)
def test_released_shapes(name):
    released = RELEASED[name]
    spec = spec_of(released.config)
    by_kind = {is_global: [layer.attention for layer in spec.layers if (layer.attention.window is None) is is_global]
               for is_global in (True, False)}
    assert (len(by_kind[True]), len(by_kind[False])) == (released.n_global, released.n_sliding)
    assert [i for i, layer in enumerate(spec.layers) if layer.attention.window is None] == \
        list(range(5, len(spec.layers), 6))
    assert {attention.window for attention in by_kind[False]} == {released.window}
    assert {attention.head_dim for attention in by_kind[True]} == {released.global_head_dim}
    assert {round(layer.attention.scale, 7) for layer in spec.layers} == {released.scale}
    assert n_weights(spec) == released.n_params
    assert spec.max_positions == released.max_positions
    assert spec.eos_ids == (1, 106)
    assert spec.tied and spec.norm_eps == 1e-6
    assert spec.logit_softcap == (30.0 if spec.architecture == "gemma4" else None)


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


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
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
