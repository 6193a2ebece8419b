"""What a model is, as values. A new variant is a new spec type, and a branch in the layer scheduler that knows it."""

from dataclasses import dataclass, replace

import numpy as np

from engine.models.vision_spec import MediaSpec


@dataclass(frozen=True)
class Llama3Scaling:
    """Frequencies that turn `high` times or more within the original context stay, those that turn `low` times or less
    are divided, and those between are blended. Source: HF modeling_rope_utils, _compute_llama3_parameters.

    low, high           turns within original_max_positions; where they are equal nothing is blended
    """

    low: float
    high: float
    original_max_positions: int

    def kept_share(self, inv_freq):
        """How much of each frequency is not divided, 0..1."""
        turns = self.original_max_positions * inv_freq / (2 * np.pi)
        if self.low == self.high:
            return (turns >= self.low).astype(np.float64)
        return np.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding in split-half pairs (j, j + head_dim/2), of which the first `n_pairs` rotate.

    theta        base of the frequencies
    factor       divides every frequency (linear position interpolation), or with `llama3` the low ones
    partial      share of the head's dimensions that rotate; the exponent still divides by the whole head_dim
    interleaved  pairs are (2j, 2j + 1)
    llama3       which frequencies `factor` divides, or None for all
    """

    theta: float
    factor: float = 1.0
    partial: float = 1.0
    interleaved: bool = False
    llama3: Llama3Scaling | None = None

    def n_pairs(self, head_dim):
        return int(self.partial * head_dim // 2)

    def inv_freq(self, head_dim):
        """theta^(-2j / head_dim), scaled; float32 [n_pairs(head_dim)], each rounded once from float64."""
        j = np.arange(self.n_pairs(head_dim), dtype=np.float64)
        plain = self.theta ** (-2 * j / head_dim)
        kept = 0.0 if self.llama3 is None else self.llama3.kept_share(plain)
        return ((1 - kept) * plain / self.factor + kept * plain).astype(np.float32)


def attention_kind(window, chunk=None):
    """How layers and KV pools of that window or chunk are named to people."""
    if chunk is not None:
        return f"chunked({chunk})"
    return "global" if window is None else f"sliding({window})"


@dataclass(frozen=True)
class TemperatureSpec:
    """The query at position p is multiplied by 1 + scale * ln(1 + floor((p + 1) / floor))."""

    scale: float
    floor: int


@dataclass(frozen=True)
class AttentionSpec:
    """Grouped-query attention; query head h reads KV head h // (n_heads / n_kv_heads).

    rope         None is a layer that knows no positions (NoPE)
    window       keys a token sees, itself included; None is every earlier one (a global layer)
    v_norm       v goes through a weight-less RMSNorm
    v_is_k       there is no v projection: v is the k projection before k's norm and RoPE
    chunk        a token sees only positions of its own stretch of so many, from position 0 on; None is no such limit
    qk_norm      RMSNorm per head of q and k: "weighted" (before RoPE), "plain" (after RoPE, no weights) or None
    temperature  grows the queries with their position, or None
    sees_blocks  a soft token of a picture also sees the later ones of its picture; `window` still cuts the earlier, but
                 not with sees_whole_blocks
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec | None
    window: int | None = None
    v_norm: bool = False
    v_is_k: bool = False
    chunk: int | None = None
    qk_norm: str | None = "weighted"
    temperature: TemperatureSpec | None = None
    sees_blocks: bool = False
    sees_whole_blocks: bool = False

    @property
    def kind(self):
        return attention_kind(self.window, self.chunk)

    @property
    def q_width(self):
        return self.n_heads * self.head_dim

    @property
    def kv_width(self):
        return self.n_kv_heads * self.head_dim

    @property
    def qkv_width(self):
        """Columns of the fused projection: q, k, and v where it has a projection of its own."""
        return self.q_width + self.kv_width * (1 if self.v_is_k else 2)


@dataclass(frozen=True)
class DenseSpec:
    """down(activation(gate(x)) * up(x)); activation is "gelu_tanh" or "silu"."""

    intermediate: int
    activation: str = "gelu_tanh"


@dataclass(frozen=True)
class MoeSpec:
    """Experts of a shape, of which a router picks some for each token; an expert computes what a DenseSpec does.

    intermediate  of one expert
    dense         the branch beside the experts that every token takes (Llama 4: the shared expert), or None
    routing       "softmax": the router reads the residual, weights are renormalised and multiply the experts' outputs,
                  both branches have norms of their own (Gemma 4); "sigmoid": the router reads what the experts read,
                  the sigmoid of its score multiplies an expert's input, both branches are summed (Llama 4)
    in_out        expert matrices are [n_experts, in, out], as the checkpoint has them; else [n_experts, out, in]
    """

    n_experts: int
    experts_per_token: int
    intermediate: int
    dense: DenseSpec | None = None
    routing: str = "softmax"
    activation: str = "gelu_tanh"
    in_out: bool = False


@dataclass(frozen=True)
class LayerSpec:
    """One decoder block: x += norm(attention(norm(x))); x += norm(mlp(norm(x))); x *= layer_scalar where it has one.

    kv_from   number of the earlier layer whose K and V this one reads, having no k and v projections; None is its own
    sandwich  the outputs of attention and MLP have norms too, as written above
    """

    attention: AttentionSpec
    mlp: DenseSpec | MoeSpec
    layer_scalar: bool = False
    kv_from: int | None = None
    sandwich: bool = True

    @property
    def moe(self):
        """The MoeSpec, or None in a dense layer."""
        return self.mlp if type(self.mlp) is MoeSpec else None

    @property
    def dense(self):
        """The DenseSpec that every token goes through, alone or beside the experts, or None."""
        return self.mlp.dense if type(self.mlp) is MoeSpec else self.mlp

    @property
    def qkv_width(self):
        """Columns of the fused projection: q alone where K and V are another layer's."""
        return self.attention.qkv_width if self.kv_from is None else self.attention.q_width


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only model of text, with pictures and videos in it where `media` says how.

    norm_offset       RMSNorm multiplies by (weight + norm_offset)
    embed_scale       multiplies embedding rows, not the head; rounded to the weights' dtype where that is bfloat16
    logit_softcap     c in c * tanh(logits / c), or None
    tied              the head is the embedding matrix; a separate head is used only if the checkpoint has one
    eos_ids           token ids that end a text, as config.json names them; generation_config.json goes before it
    unused_prefixes   name prefixes of tensors that a text run does not read (vision and audio parts); with `media`
                      those of the vision part are read all the same
    per_layer_input   width of what a second embedding table gives each layer of a token; 0 is no such table
    per_layer_vocab   rows of that table
    norm_rounds_first RMSNorm rounds x / rms(x) to the weights' dtype, then the product with the weight; else once
    media             the MediaSpec of a model that sees, or None
    """

    architecture: str
    hidden: int
    vocab: int
    layers: tuple
    norm_eps: float
    norm_offset: float
    embed_scale: float
    logit_softcap: float | None
    max_positions: int
    tied: bool
    eos_ids: tuple = ()
    unused_prefixes: tuple = ()
    per_layer_input: int = 0
    per_layer_vocab: int = 0
    norm_rounds_first: bool = False
    media: MediaSpec | None = None

    @property
    def has_blocks(self):
        """Whether some layer sees a picture's later soft tokens: then no picture is split between steps."""
        return any(layer.attention.sees_blocks for layer in self.layers)

    def text_only(self):
        """The same without pictures: what a text prompt needs of it."""
        if self.media is None:
            return self
        plain = {"sees_blocks": False, "sees_whole_blocks": False}
        layers = (replace(layer, attention=replace(layer.attention, **plain)) for layer in self.layers)
        return replace(self, media=None, layers=tuple(layers))

    projections = ()            # (n_rows, n_in) of matrices beside those of layers, head and per-layer inputs

    @property
    def first_shared(self):
        """Number of the first layer that reads another's K and V, as all behind it do; None where no layer does."""
        return next((i for i, layer in enumerate(self.layers) if layer.kv_from is not None), None)

    @property
    def per_layer_width(self):
        """Columns of that second table: per_layer_input for each layer."""
        return len(self.layers) * self.per_layer_input

    @property
    def per_layer_scale(self):
        """Multiplies the rows of that table, as embed_scale those of the first."""
        return self.per_layer_input**0.5

    @property
    def drops_at(self):
        """Number of the layer from which on a step needs only the rows whose final states somebody wants: the first
        that reads another's K and V, for none behind it leaves any; else the last, once all rows' K and V are there."""
        return len(self.layers) - 1 if self.first_shared is None else self.first_shared

    @property
    def widest_dense(self):
        """The largest intermediate of a MLP that every token goes through; 0 where there is none."""
        return max((layer.dense.intermediate for layer in self.layers if layer.dense), default=0)
