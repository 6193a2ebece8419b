"""What turns pictures into soft tokens, as values. A new tower is a new spec type, and a branch in the encoder."""

from dataclasses import dataclass
from math import isqrt

GEMMA4_BUDGETS = (70, 140, 280, 560, 1120)      # soft tokens a picture may take. Source: HF image_processing_gemma4
CHANNELS = 3


class _Sizes:
    """What every tower knows about pictures; each has `title` and

    patch_side  pixels of a patch's side
    pool_side   patches of a soft token's side
    budgets     soft tokens that a picture may take at most, of which a request chooses one
    """

    @property
    def patch_width(self):
        """Values of a patch."""
        return CHANNELS * self.patch_side**2

    @property
    def block_side(self):
        """Pixels of a soft token's side."""
        return self.patch_side * self.pool_side

    @property
    def most_tokens(self):
        """Soft tokens of the largest picture."""
        return self.budgets[-1]

    @property
    def most_patches(self):
        """Patches of the largest picture."""
        return self.most_tokens * self.pool_side**2

    def __str__(self):
        """What it is, to people."""
        fewest, most = self.budgets[0], self.most_tokens
        return (f"{self.title}, {self.block_side} x {self.block_side} pixels a soft token, "
                + (f"{most} of them a picture" if fewest == most else f"at most {fewest} to {most} of them a picture"))


@dataclass(frozen=True)
class Gemma4TowerSpec(_Sizes):
    """Gemma 4's tower: patches in any aspect ratio, axial RoPE, sandwich norms, means of pool * pool patches.

    Attention scores are not scaled, v is normalised, there are as many KV heads as query heads.

    n_positions  columns, and rows, that have a position embedding
    clipped      inputs and outputs of a layer's seven linears are clamped to bounds of the checkpoint
    standardize  pooled states go through (x - std_bias) * std_scale
    """

    hidden: int
    intermediate: int
    n_layers: int
    n_heads: int
    head_dim: int
    patch: int = 16
    pool: int = 3
    n_positions: int = 10240
    norm_eps: float = 1e-6
    rope_theta: float = 100.0
    clipped: bool = False
    standardize: bool = False

    budgets = GEMMA4_BUDGETS

    @property
    def title(self):
        return (f"Gemma 4 tower of {self.n_layers} layers, hidden {self.hidden}, {self.n_heads} heads of "
                f"{self.head_dim}" + (", clipped linears" if self.clipped else ""))

    @property
    def patch_side(self):
        return self.patch

    @property
    def pool_side(self):
        return self.pool

    @property
    def q_width(self):
        return self.n_heads * self.head_dim


@dataclass(frozen=True)
class SiglipSpec(_Sizes):
    """Gemma 3's tower: a square picture, LayerNorms and biases, a mean over windows down to n_soft soft tokens.

    side    pixels of the picture's side
    n_soft  soft tokens of every picture, a square number
    """

    hidden: int
    intermediate: int
    n_layers: int
    n_heads: int
    patch: int = 14
    side: int = 896
    n_soft: int = 256
    norm_eps: float = 1e-6

    @property
    def title(self):
        return f"SigLIP tower of {self.n_layers} layers, hidden {self.hidden}, {self.n_heads} heads of {self.head_dim}"

    @property
    def budgets(self):
        return (self.n_soft,)

    @property
    def patch_side(self):
        return self.patch

    @property
    def grid(self):
        """Patches of the picture's side."""
        return self.side // self.patch

    @property
    def n_positions(self):
        return self.grid**2

    @property
    def pool_side(self):
        return self.grid // isqrt(self.n_soft)

    @property
    def head_dim(self):
        return self.hidden // self.n_heads

    @property
    def q_width(self):
        return self.hidden

    @property
    def scale(self):
        """Of attention scores."""
        return self.head_dim**-0.5


@dataclass(frozen=True)
class BlockEmbedderSpec(_Sizes):
    """Gemma 4 12B's embedder: no tower, each soft token is a block of pixels through one linear.

    block        pixels of a soft token's side
    n_positions  columns, and rows, that have a position embedding
    norm_eps     of the three LayerNorms; soft_eps: of the weight-less RMSNorm before the projection
    """

    hidden: int
    block: int = 48
    n_positions: int = 1120
    norm_eps: float = 1e-5
    soft_eps: float = 1e-6

    budgets = GEMMA4_BUDGETS
    pool_side = 1

    @property
    def title(self):
        return f"no tower: one linear, hidden {self.hidden}"

    @property
    def patch_side(self):
        return self.block


@dataclass(frozen=True)
class MediaSpec:
    """How pictures and videos stand in a prompt.

    tower        the spec of what encodes them
    image_token  id at the positions of a picture's soft tokens; video_token: of a video frame's, or None
    begin_image  id before each picture or frame; end_image: the one after it
    pad          id that is looked up at the positions of soft tokens
    unread       ids whose own rows are never looked up, but pad's: those of media, where a model generates one
    """

    tower: Gemma4TowerSpec | SiglipSpec | BlockEmbedderSpec
    image_token: int
    video_token: int | None
    begin_image: int
    end_image: int
    pad: int = 0
    unread: tuple = ()
