"""Which arrays a tower needs, and which tensors of a checkpoint fill them.

Beside engine/tensors.py the only file that knows how checkpoints spell their tensors.
"""

from engine.models.vision_spec import BlockEmbedderSpec, Gemma4TowerSpec, SiglipSpec
from engine.target import Order, Target

# What files put in the place of how names begin here, released ones first; the first that some tensor has counts.
SPELLINGS = {
    "vision_tower.": ("model.vision_tower.", "vision_tower."),              # Gemma 4
    "embed_vision.": ("model.embed_vision.", "embed_vision."),
    "vision_embedder.": ("model.vision_embedder.", "vision_embedder."),
    "vision_model.": ("vision_tower.vision_model.", "model.vision_tower.vision_model.", "model.vision_tower.",
                      "vision_tower."),                                     # Gemma 3
    "multi_modal_projector.": ("multi_modal_projector.", "model.multi_modal_projector.")}
LINEARS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
BOUNDS = ("input_min", "input_max", "output_min", "output_max")
TRANSPOSED = (1, 0)


def is_vision(name):
    """Whether a tensor of a multimodal checkpoint belongs to its vision side."""
    return name.startswith(tuple(prefix for prefixes in SPELLINGS.values() for prefix in prefixes))


def is_pooling_head(tower, name):
    """Whether a tensor belongs to the head that SigLIP has beside its states, which Gemma 3 does not read."""
    return type(tower) is SiglipSpec and name.startswith(tuple(to + "head." for to in SPELLINGS["vision_model."]))


def spelled(tensors):
    """{how names begin here: how they do in a file that holds `tensors`}"""
    return {part: next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in tensors)), prefixes[0])
            for part, prefixes in SPELLINGS.items()}


def vision_targets(tower, hidden):
    """Every array of a tower whose soft tokens are `hidden` wide, with the tensors that fill it."""
    yield from {Gemma4TowerSpec: _gemma4, SiglipSpec: _siglip, BlockEmbedderSpec: _blocks}[type(tower)](tower, hidden)


def _gemma4(tower, hidden):
    wide, heads, d = tower.hidden, tower.q_width, tower.head_dim
    yield _one("patch", "vision_tower.patch_embedder.input_proj.weight", (wide, tower.patch_width))
    yield Target("positions", (("vision_tower.patch_embedder.position_embedding_table", (2, tower.n_positions, wide)),),
                 shape=(2 * tower.n_positions, wide))
    # Files turn the first half of a head's dimensions by the column, in pairs (j, j + d / 4), and the second by the
    # row. In the order halves, axes one split-half RoPE does both, and scores do not notice.
    axial = Order((tower.n_heads, 2, 2, d // 4, wide), (0, 2, 1, 3, 4))
    axial_norm = Order((2, 2, d // 4), (1, 0, 2))
    for i in range(tower.n_layers):
        to, at = f"layers.{i}.", f"vision_tower.encoder.layers.{i}."
        yield _one(to + "input_norm", at + "input_layernorm.weight", (wide,), is_norm=True)
        yield Target(to + "qkv", tuple((f"{at}self_attn.{part}_proj.linear.weight", (heads, wide)) for part in "qkv"),
                     orders=(axial, axial, None))
        for part in "qk":
            yield _one(f"{to}{part}_norm", f"{at}self_attn.{part}_norm.weight", (d,), is_norm=True,
                       orders=(axial_norm,))
        yield _one(to + "o", at + "self_attn.o_proj.linear.weight", (wide, heads))
        yield _one(to + "post_attention_norm", at + "post_attention_layernorm.weight", (wide,), is_norm=True)
        yield _one(to + "pre_mlp_norm", at + "pre_feedforward_layernorm.weight", (wide,), is_norm=True)
        yield Target(to + "gate_up", tuple((f"{at}mlp.{part}_proj.linear.weight", (tower.intermediate, wide))
                                           for part in ("gate", "up")))
        yield _one(to + "down", at + "mlp.down_proj.linear.weight", (wide, tower.intermediate))
        yield _one(to + "post_mlp_norm", at + "post_feedforward_layernorm.weight", (wide,), is_norm=True)
        if tower.clipped:
            yield Target(to + "bounds", tuple((f"{at}{linear}_proj.{bound}", ()) for linear in LINEARS
                                              for bound in BOUNDS), shape=(len(LINEARS), len(BOUNDS)))
    if tower.standardize:
        yield _one("std_bias", "vision_tower.std_bias", (wide,))
        yield _one("std_scale", "vision_tower.std_scale", (wide,))
    yield _one("projection", "embed_vision.embedding_projection.weight", (hidden, wide))


def _siglip(tower, hidden):
    wide = tower.hidden
    yield Target("patch", (("vision_model.embeddings.patch_embedding.weight", (wide, 3, tower.patch, tower.patch)),),
                 shape=(wide, tower.patch_width))
    yield _one("patch_bias", "vision_model.embeddings.patch_embedding.bias", (wide,))
    yield _one("positions", "vision_model.embeddings.position_embedding.weight", (tower.n_positions, wide))
    for i in range(tower.n_layers):
        to, at = f"layers.{i}.", f"vision_model.encoder.layers.{i}."
        yield from _with_bias(to + "norm_1", at + "layer_norm1", (wide,))
        qkv = [f"{at}self_attn.{part}_proj" for part in "qkv"]
        yield Target(to + "qkv", tuple((name + ".weight", (wide, wide)) for name in qkv))
        yield Target(to + "qkv_bias", tuple((name + ".bias", (wide,)) for name in qkv))
        yield from _with_bias(to + "o", at + "self_attn.out_proj", (wide, wide))
        yield from _with_bias(to + "norm_2", at + "layer_norm2", (wide,))
        yield from _with_bias(to + "fc1", at + "mlp.fc1", (tower.intermediate, wide))
        yield from _with_bias(to + "fc2", at + "mlp.fc2", (wide, tower.intermediate))
    yield from _with_bias("post_norm", "vision_model.post_layernorm", (wide,))
    yield _one("soft_norm", "multi_modal_projector.mm_soft_emb_norm.weight", (wide,), is_norm=True)
    yield Target("projection", (("multi_modal_projector.mm_input_projection_weight", (wide, hidden)),),
                 orders=(Order((wide, hidden), TRANSPOSED),), shape=(hidden, wide))


def _blocks(embedder, hidden):
    wide, n = embedder.hidden, embedder.n_positions
    yield from _with_bias("norm_1", "vision_embedder.patch_ln1", (embedder.patch_width,))
    yield from _with_bias("dense", "vision_embedder.patch_dense", (wide, embedder.patch_width))
    yield from _with_bias("norm_2", "vision_embedder.patch_ln2", (wide,))
    yield Target("positions", (("vision_embedder.pos_embedding", (n, 2, wide)),), shape=(2 * n, wide))
    yield from _with_bias("pos_norm", "vision_embedder.pos_norm", (wide,))
    yield _one("projection", "embed_vision.embedding_projection.weight", (hidden, wide))


def _one(name, tensor, shape, **fields):
    return Target(name, ((tensor, shape),), **fields)


def _with_bias(name, tensor, shape):
    yield _one(name, tensor + ".weight", shape)
    yield _one(name + "_bias", tensor + ".bias", shape[:1])
