"""What is published about released models, to hold against what their configs (engine/models/presets.py) describe."""

from dataclasses import dataclass

from engine.models.presets import GLOBAL, PRESETS, SLIDING

__all__ = ["GLOBAL", "N_PUBLISHED", "N_SCALARS", "N_VISION", "RELEASED", "SLIDING", "VISION", "Released"]


@dataclass(frozen=True)
class Released:
    """n_params is of the text decoder. Layers are global or local, with a window or a chunk of so many tokens; `owners`
    counts those with K and V of their own, where not all have. global_token_bytes is the bfloat16 K and V of one token
    in all global layers; local_token_bytes that of one local layer."""

    config: dict
    n_params: int
    n_global: int
    n_local: int
    reach: int
    global_head_dim: int
    scale: float
    global_token_bytes: int
    local_token_bytes: int
    max_positions: int
    owners: tuple | None = None

    @property
    def n_owners(self):
        """(global, local) layers with K and V of their own."""
        return self.owners or (self.n_global, self.n_local)


RELEASED = {name: Released(PRESETS[name], *published) for name, published in {
    "gemma-3-270m": (268_098_176, 3, 15, 512, 256, 1 / 16, 3_072, 1_024, 32768),
    "gemma-3-1b": (999_885_952, 4, 22, 512, 256, 1 / 16, 4_096, 1_024, 32768),
    "gemma-3-4b": (3_880_263_168, 5, 29, 1024, 256, 1 / 16, 20_480, 4_096, 131072),
    "gemma-3-12b": (11_766_034_176, 8, 40, 1024, 256, 1 / 16, 65_536, 8_192, 131072),
    "gemma-3-27b": (27_009_346_304, 10, 52, 1024, 128, 0.0771517, 81_920, 8_192, 131072),
    "gemma-4-e2b": (4_628_569_379, 7, 28, 512, 512, 1.0, 6_144, 1_024, 131072, (3, 12)),
    "gemma-4-e4b": (7_463_013_418, 7, 35, 512, 512, 1.0, 16_384, 2_048, 131072, (4, 20)),
    "gemma-4-12b": (11_907_350_320, 8, 40, 1024, 512, 1.0, 16_384, 8_192, 262144),
    "gemma-4-26b-a4b": (25_233_141_790, 5, 25, 1024, 512, 1.0, 20_480, 8_192, 262144),
    "gemma-4-31b": (30_697_345_340, 10, 50, 1024, 512, 1.0, 81_920, 16_384, 262144),
    "llama-4-scout": (107_769_861_120, 12, 36, 8192, 128, 0.0883883, 49_152, 4_096, 10485760),
    "llama-4-maverick": (400_711_848_960, 12, 36, 8192, 128, 0.0883883, 49_152, 4_096, 1048576),
}.items()}

# Of models that see: elements of tower and projector, 0-d clip bounds beside them, and what the files hold in all, 0-d
# ones not counted: more than text and vision where there also is an audio part, or K and V that no layer reads.
VISION = {
    "gemma-3-4b": (419_816_304, 0, 4_300_079_472),
    "gemma-3-12b": (421_290_864, 0, 12_187_325_040),
    "gemma-3-27b": (423_060_336, 0, 27_432_406_640),
    "gemma-4-e2b": (167_364_608 + 1_179_648, 448, 5_123_178_051),
    "gemma-4-e4b": (167_364_608 + 1_966_080, 448, 7_996_156_490),
    "gemma-4-12b": (49_922_304, 0, 11_959_730_224),
    "gemma-4-26b-a4b": (569_550_384 + 3_244_032, 0, 25_805_936_206),
    "gemma-4-31b": (569_550_384 + 6_193_152, 0, 31_273_088_876),
}
N_VISION, N_SCALARS, N_PUBLISHED = ({name: counts[i] for name, counts in VISION.items()} for i in range(3))
