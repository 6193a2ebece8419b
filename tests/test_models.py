"""engine/models: config.json → ModelSpec. Every field of the tables is held, row by row; released shapes are exact."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest

from engine.errors import ConfigError
from engine.models import describe, gemma3, gemma4
from engine.models.fields import Ignored, Only, Used
from engine.models.registry import ARCHITECTURES
from engine.weights import n_weights
from loaders.config import Config
from tests import tiny
from tests.released import GLOBAL, RELEASED, SLIDING

ABSENT = object()


def spec_of(config):
    return describe(Config(config))


def refuses(config, *expected):
    """describe() raises a ConfigError that holds every text of `expected`."""
    with pytest.raises(ConfigError) as caught:
        spec_of(config)
    for text in expected:
        assert text in str(caught.value)


# --- the field tables, row by row. A place is where a table applies: (function, table, config, section or None).

def _table_config(family, form):
    """A config in which nothing hides a field: no layer_types, and ids of text ends in the text section."""
    fields = {"layer_types": ABSENT, "num_hidden_layers": 6, "sliding_window_pattern": 6} if family == "gemma3" else {}
    return {key: value for key, value in form(family, **fields).items() if value is not ABSENT}


PLACES = {
    "gemma3 flat": (gemma3.describe_text, gemma3.TEXT_FIELDS, tiny.flat("gemma3"), None),
    "gemma3 top": (gemma3.describe_multimodal, gemma3.MULTIMODAL_FIELDS, tiny.nested("gemma3"), None),
    "gemma3 nested": (gemma3.describe_multimodal, gemma3.TEXT_FIELDS, tiny.nested("gemma3"), "text_config"),
    "gemma4 flat": (gemma4.describe_text, gemma4.TEXT_FIELDS, tiny.flat("gemma4"), None),
    "gemma4 top": (gemma4.describe_multimodal, gemma4.MULTIMODAL_FIELDS, tiny.nested("gemma4"), None),
    "gemma4 nested": (gemma4.describe_multimodal, gemma4.TEXT_FIELDS, tiny.nested("gemma4"), "text_config"),
    "gemma4 unified": (gemma4.describe_unified, gemma4.TEXT_FIELDS, tiny.nested("gemma4"), "text_config"),
}

WHOLE = ("8", 0, -1, 2.5, True, [8])
NUMBER = ("1", 0, -1.0, True, float("inf"), float("nan"), 10**400, [1.0])
TRUTH = ("no", 0, 1, [True])
IDS = ("1", -1, [1, "x"], [True], 1.5, {})
LINEAR = {"rope_type": "linear", "factor": 8.0}
QUARTER = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}

# Of every Used field: another legal value, which must change the ModelSpec, and values that must be refused.
USED_BY_BOTH = {
    "vocab_size": (72, WHOLE),
    "hidden_size": (48, WHOLE),
    "intermediate_size": (48, WHOLE),
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
USED = {
    "gemma3": {
        **USED_BY_BOTH,
        "num_hidden_layers": (6, WHOLE),
        "query_pre_attn_scalar": (24, NUMBER),
        "layer_types": ([SLIDING] * 4 + [GLOBAL], ("x", [], [SLIDING] * 4, [SLIDING] * 4 + ["chunked"], [[]] * 5)),
        "sliding_window_pattern": (3, WHOLE),
        "rope_theta": (5e5, NUMBER),
        "rope_local_base_freq": (2e4, NUMBER),
        "rope_scaling": ({"type": "linear", "factor": 4.0},
                         ("linear", {**LINEAR, "rope_type": "yarn"}, {"rope_type": "linear"}, {**LINEAR, "factor": 0},
                          {**LINEAR, "low_freq_factor": 1.0}, {"factor": 8.0}, {**LINEAR, "rope_theta": "x"})),
        "rope_parameters": ({GLOBAL: {**LINEAR, "rope_theta": 5e5}},
                            ("x", {"chunked": {}}, LINEAR, {SLIDING: LINEAR}, {GLOBAL: {**LINEAR, "type": "x", "beta": 1}},
                             {GLOBAL: {"rope_type": "yarn"}}, {GLOBAL: {**LINEAR, "factor": 4.0}}, {GLOBAL: 8.0})),
    },
    "gemma4": {
        **USED_BY_BOTH,
        "num_hidden_layers": (ABSENT, WHOLE),
        "layer_types": ([SLIDING] * 5 + [GLOBAL], ("x", [], [SLIDING] * 5, [SLIDING] * 5 + ["chunked"], [[]] * 6)),
        "global_head_dim": (48, (*WHOLE, 15)),
        "num_global_key_value_heads": (2, (*WHOLE, 3)),
        "attention_k_eq_v": (False, TRUTH),
        "per_layer_config": ({"2": {"head_dim": 32}, "05": {"head_dim": 48, "num_key_value_heads": 4}},
                             ("x", {"6": {}}, {"-1": {}}, {"two": {}}, {"2": 32}, {"2": {"head_dim": 15}}, {"2": {}, "02": {}},
                              {"2": {"num_key_value_heads": 3}}, {"2": {"sliding_window": 4}})),
        "hidden_size_per_layer_input": (ABSENT, (256, *WHOLE[2:], "0")),
        "rope_parameters": ({SLIDING: PLAIN, GLOBAL: {**QUARTER, "factor": 2.0}},
                            ("x", {SLIDING: PLAIN}, PLAIN, {SLIDING: PLAIN, GLOBAL: QUARTER, "chunked": {}},
                             {SLIDING: PLAIN, GLOBAL: {**QUARTER, "partial_rotary_factor": 1.5}},
                             {SLIDING: {**PLAIN, "partial_rotary_factor": 0.5}, GLOBAL: QUARTER},
                             {SLIDING: {**PLAIN, "factor": 8.0}, GLOBAL: QUARTER},
                             {SLIDING: {"rope_theta": 1e4}, GLOBAL: QUARTER},
                             {SLIDING: {"rope_type": "default"}, GLOBAL: QUARTER},
                             {SLIDING: PLAIN, GLOBAL: {"rope_type": "proportional", "rope_theta": 1e6}},
                             {SLIDING: PLAIN, GLOBAL: {**QUARTER, "rope_type": "llama3"}})),
    },
    "top": {
        "text_config": (ABSENT, ("x", [], ABSENT)),
        "tie_word_embeddings": (False, TRUTH),
        "eos_token_id": ([1, 106], IDS),
    },
}
ABSENT_MEANS = {"num_hidden_layers": "refused", "hidden_size_per_layer_input": "refused"}
