"""Gemma 4 against logits that transformers computed from weights given by a formula: no file stands between the two.

Source of the vectors: HF transformers 5.23, float32, eager attention; a float64 implementation written from the maths
alone agrees to 1e-5. Dense model G1: three layers, two of them sliding, K = V on the global one. G2: G1 with experts.
G3: six layers, of which the last three read the K and V of others and are twice as wide, with per-layer inputs.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from engine import LLM
from engine.models import describe
from engine.tensors import targets
from engine.vision.gemma4_tower import Gemma4Tower
from engine.vision.inputs import VisionInputs, pages
from engine.vision.patches import positions, windows
from engine.vision_tensors import vision_targets
from loaders.config import Config
from tests import tiny

IDS = [2, 5, 9, 13, 21, 34, 40, 3, 50, 8, 17]
SEEN = [2, 7, 61, *[60] * 6, 62, 5, 9, 13, 21, 34]         # with a picture of six soft tokens
VISION = {"model_type": "gemma4_vision", "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2,
          "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 12, "position_embedding_size": 32,
          "pooling_kernel_size": 3, "patch_size": 2, "standardize": True, "use_clipped_linears": True}
ROWS, COLUMNS = 6, 9                                        # of the picture's patches
AGREEMENT = 2e-5        # of float32 implementations on these logits; printing to 5 decimals adds half of the last one
PATTERN = ["sliding_attention", "sliding_attention", "full_attention"]
TEXT = {"model_type": "gemma4_text", "vocab_size": 64, "vocab_size_per_layer_input": 64, "hidden_size": 32,
        "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_global_key_value_heads": 1, "head_dim": 8, "global_head_dim": 16, "attention_k_eq_v": True,
        "sliding_window": 5, "layer_types": PATTERN, "final_logit_softcapping": 30.0, "hidden_size_per_layer_input": 0,
        "use_bidirectional_attention": "vision", "max_position_embeddings": 1024, "pad_token_id": 0}


@dataclass(frozen=True)
class Vector:
    """One model: what its text section changes of TEXT, and its logits of IDS: the last row's first, the argmax of each
    row, the sum of all. And those of SEEN, where row 3 is the first soft token's."""

    fields: dict
    last_row: list
    argmax: list
    total: float
    seen_last_row: list
    seen_row_3: list
    seen_argmax: list
    seen_total: float

    @property
    def config(self):
        return {"architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "image_token_id": 60,
                "video_token_id": 59, "audio_token_id": 58, "boi_token_id": 61, "eoi_token_id": 62,
                "text_config": {**TEXT, **self.fields}}


VECTORS = {
    "G1": Vector({}, [-1.44323, -0.11538, -1.02403, 0.60711, -1.16927],
                 [46, 45, 45, 46, 26, 51, 30, 30, 35, 62, 17], -31.521,
                 [0.55646, 0.91393, -0.97710, 0.50859, -0.87202], [-0.70574, 0.03239, 0.34676],
                 [46, 14, 45, 32, 45, 6, 7, 57, 57, 61, 7, 14, 46, 2, 8], -68.882),
    "G2": Vector({"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 12},
                 [-1.38611, -1.10976, 0.61672, 0.85944, -0.11635],
                 [21, 45, 46, 46, 36, 52, 63, 63, 7, 8, 19], -13.354,
                 [0.85583, 2.09568, -1.55712, -0.53627, -1.15365], [-0.44195, -1.15425, 0.64823],
                 [21, 6, 45, 46, 45, 45, 27, 60, 6, 61, 6, 54, 47, 60, 1], -53.122),
    "G3": Vector({"num_hidden_layers": 6, "layer_types": PATTERN * 2, "num_key_value_heads": 1,
                  "attention_k_eq_v": False, "use_bidirectional_attention": None, "hidden_size_per_layer_input": 8,
                  "num_kv_shared_layers": 3, "use_double_wide_mlp": True},
                 [-1.34778, 0.03125, -0.71680, -1.12315, -0.00587],
                 [51, 6, 61, 11, 21, 7, 54, 45, 46, 5, 33], -1.559,
                 [-0.18852, 0.55008, -0.39695, -1.31021, 0.68399], [-2.09333, -0.62783, -0.08844],
                 [51, 45, 57, 17, 46, 17, 44, 8, 17, 0, 53, 46, 28, 1, 12], -24.742),
}


def value(name, shape):
    """The tensor that the formula gives to `name` (without a leading "model."): float32, from float64."""
    c = sum(name.encode()) % 97
    i = np.arange(np.prod(shape), dtype=np.float64)
    s = np.sin(0.37 * i + 1.7 * c + 0.001 * i**2)
    if name.endswith(("layer_scalar", "_min", "_max")):
        s = np.full_like(s, -0.9 if name.endswith("_min") else 0.8)
    elif name.endswith("std_bias"):
        s = 0.3 * s
    elif (len(shape) == 1 and "norm" in name) or name.endswith(("router.scale", "per_expert_scale", "std_scale")):
        s = 1 + 0.25 * s
    else:
        s = 0.2 * s
    return s.reshape(shape).astype(np.float32)


def test_the_formula():
    """The two examples that come with it."""
    np.testing.assert_allclose(value("language_model.layers.0.self_attn.q_proj.weight", (32, 32))[0, :3],
                               [0.081776, 0.010041, -0.06344], atol=6e-7)
    np.testing.assert_allclose(value("language_model.embed_tokens.weight", (64, 32))[0, 0], -0.174576, atol=6e-7)


@pytest.fixture(scope="module", params=VECTORS)
def vector(request):
    return VECTORS[request.param]


@pytest.fixture(scope="module")
def llm(vector, tmp_path_factory):
    """The model of a vector, with two tensors of a vision part beside its text."""
    tensors = {name: value("language_model." + name, shape) for target in targets(describe(Config(vector.config)))
               for name, shape in target.parts}
    vision = {"model." + name: value(name, (24, 12)) for name in (
        "vision_tower.patch_embedder.input_proj.weight", "embed_vision.embedding_projection.weight")}
    path = tiny.write_checkpoint(tmp_path_factory.mktemp("vector"), vector.config, tensors,
                                 prefix="model.language_model.", dtype=np.float32, extra=vision)
    return LLM(path, device="cpu")


@pytest.mark.parametrize("n_rows", [1, 3])
def test_logits(llm, vector, n_rows):
    for logits in llm.forward([IDS] * n_rows, return_logits="all").logits:
        np.testing.assert_allclose(logits[-1, :5], vector.last_row, rtol=0, atol=AGREEMENT + 0.5e-5)
        assert logits.argmax(axis=1).tolist() == vector.argmax
        # Errors of single logits are of either sign: their sum grows with the root of their number.
        assert abs(logits.sum(dtype=np.float64) - vector.total) <= AGREEMENT * logits.size**0.5 + 0.5e-3


def test_vision_tensors_are_reported(llm):
    assert llm.weights.unused == ("model.embed_vision.embedding_projection.weight",
                                  "model.vision_tower.patch_embedder.input_proj.weight")
    assert "does not read: 2 (model.embed_vision.embedding_projection.weight, " in llm.explain()


# --- with a picture

@pytest.fixture(scope="module")
def seeing(vector, tmp_path_factory):
    """The model of a vector with its tower, whose every picture is the one of the vector: its patches are no bytes."""
    config = {**vector.config, "vision_config": VISION}
    spec = describe(Config(config))
    tensors = {name: value("language_model." + name, shape) for target in targets(spec)
               for name, shape in target.parts}
    tower = {"model." + name: value(name, shape) for target in vision_targets(spec.media.tower, spec.hidden)
             for name, shape in target.parts}
    path = tiny.write_checkpoint(tmp_path_factory.mktemp("seeing"), config, tensors, prefix="model.language_model.",
                                 dtype=np.float32, extra=tower)
    llm = LLM(path, device="cpu")
    encoder = llm._core.encoder_cache.encoder
    patches = np.float32(0.5 + 0.5 * np.sin(0.11 * np.arange(ROWS * COLUMNS * 12))).reshape(-1, 12)
    at = positions(ROWS, COLUMNS)

    def encode(pictures, soft, rows):
        for one in rows:
            encoder.run(VisionInputs(2 * (patches - np.float32(0.5)), at, Gemma4Tower.places(spec.media.tower, at),
                                     windows(ROWS, COLUMNS, 3), np.arange(6, dtype=np.int32), one,
                                     pages([0, len(patches)])), soft)
    encoder.encode = encode
    llm._prompts.processor = SimpleNamespace(image=lambda source, budget: SimpleNamespace(n_tokens=6, key=source))
    return llm


@pytest.mark.parametrize("n_rows", [1, 2])
def test_logits_with_a_picture(seeing, vector, n_rows):
    rows = seeing.forward([SEEN, IDS] * n_rows, images=[["seen"], None] * n_rows, return_logits="all").logits
    for logits in rows[::2]:
        np.testing.assert_allclose(logits[-1, :5], vector.seen_last_row, rtol=0, atol=AGREEMENT + 0.5e-5)
        np.testing.assert_allclose(logits[3, :3], vector.seen_row_3, rtol=0, atol=AGREEMENT + 0.5e-5)
        assert logits.argmax(axis=1).tolist() == vector.seen_argmax
        assert abs(logits.sum(dtype=np.float64) - vector.seen_total) <= AGREEMENT * logits.size**0.5 + 0.5e-3
    for logits in rows[1::2]:
        np.testing.assert_allclose(logits[-1, :5], vector.last_row, rtol=0, atol=AGREEMENT + 0.5e-5)
