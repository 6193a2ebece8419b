"""engine/vision_tensors.py and vision_weights.py: towers are found under every spelling, and lie as ops read them."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from engine.backend import HostLane, open_lane
from engine.config import EngineConfig
from engine.core import Core
from engine.errors import CheckpointError
from engine.models import describe
from engine.target import Order, Target
from engine.tensors import account, checked_account, media_targets, n_weights, without_missing_media
from engine.vision_tensors import BOUNDS, LINEARS, is_vision
from engine.weights import load
from loaders.config import Config
from loaders.safetensors import N_READERS, SCRATCH_BYTES, Checkpoint
from tests import tiny

FAMILIES = ("gemma3", "gemma4", "unified")
TOWER, LAYER = "model.vision_tower.", "model.vision_tower.encoder.layers.1."
SIGLIP, SIGLIP_LAYER = "vision_tower.vision_model.", "vision_tower.vision_model.encoder.layers.1."


def loaded(path, lane=None, progress=lambda n_bytes: None):
    """(ModelSpec, Weights) of a checkpoint."""
    spec = describe(Config.load(path))
    with Checkpoint.open(path) as checkpoint:
        spec = without_missing_media(spec, checkpoint.tensors)
        accounts = checked_account(spec, checkpoint.tensors)
        return spec, load(spec, checkpoint, accounts, lane or open_lane("cpu", "auto"), progress)


def arrays(weights):
    """{name: array} of a VisionWeights."""
    found = {name: array for name, array in vars(weights).items() if name != "layers"}
    for i, layer in enumerate(weights.layers):
        found.update({f"layers.{i}.{name}": array for name, array in vars(layer).items()})
    return {name: array for name, array in found.items() if array is not None}


@pytest.fixture
def vision(tmp_path):
    """vision(family): (VisionWeights on the cpu lane, the tensors of the file's vision part)."""
    def vision(family, **fields):
        config = tiny.seeing(family, **fields)
        _, weights = loaded(tiny.write_checkpoint(tmp_path / family, config))
        return weights.vision, tiny.vision_tensors(config)
    return vision


# --- arrays

@pytest.mark.parametrize("family", FAMILIES)
def test_every_target_has_an_array_of_its_shape(vision, family):
    weights, tensors = vision(family)
    spec = describe(Config(tiny.seeing(family)))
    assert {name: array.shape for name, array in arrays(weights).items()} == {
        target.name: target.shape for target in media_targets(spec)}
    n_vision = sum(array.size for array in arrays(weights).values())
    assert n_vision == sum(values.size for values in tensors.values()) == n_weights(spec) - n_weights(spec.text_only())


def test_gemma4_tower(vision):
    weights, file = vision("gemma4")
    layer = weights.layers[1]
    for name, tensor in {"input_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
                         "pre_mlp_norm": "pre_feedforward_layernorm", "post_mlp_norm": "post_feedforward_layernorm",
                         "o": "self_attn.o_proj.linear", "down": "mlp.down_proj.linear"}.items():
        np.testing.assert_array_equal(getattr(layer, name), file[f"{LAYER}{tensor}.weight"])
    np.testing.assert_array_equal(layer.gate_up, np.concatenate([file[f"{LAYER}mlp.{half}_proj.linear.weight"]
                                                                 for half in ("gate", "up")]))
    np.testing.assert_array_equal(layer.bounds, [[file[f"{LAYER}{linear}_proj.{bound}"] for bound in BOUNDS]
                                                 for linear in LINEARS])
    np.testing.assert_array_equal(weights.patch, file[TOWER + "patch_embedder.input_proj.weight"])
    table = file[TOWER + "patch_embedder.position_embedding_table"]
    np.testing.assert_array_equal(weights.positions[[7, 210 + 3]], [table[0, 7], table[1, 3]])
    for name in ("std_bias", "std_scale"):
        np.testing.assert_array_equal(getattr(weights, name), file[TOWER + name])
    np.testing.assert_array_equal(weights.projection, file["model.embed_vision.embedding_projection.weight"])


def test_parts_that_a_config_turns_off(tmp_path):
    config = tiny.seeing("gemma4", {"standardize": False, "use_clipped_linears": False})
    _, weights = loaded(tiny.write_checkpoint(tmp_path / "c", config))
    assert weights.vision.std_bias is None and weights.vision.std_scale is None
    assert all(layer.bounds is None for layer in weights.vision.layers)


def turned(x, x_angles, y_angles):
    """Axial RoPE as transformers has it: the first half of a head by the column, the second by the row, pairs half of a
    half apart. x [..., head_dim], angles [head_dim / 4]."""
    quarter = x.shape[-1] // 4
    a, b, c, d = (x[..., i * quarter:(i + 1) * quarter] for i in range(4))
    cos, sin = (np.stack([f(x_angles), f(y_angles)]) for f in (np.cos, np.sin))
    return np.concatenate([a * cos[0] - b * sin[0], b * cos[0] + a * sin[0], c * cos[1] - d * sin[1],
                           d * cos[1] + c * sin[1]], -1)


def test_one_split_half_rope_turns_by_both_axes(vision):
    """Scores of normed and turned queries and keys are those of the file's order; v and o are as the file has them."""
    weights, file = vision("gemma4")
    layer, rng = weights.layers[1], np.random.default_rng(0)
    states, angles = rng.standard_normal((2, 24)), rng.uniform(0, 3, (2, 2, 4))     # two patches, (x, y) of each
    heads = [(states @ file[f"{LAYER}self_attn.{part}_proj.linear.weight"].T).reshape(2, 2, 16) for part in "qkv"]
    norms = [file[f"{LAYER}self_attn.{part}_norm.weight"] for part in "qk"]
    q, k = (np.stack([turned(head[i] * norm, *angles[i]) for i in range(2)]) for head, norm in
            zip(heads, norms, strict=False))
    ours = np.split(states @ layer.qkv.T, 3, axis=1)
    np.testing.assert_allclose(ours[2].reshape(2, 2, 16), heads[2], atol=1e-6)

    def split_half(x, norm):
        x, turn = x.reshape(2, 2, 16) * norm, angles.reshape(2, 1, 8)
        low, high = x[..., :8], x[..., 8:]
        return np.concatenate([low * np.cos(turn) - high * np.sin(turn), high * np.cos(turn) + low * np.sin(turn)], -1)
    our_q, our_k = split_half(ours[0], layer.q_norm), split_half(ours[1], layer.k_norm)
    np.testing.assert_allclose(np.einsum("qhd,khd->hqk", our_q, our_k), np.einsum("qhd,khd->hqk", q, k), atol=1e-5)
    assert not np.allclose(our_q, q)                                # another order, that is


def test_siglip_tower(vision):
    weights, file = vision("gemma3")
    layer = weights.layers[1]
    for name, tensor in {"norm_1": "layer_norm1", "norm_2": "layer_norm2", "o": "self_attn.out_proj", "fc1": "mlp.fc1",
                         "fc2": "mlp.fc2"}.items():
        np.testing.assert_array_equal(getattr(layer, name), file[f"{SIGLIP_LAYER}{tensor}.weight"])
        np.testing.assert_array_equal(getattr(layer, name + "_bias"), file[f"{SIGLIP_LAYER}{tensor}.bias"])
    for name, kind in (("qkv", "weight"), ("qkv_bias", "bias")):
        np.testing.assert_array_equal(getattr(layer, name), np.concatenate(
            [file[f"{SIGLIP_LAYER}self_attn.{part}_proj.{kind}"] for part in "qkv"]))
    conv = file[SIGLIP + "embeddings.patch_embedding.weight"]
    assert conv.shape == (24, 3, 4, 4) and weights.patch.shape == (24, 48)
    np.testing.assert_array_equal(weights.patch[:, 2 * 16 + 1 * 4 + 3], conv[:, 2, 1, 3])   # channel, row, column
    np.testing.assert_array_equal(weights.patch_bias, file[SIGLIP + "embeddings.patch_embedding.bias"])
    np.testing.assert_array_equal(weights.positions, file[SIGLIP + "embeddings.position_embedding.weight"])
    np.testing.assert_array_equal(weights.post_norm, file[SIGLIP + "post_layernorm.weight"])
    np.testing.assert_array_equal(weights.projection, file["multi_modal_projector.mm_input_projection_weight"].T)


def test_blocks(vision):
    weights, file = vision("unified")
    at = "model.vision_embedder."
    for name, tensor in {"norm_1": "patch_ln1", "dense": "patch_dense", "norm_2": "patch_ln2",
                         "pos_norm": "pos_norm"}.items():
        np.testing.assert_array_equal(getattr(weights, name), file[f"{at}{tensor}.weight"])
        np.testing.assert_array_equal(getattr(weights, name + "_bias"), file[f"{at}{tensor}.bias"])
    table = file[at + "pos_embedding"]
    np.testing.assert_array_equal(weights.positions[[2 * 7, 2 * 3 + 1]], [table[7, 0], table[3, 1]])
    assert weights.layers == []


@pytest.mark.parametrize("family", FAMILIES)
def test_norm_offsets(tmp_path, family):
    """Gemma 3's offset is folded into the RMSNorm before the projection, and into no LayerNorm."""
    path = tiny.write_checkpoint(tmp_path / "c", tiny.seeing(family))
    lane = HostLane("cpu", None, np.float32)
    lane.folds_norm_offset = False
    folded, plain = (arrays(loaded(path, one)[1].vision) for one in (None, lane))
    for name, array in plain.items():
        np.testing.assert_array_equal(folded[name], array + np.float32(family == "gemma3" and name == "soft_norm"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_dtypes(tmp_path, family, dtype):
    """What the file has, in the lane's dtype; every byte is read once."""
    config = tiny.seeing(family)
    full = tiny.write_checkpoint(tmp_path / "full", config, dtype=np.float32)
    half = tiny.write_checkpoint(tmp_path / "half", config, dtype=dtype)
    lane, n_read = HostLane("any", None, ml_dtypes.bfloat16), []
    a, b = arrays(loaded(full)[1].vision), arrays(loaded(half, lane, n_read.append)[1].vision)
    for name, array in b.items():
        assert array.dtype == ml_dtypes.bfloat16
        if name != "soft_norm":                                     # folded in one of them
            np.testing.assert_array_equal(array.astype(np.float32), a[name])
    with Checkpoint.open(half) as checkpoint:
        assert sum(n_read) == sum(tensor.n_bytes for tensor in checkpoint.tensors.values())


def test_an_order_is_that_of_a_transpose_in_pieces():
    """A lane may take an array in ranges of any length."""
    order, values = Order((2, 3, 4), (1, 0, 2)), np.arange(24)
    np.testing.assert_array_equal(order(values).reshape(3, 2, 4), values.reshape(2, 3, 4).transpose(1, 0, 2))
    from engine.weights import _ordered

    def read(begin, end, out):
        out[...] = values[begin:end]
    ranged = _ordered(read, order)
    out = np.empty(24, np.float32)
    for begin, end in ((0, 5), (5, 6), (6, 24)):
        ranged(begin, end, out[begin:end])
    np.testing.assert_array_equal(out, order(values))


def test_target_shapes():
    rows = Target("qkv", (("q", (4, 3)), ("k", (2, 3))))
    assert rows.shape == (6, 3) and [piece[2] for piece in rows.pieces()] == [None, None]
    assert Target("bounds", (("a", ()), ("b", ())), shape=(1, 2)).shape == (1, 2)


def test_loading_takes_no_memory_beside_the_arrays(tmp_path):
    """What is put in another order waits on the host, one tensor at a time: 0.8 MB of 15."""
    config = tiny.seeing("gemma4", {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8,
                                    "num_key_value_heads": 8, "head_dim": 96, "position_embedding_size": 1024})
    path = tiny.write_checkpoint(tmp_path / "c", config)
    loaded(path)                                                    # imports and caches
    tracemalloc.start()
    spec, weights = loaded(path)
    left, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    largest = 768 * 256 * 4                                         # q's and k's, twice: as in the file, and ordered
    assert 4 * n_weights(spec) > 15e6
    assert most - left < 2 * largest + N_READERS * SCRATCH_BYTES + 2**18
    assert weights.vision.layers[1].qkv.nbytes == 3 * largest


# --- which tensors

SPELLINGS = {"gemma3": [{"vision_tower.vision_model.": "vision_tower."},
                        {"vision_tower.vision_model.": "model.vision_tower.",
                         "multi_modal_projector.": "model.multi_modal_projector."},
                        {"vision_tower.vision_model.": "model.vision_tower.vision_model."}],
             "gemma4": [{"model.": ""}], "unified": [{"model.": ""}]}


@pytest.mark.parametrize(("family", "spelling"), [(family, one) for family, many in SPELLINGS.items() for one in many])
def test_spellings(tmp_path, family, spelling):
    config = tiny.seeing(family)
    tensors, other = tiny.vision_tensors(config), {}
    for name, values in tensors.items():
        old, new = next(((old, new) for old, new in spelling.items() if name.startswith(old)), ("", ""))
        other[new + name.removeprefix(old)] = values
    assert set(other) != set(tensors) and all(map(is_vision, (*other, *tensors)))
    plain = arrays(loaded(tiny.write_checkpoint(tmp_path / "plain", config))[1].vision)
    again = arrays(loaded(tiny.write_checkpoint(tmp_path / "other", config, vision=other))[1].vision)
    for name, array in plain.items():
        np.testing.assert_array_equal(again[name], array)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_without_vision_tensors_is_one_of_text(tmp_path, family):
    path = tiny.write_checkpoint(tmp_path / "c", tiny.seeing(family), vision={})
    spec, weights = loaded(path)
    assert spec == describe(Config.load(path)).text_only() and weights.vision is None
    lane = open_lane("cpu", "auto")
    with Checkpoint.open(path) as checkpoint:
        core = Core.open(describe(Config.load(path)), EngineConfig(device="cpu", max_seqs=1), lane, checkpoint)
    assert core.spec == spec and core.weights.vision is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_config_leaves_them_unread(tmp_path, family):
    config = {**tiny.seeing(family), "vision_config": None}
    tensors = tiny.vision_tensors(tiny.seeing(family))
    _, weights = loaded(tiny.write_checkpoint(tmp_path / "c", config, vision=tensors))
    assert weights.vision is None and sorted(weights.unused) == sorted(tensors)


AUDIO = ["model.audio_tower.output_proj.bias", "audio_tower.layers.0.norm_out.weight",
         "model.embed_audio.embedding_projection.weight"]


@pytest.mark.parametrize("family", ["gemma4", "unified"])
def test_audio_tensors_stay_unread(tmp_path, family):
    extra = {name: np.zeros(3, np.int64) for name in AUDIO}
    _, weights = loaded(tiny.write_checkpoint(tmp_path / "c", tiny.seeing(family), extra=extra))
    assert sorted(weights.unused) == sorted(AUDIO) and weights.vision is not None


def problems(tmp_path, family, change):
    config = tiny.seeing(family)
    tensors = tiny.vision_tensors(config)
    change(tensors)
    path = tiny.write_checkpoint(tmp_path / "c", config, vision=tensors)
    with Checkpoint.open(path) as checkpoint:
        return account(describe(Config(config)), checkpoint.tensors).problems


@pytest.mark.parametrize(("family", "name", "shape"), [
    ("gemma4", LAYER + "mlp.up_proj.input_max", []),
    ("gemma4", TOWER + "std_bias", [24]),
    ("gemma4", "model.embed_vision.embedding_projection.weight", [32, 24]),
    ("gemma3", SIGLIP_LAYER + "self_attn.q_proj.bias", [24]),
    ("gemma3", "multi_modal_projector.mm_soft_emb_norm.weight", [24]),
    ("unified", "model.vision_embedder.pos_embedding", [70, 2, 24]),
])
def test_missing(tmp_path, family, name, shape):
    problem, = problems(tmp_path, family, lambda tensors: tensors.pop(name))
    assert problem.startswith(f"the checkpoint has no {name} {shape}")


def test_a_tower_that_is_gone_is_named_as_released_files_name_it(tmp_path):
    """Where a part of the vision side is there, all of it must be."""
    def change(tensors):
        for name in list(tensors):
            if name.startswith(SIGLIP):
                del tensors[name]
    found = problems(tmp_path, "gemma3", change)
    assert len(found) == 5 + 2 * 16 and all(f"has no {SIGLIP}" in problem for problem in found)


@pytest.mark.parametrize(("name", "shape", "expected"), [
    (TOWER + "patch_embedder.input_proj.weight", (24, 13), "is [24, 13], expected [24, 12] by config.json"),
    (LAYER + "mlp.up_proj.input_max", (1,), "is [1], expected [] by config.json"),
    (LAYER + "self_attn.q_proj.linear.weight", (24, 32), "is [24, 32], expected [32, 24] by config.json"),
])
def test_wrong_shapes(tmp_path, name, shape, expected):
    def change(tensors):
        tensors[name] = np.zeros(shape, np.float32)
    problem, = problems(tmp_path, "gemma4", change)
    assert problem == f"{name} {expected}"


@pytest.mark.parametrize("name", [LAYER + "self_attn.q_proj.linear.bias", "model.vision_tower.head.weight",
                                  "model.embed_vision.norm.weight", "vision_tower.std_bias"])
def test_surplus(tmp_path, name):
    """No tensor of a vision part is dropped in silence: not under a second spelling either."""
    def change(tensors):
        tensors[name] = np.zeros(3, np.float32)
    problem, = problems(tmp_path, "gemma4", change)
    assert problem.startswith(f"{name} is not a tensor of gemma4 with 6 layers")


def test_a_pooling_head_is_not_read(tmp_path):
    """Gemma 3 takes the tower's states, as transformers does, whose default adds a head to new files all the same."""
    head = {f"vision_tower.{part}head.probe": np.zeros((1, 1, 24), np.float32) for part in ("vision_model.", "")}
    extra = {**head, "vision_tower.header.probe": np.zeros(3, np.float32)}
    plain, _ = loaded(tiny.write_checkpoint(tmp_path / "plain", tiny.seeing("gemma3")))
    config = tiny.seeing("gemma3", {"vision_use_head": True})
    spec, weights = loaded(tiny.write_checkpoint(tmp_path / "head", config, extra=head))
    assert spec == plain and sorted(weights.unused) == sorted(head)
    problem, = problems(tmp_path, "gemma3", lambda tensors: tensors.update(extra))
    assert problem.startswith("vision_tower.header.probe is not a tensor")


def test_the_core_refuses_them(tmp_path):
    config = tiny.seeing("gemma4")
    tensors = tiny.vision_tensors(config)
    del tensors[TOWER + "std_scale"]
    path = tiny.write_checkpoint(tmp_path / "c", config, vision=tensors)
    with Checkpoint.open(path) as checkpoint, pytest.raises(CheckpointError, match=r"has no .*std_scale \[24\]"):
        Core.open(describe(Config(config)), EngineConfig(device="cpu"), open_lane("cpu", "auto"), checkpoint)
