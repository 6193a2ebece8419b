"""Shapes by name: the config.json of released models, as far as their text decoder goes.

Gemma 3: the technical report (arXiv:2503.19786) and the files of google/gemma-3-*; 4B leaves out whatever equals the
class default. Gemma 4: google/gemma-4-31B and -12B.
"""

from engine.errors import ConfigError
from engine.models.registry import describe
from loaders.config import Config

SLIDING, GLOBAL = "sliding_attention", "full_attention"
GEMMA4_ROPE = {SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
               GLOBAL: {"rope_type": "proportional", "rope_theta": 1000000.0, "partial_rotary_factor": 0.25}}


def _gemma3_text(**fields):
    return {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attention_bias": False,
            "attention_dropout": 0.0, "attn_logit_softcapping": None, "bos_token_id": 2, "eos_token_id": [1, 106],
            "cache_implementation": "hybrid", "final_logit_softcapping": None, "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02, "max_position_embeddings": 32768,
            "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
            "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "torch_dtype": "bfloat16",
            "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 262144, "num_attention_heads": 4,
            "num_key_value_heads": 1, **fields}


def _gemma3_multimodal(**fields):
    return {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "boi_token_index": 255999,
            "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
            "initializer_range": 0.02, "mm_tokens_per_image": 256, "torch_dtype": "bfloat16",
            "transformers_version": "4.50.0.dev0",
            "text_config": {"model_type": "gemma3_text", "sliding_window": 1024,
                            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, **fields},
            "vision_config": {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
                              "model_type": "siglip_vision_model", "num_attention_heads": 16,
                              "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False}}


def _gemma4(architecture, model_type, n_layers, **fields):
    return {"architectures": [architecture], "model_type": model_type, "audio_config": None, "audio_token_id": 258881,
            "boa_token_id": 256000, "boi_token_id": 255999, "dtype": "bfloat16", "eoa_token_index": 258883,
            "eoi_token_id": 258882, "eos_token_id": [1, 106], "image_token_id": 258880, "initializer_range": 0.02,
            "tie_word_embeddings": True, "video_token_id": 258884, "vision_config": {"hidden_size": 1152},
            "text_config": {
                "attention_bias": False, "attention_dropout": 0.0, "attention_k_eq_v": True, "bos_token_id": 2,
                "dtype": "bfloat16", "enable_moe_block": False, "eos_token_id": 1, "final_logit_softcapping": 30.0,
                "global_head_dim": 512, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
                "hidden_size_per_layer_input": 0, "initializer_range": 0.02,
                "layer_types": ([SLIDING] * 5 + [GLOBAL]) * (n_layers // 6), "max_position_embeddings": 262144,
                "model_type": model_type + "_text", "moe_intermediate_size": None, "num_experts": None,
                "num_hidden_layers": n_layers, "num_kv_shared_layers": 0, "pad_token_id": 0, "rms_norm_eps": 1e-06,
                "rope_parameters": GEMMA4_ROPE, "sliding_window": 1024, "tie_word_embeddings": True,
                "top_k_experts": None, "use_bidirectional_attention": "vision", "use_cache": True,
                "use_double_wide_mlp": False, "vocab_size": 262144, "vocab_size_per_layer_input": 262144, **fields}}


PRESETS = {
    "gemma-3-270m": _gemma3_text(
        hidden_size=640, intermediate_size=2048, num_hidden_layers=18, _sliding_window_pattern=6,
        layer_types=([SLIDING] * 5 + [GLOBAL]) * 3, use_bidirectional_attention=False),
    "gemma-3-1b": _gemma3_text(
        hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, sliding_window_pattern=6),
    "gemma-3-4b": _gemma3_multimodal(
        hidden_size=2560, intermediate_size=10240, num_hidden_layers=34),
    "gemma-3-12b": _gemma3_multimodal(
        hidden_size=3840, intermediate_size=15360, num_hidden_layers=48, num_attention_heads=16, num_key_value_heads=8),
    "gemma-3-27b": _gemma3_multimodal(
        hidden_size=5376, intermediate_size=21504, num_hidden_layers=62, num_attention_heads=32, num_key_value_heads=16,
        head_dim=128, query_pre_attn_scalar=168),
    "gemma-4-12b": _gemma4(
        "Gemma4UnifiedForConditionalGeneration", "gemma4_unified", 48, hidden_size=3840, intermediate_size=15360,
        num_attention_heads=16, num_key_value_heads=8, num_global_key_value_heads=1),
    "gemma-4-31b": _gemma4(
        "Gemma4ForConditionalGeneration", "gemma4", 60, hidden_size=5376, intermediate_size=21504,
        num_attention_heads=32, num_key_value_heads=16, num_global_key_value_heads=4),
}


def preset(name):
    """The ModelSpec of a released model. Raises ConfigError for a name that is none of PRESETS."""
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}, expected one of {', '.join(PRESETS)}")
    return describe(Config(PRESETS[name], name))
