"""VisionWeights: the arrays of a tower, by the targets of engine/vision_tensors.py."""

from dataclasses import dataclass, field


@dataclass
class VisionLayerWeights:
    """Arrays of one layer of a tower, None where it has no such part; linears are [out, in].

    qkv      rows of q, k and v. In Gemma 4's tower those of q and k, and q_norm and k_norm, are in the order for one
             split-half RoPE: a head's dimensions as [2 halves, 2 axes, head_dim / 4], where files have the axes first
    gate_up  stacks both halves
    bounds   [7, 4] of q, k, v, o, gate, up, down: input_min, input_max, output_min, output_max; None is no clamping
    """

    qkv: object = None
    qkv_bias: object = None
    o: object = None
    o_bias: object = None
    # Gemma 4
    input_norm: object = None
    q_norm: object = None
    k_norm: object = None
    post_attention_norm: object = None
    pre_mlp_norm: object = None
    gate_up: object = None
    down: object = None
    post_mlp_norm: object = None
    bounds: object = None
    # SigLIP: LayerNorms, whose weights have no offset
    norm_1: object = None
    norm_1_bias: object = None
    norm_2: object = None
    norm_2_bias: object = None
    fc1: object = None
    fc1_bias: object = None
    fc2: object = None
    fc2_bias: object = None


@dataclass
class VisionWeights:
    """Arrays of a tower, None where it has no such part.

    patch       [hidden, patch_width]; columns are (row, column, channel), of SigLIP (channel, row, column)
    positions   Gemma 4: [2 * n_positions, hidden], row x and row n_positions + y; SigLIP: [n_positions, hidden];
                blocks: [2 * n_positions, hidden], row 2 X and row 2 Y + 1
    projection  [hidden of the text part, hidden]
    """

    layers: list = field(default_factory=list)
    patch: object = None
    positions: object = None
    projection: object = None
    # Gemma 4
    std_bias: object = None
    std_scale: object = None
    # SigLIP
    patch_bias: object = None
    post_norm: object = None
    post_norm_bias: object = None
    soft_norm: object = None
    # blocks
    norm_1: object = None
    norm_1_bias: object = None
    dense: object = None
    dense_bias: object = None
    norm_2: object = None
    norm_2_bias: object = None
    pos_norm: object = None
    pos_norm_bias: object = None

    @classmethod
    def of(cls, tower):
        """With a place for each layer's arrays."""
        return cls([VisionLayerWeights() for _ in range(getattr(tower, "n_layers", 0))])
