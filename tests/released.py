"""What is published about released models, to hold against what their configs (engine/models/presets.py) describe."""

from dataclasses import dataclass

from engine.models.presets import GLOBAL, PRESETS, SLIDING

__all__ = ["GLOBAL", "RELEASED", "SLIDING", "Released"]


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


RELEASED = {name: Released(PRESETS[name], *published) for name, published in {
    "gemma-3-270m": (268_098_176, 3, 15, 512, 256, 1 / 16, 3_072, 1_024, 32768),
    "gemma-3-1b": (999_885_952, 4, 22, 512, 256, 1 / 16, 4_096, 1_024, 32768),
    "gemma-3-4b": (3_880_263_168, 5, 29, 1024, 256, 1 / 16, 20_480, 4_096, 131072),
    "gemma-3-12b": (11_766_034_176, 8, 40, 1024, 256, 1 / 16, 65_536, 8_192, 131072),
    "gemma-3-27b": (27_009_346_304, 10, 52, 1024, 128, 0.0771517, 81_920, 8_192, 131072),
    "gemma-4-12b": (11_907_350_320, 8, 40, 1024, 512, 1.0, 16_384, 8_192, 262144),
    "gemma-4-31b": (30_697_345_340, 10, 50, 1024, 512, 1.0, 81_920, 16_384, 262144),
}.items()}
