"""engine/models: the tables of config.json's fields, row by row."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from engine.models import describe, gemma3, gemma4, gemma4_assistant, llama4, vision
from engine.models.fields import Ignored, Only, Used
from loaders.config import Config
from tests import tiny
from tests.configs import ABSENT, LINEAR, PLAIN, QUARTER, refuses, without
from tests.released import GLOBAL, SLIDING


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


# Nothing may hide a field: every sixth layer is global, and one model has all that Gemma 4 can have.
GEMMA4 = {**without(tiny.flat("gemma4-e"), "layer_types"), "attention_k_eq_v": True, "num_global_key_value_heads": 1,
          "num_hidden_layers": 12, "num_kv_shared_layers": 4,
          **{key: tiny.flat("gemma4-moe")[key] for key in ("enable_moe_block", "num_experts", "top_k_experts",
                                                           "moe_intermediate_size")}}
GEMMA4_NESTED = {**tiny.seeing("gemma4"), "text_config": without(GEMMA4, "architectures")}
DRAFT, DRAFT_TARGET = tiny.draft("gemma4"), describe(Config(tiny.flat("gemma4")))


def describe_draft(config):
    return gemma4_assistant.describe_assistant(config, DRAFT_TARGET)


PLACES = {
    "gemma3": Place(gemma3.describe_text, gemma3.TEXT_FIELDS, tiny.flat("gemma3")),
    "gemma3 top": Place(gemma3.describe_multimodal, gemma3.MULTIMODAL_FIELDS, tiny.seeing("gemma3")),
    "gemma3 nested": Place(gemma3.describe_multimodal, gemma3.TEXT_FIELDS, tiny.nested("gemma3"), "text_config"),
    "gemma4": Place(gemma4.describe_text, gemma4.TEXT_FIELDS, GEMMA4),
    "gemma4 top": Place(gemma4.describe_multimodal, gemma4.MULTIMODAL_FIELDS, GEMMA4_NESTED),
    "draft top": Place(describe_draft, gemma4_assistant.FIELDS, DRAFT),
    "draft nested": Place(describe_draft, gemma4_assistant.TEXT_FIELDS, DRAFT, "text_config"),
    "gemma4 nested": Place(gemma4.describe_multimodal, gemma4.SEEING_TEXT_FIELDS, GEMMA4_NESTED, "text_config"),
    "gemma3 vision": Place(gemma3.describe_multimodal, vision.SIGLIP_FIELDS, tiny.seeing("gemma3"), "vision_config"),
    "gemma4 vision": Place(gemma4.describe_multimodal, vision.GEMMA4_FIELDS, tiny.seeing("gemma4"), "vision_config"),
    "unified vision": Place(gemma4.describe_unified, vision.UNIFIED_FIELDS, tiny.seeing("unified"), "vision_config"),
    "llama4": Place(llama4.describe_text, llama4.TEXT_FIELDS, tiny.flat("llama4")),
    "llama4 top": Place(llama4.describe_multimodal, llama4.MULTIMODAL_FIELDS, tiny.nested("llama4")),
    "llama4 nested": Place(llama4.describe_multimodal, llama4.TEXT_FIELDS, tiny.nested("llama4"), "text_config"),
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
    "num_hidden_layers": (13, (*WHOLE, 10**9)),
    "layer_types": ([GLOBAL] * 12, ("x", [], [SLIDING] * 11, [*[SLIDING] * 11, "chunked"], [[]] * 12)),
    "global_head_dim": (48, (*WHOLE, 15)),
    "num_global_key_value_heads": (2, (*WHOLE, 3)),
    "attention_k_eq_v": (False, TRUTH),
    "per_layer_config": ({"2": {"head_dim": 48}}, (
        "x", {"12": {}}, {"-1": {}}, {"two": {}}, {"2": 32}, {"2": {"head_dim": 15}}, {"2": {}, "02": {}},
        {"2": {"num_key_value_heads": 3}}, {"2": {"sliding_window": 4}}, {"5": {"head_dim": 48}})),
    "hidden_size_per_layer_input": (16, ("0", -1, False)),
    "vocab_size_per_layer_input": (64, (*WHOLE, 63)),
    "num_kv_shared_layers": (3, ("4", -1, 2.5, True, [3], 2**63, 7, 12, 13)),       # 7 leave no global layer its own
    "use_double_wide_mlp": (False, TRUTH),
    "enable_moe_block": (False, TRUTH),
    "num_experts": (16, (*WHOLE, ABSENT)),
    "top_k_experts": (3, (*WHOLE, ABSENT, 9)),
    "moe_intermediate_size": (16, (*WHOLE, ABSENT)),
    "rope_parameters": ({SLIDING: PLAIN, GLOBAL: {**QUARTER, "factor": 2.0}}, (
        "x", PLAIN, {SLIDING: PLAIN}, {SLIDING: PLAIN, GLOBAL: QUARTER, "chunked_attention": {}},
        *({SLIDING: sliding, GLOBAL: QUARTER} for sliding in (
            {**PLAIN, "partial_rotary_factor": 0.5}, {**PLAIN, "factor": 8.0}, without(PLAIN, "rope_type"),
            without(PLAIN, "rope_theta"))),
        *({SLIDING: PLAIN, GLOBAL: rope} for rope in (
            {**QUARTER, "partial_rotary_factor": 1.5}, without(QUARTER, "partial_rotary_factor"),
            {**QUARTER, "rope_type": "llama3"}, {**QUARTER, "beta_fast": 1.0})))),
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
USED_IN_LLAMA4 = {
    **without(USED_IN_TEXT, "sliding_window", "final_logit_softcapping"),
    "tie_word_embeddings": (True, TRUTH),
    "rms_norm_eps": (1e-6, NUMBER),
    "intermediate_size_mlp": (48, WHOLE),
    "num_local_experts": (16, WHOLE),
    "num_experts_per_tok": (2, (*WHOLE, 9)),
    "interleave_moe_layer_step": (3, WHOLE),
    "moe_layers": ([0], ("x", ["1"], [6], [-1], [1, 1], [True], [1.0])),
    "no_rope_layers": ([1, 1, 0, 1, 1, 1], ("x", [1] * 5, [1] * 7, [2] * 6, [True] * 6, ["1"] * 6)),
    "no_rope_layer_interval": (3, WHOLE),
    "layer_types": (None, ("x", [], ["chunked_attention"] * 6, [GLOBAL] * 6, ["chunked_attention"] * 3, [SLIDING] * 6)),
    "attention_chunk_size": (16, (*WHOLE, None)),
    "use_qk_norm": (False, TRUTH),
    "attn_temperature_tuning": (False, ("yes", 1.0, [True])),
    "floor_scale": (6, WHOLE),
    "attn_scale": (0.2, NUMBER),
    "attention_multiplier": (None, (*NUMBER, 0.5)),
    "rope_theta": (1e4, NUMBER),
    "rope_scaling": (LLAMA3, (
        "llama3", {**LLAMA3, "rope_type": "yarn"}, {**LLAMA3, "beta_fast": 1.0}, {**LLAMA3, "high_freq_factor": 0.5},
        {"factor": 8.0}, {**LLAMA3, "rope_theta": "x"}, *(without(LLAMA3, key) for key in LLAMA3))),
    "rope_parameters": (None, ("x", {**LLAMA3, "rope_type": "linear"}, {**LLAMA3, "rope_theta": 0})),
}


ROPE = {"rope_type": "default", "rope_theta": 100.0}
USED_IN_SIGLIP = {
    "hidden_size": (32, (*WHOLE, ABSENT)),
    "intermediate_size": (32, (*WHOLE, ABSENT)),
    "num_hidden_layers": (3, (*WHOLE, ABSENT, 10**9)),
    "num_attention_heads": (4, (*WHOLE, ABSENT, 5)),
    "image_size": (48, (*WHOLE, ABSENT, 26, 20)),           # no whole patches; 5 x 5 of them for 3 x 3 soft tokens
    "patch_size": (2, (*WHOLE, ABSENT)),
    "layer_norm_eps": (1e-5, NUMBER),
}
USED_IN_TOWER = {
    "hidden_size": (32, (*WHOLE, ABSENT)),
    "intermediate_size": (32, (*WHOLE, ABSENT)),
    "num_hidden_layers": (3, (*WHOLE, ABSENT, 10**9)),
    "num_attention_heads": (None, WHOLE),
    "num_key_value_heads": (None, (*WHOLE, 1, 4)),
    "head_dim": (32, (*WHOLE, 18)),
    "patch_size": (4, WHOLE),
    "pooling_kernel_size": (2, WHOLE),
    "position_embedding_size": (100, WHOLE),
    "rms_norm_eps": (1e-5, NUMBER),
    "rope_parameters": ({**ROPE, "rope_theta": 50.0}, (
        "x", {**ROPE, "rope_type": "linear"}, {**ROPE, "rope_theta": 0}, {**ROPE, "factor": 2.0},
        {"full_attention": ROPE, "sliding_attention": ROPE}, {"full_attention": {**ROPE, "factor": 2.0}})),
    "standardize": (False, TRUTH),
    "use_clipped_linears": (False, TRUTH),
}
USED_IN_EMBEDDER = {
    "patch_size": (4, WHOLE),
    "pooling_kernel_size": (2, WHOLE),
    "model_patch_size": (None, (*WHOLE, 7)),
    "mm_embed_dim": (32, WHOLE),
    "mm_posemb_size": (80, WHOLE),
    "rms_norm_eps": (1e-5, NUMBER),
}
TOKEN = ("60", -1, 2.5, True, [60], 2**63, 64)


def seeing_on_top(family, *ids):
    """What a file with a vision part says at its top level."""
    return {**used_on_top(family), **dict.fromkeys(ids, (63, TOKEN)),
            "vision_config": ({**tiny.VISION[family], "hidden_size": 32}, ("x", [], 5))}


def used_on_top(family):
    tied = tiny.flat(family).get("tie_word_embeddings")
    return {"text_config": (without(tiny.flat(family, hidden_size=48), "architectures"), ("x", [], ABSENT)),
            "tie_word_embeddings": (False if tied is None else None, TRUTH), "eos_token_id": (7, IDS)}


# What a draft must share with its target has no other legal value.
USED_IN_DRAFT = {
    **{key: (None, USED_IN_GEMMA4[key][1]) for key in (
        "vocab_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "global_head_dim", "rope_parameters",
        "num_global_key_value_heads", "attention_k_eq_v", "sliding_window")},
    **{key: USED_IN_TEXT[key] for key in ("intermediate_size", "num_attention_heads", "rms_norm_eps")},
    "hidden_size": (24, WHOLE),
    "layer_types": ([GLOBAL] * 3, ("x", [], [SLIDING] * 2, [SLIDING, SLIDING, "chunked"], [[]] * 3, ABSENT)),
    "per_layer_config": (None, ("x", {"3": {}}, {"-1": {}}, {"2": 32}, {"2": {"head_dim": 15}}, {"2": {}, "02": {}})),
    "num_kv_shared_layers": (None, ("3", -1, 2.5, True, [3], 2**63, 1, 2, 4)),
}
USED_ON_TOP_OF_DRAFT = {
    "text_config": (tiny.draft("gemma4", hidden_size=24)["text_config"], ("x", [], ABSENT)),
    "backbone_hidden_size": (None, (*WHOLE, 48, ABSENT)),
    "use_ordered_embeddings": (False, TRUTH),
    "num_centroids": (4, (*WHOLE, 5)),
    "centroid_intermediate_top_k": (2, (*WHOLE, 9)),
}
USED = {
    "draft top": USED_ON_TOP_OF_DRAFT,
    "draft nested": USED_IN_DRAFT,
    "gemma3": USED_IN_GEMMA3,
    "gemma3 top": {**seeing_on_top("gemma3", "image_token_index", "boi_token_index", "eoi_token_index"),
                   **dict.fromkeys(["image_token_id", "boi_token_id", "eoi_token_id"], (None, (*TOKEN, 63))),
                   "mm_tokens_per_image": (4, (*WHOLE, 8))},
    "gemma3 nested": {**USED_IN_GEMMA3, "final_logit_softcapping": (None, (30.0,))},
    "gemma4": USED_IN_GEMMA4,
    "gemma4 top": {**seeing_on_top("gemma4", "image_token_id", "boi_token_id", "eoi_token_id"),
                   # One behind the vocabulary is none at all.
                   **dict.fromkeys(["video_token_id", "audio_token_id"], (63, TOKEN[:-1]))},
    "gemma4 nested": {**USED_IN_GEMMA4, "pad_token_id": (3, (-1, "0", 2.5, True, [0], 64)),
                      "use_bidirectional_attention": ("vision", ("all", True, 1, ["vision"]))},
    "gemma3 vision": USED_IN_SIGLIP,
    "gemma4 vision": USED_IN_TOWER,
    "unified vision": USED_IN_EMBEDDER,
    "llama4": USED_IN_LLAMA4,
    "llama4 top": used_on_top("llama4"),
    "llama4 nested": USED_IN_LLAMA4,
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
    place.refuses("residual_multiplier", 0.5)
    assert place.spec(place.changed("residual_multiplier", None)) == place.spec()
