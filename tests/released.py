"""The config.json of released models, as far as their text decoder goes, and what is published about them.

Gemma 3: the technical report and the files of google/gemma-3-*; 4B leaves out whatever equals the class default.
Gemma 4: google/gemma-4-31B and -12B.
"""

from dataclasses import dataclass

SLIDING, GLOBAL = "sliding_attention", "full_attention"
GEMMA4_ROPE = {SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
               GLOBAL: {"rope_type": "proportional", "rope_theta": 1000000.0, "partial_rotary_factor": 0.25}}


@dataclass(frozen=True)
class Released:
    """n_params is of the text decoder. global_token_bytes is the bfloat16 K and V of one token in all global layers;
    sliding_token_bytes that of one sliding layer."""

    config: dict
    n_params: int
    n_global: int
    n_sliding: int
    window: int
    global_head_dim: int
    scale: float
    global_token_bytes: int
    sliding_token_bytes: int
    max_positions: int


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


RELEASED = {
    "gemma-3-270m": Released(
        _gemma3_text(hidden_size=640, intermediate_size=2048, num_hidden_layers=18, _sliding_window_pattern=6,
                     layer_types=([SLIDING] * 5 + [GLOBAL]) * 3, use_bidirectional_attention=False),
        268_098_176, 3, 15, 512, 256, 1 / 16, 3_072, 1_024, 32768),
    "gemma-3-1b": Released(
        _gemma3_text(hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, sliding_window_pattern=6),
        999_885_952, 4, 22, 512, 256, 1 / 16, 4_096, 1_024, 32768),
    "gemma-3-4b": Released(
        _gemma3_multimodal(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34),
        3_880_263_168, 5, 29, 1024, 256, 1 / 16, 20_480, 4_096, 131072),
    "gemma-3-12b": Released(
        _gemma3_multimodal(hidden_size=3840, intermediate_size=15360, num_hidden_layers=48, num_attention_heads=16,
                           num_key_value_heads=8),
        11_766_034_176, 8, 40, 1024, 256, 1 / 16, 65_536, 8_192, 131072),
    "gemma-3-27b": Released(
        _gemma3_multimodal(hidden_size=5376, intermediate_size=21504, num_hidden_layers=62, num_attention_heads=32,
                           num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168),
        27_009_346_304, 10, 52, 1024, 128, 0.0771517, 81_920, 8_192, 131072),
    "gemma-4-12b": Released(
        _gemma4("Gemma4UnifiedForConditionalGeneration", "gemma4_unified", 48, hidden_size=3840,
                intermediate_size=15360, num_attention_heads=16, num_key_value_heads=8, num_global_key_value_heads=1),
        11_907_350_320, 8, 40, 1024, 512, 1.0, 16_384, 8_192, 262144),
    "gemma-4-31b": Released(
        _gemma4("Gemma4ForConditionalGeneration", "gemma4", 60, hidden_size=5376, intermediate_size=21504,
                num_attention_heads=32, num_key_value_heads=16, num_global_key_value_heads=4),
        30_697_345_340, 10, 50, 1024, 512, 1.0, 81_920, 16_384, 262144),
}
