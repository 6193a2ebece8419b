"""engine/tensors.py: every layout of a checkpoint is found, and every tensor is accounted for."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from engine import LLM
from engine.errors import CheckpointError
from engine.models import describe
from engine.tensors import account, n_weights, targets
from loaders.config import Config
from loaders.safetensors import Checkpoint
from tests import tiny

IDS = [2, 5, 9, 13, 21, 34, 40, 3]
LAYOUTS = {"model.": "lm_head.weight", "language_model.model.": "language_model.lm_head.weight",
           "model.language_model.": "lm_head.weight"}


def logits(path):
    return LLM(path, device="cpu").forward([IDS], return_logits="all").logits[0]


def refuses(path, *expected):
    """Opening the checkpoint raises one CheckpointError that holds every text of `expected`."""
    with pytest.raises(CheckpointError) as caught:
        LLM(path, device="cpu")
    for text in expected:
        assert text in str(caught.value)


# --- layouts

@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_all_layouts_load_alike(tmp_path, family, tied):
    """The three prefixes, one file or several, a text-only or a multimodal config: the logits are the same bits."""
    config = tiny.flat(family, tie_word_embeddings=tied)
    expected = logits(tiny.write_checkpoint(tmp_path / "plain", config))
    for prefix, head in LAYOUTS.items():
        for form in (tiny.flat, tiny.nested):
            path = tiny.write_checkpoint(tmp_path / f"{prefix}{form.__name__}", form(family, tie_word_embeddings=tied),
                                         prefix=prefix, head=head, n_shards=3)
            np.testing.assert_array_equal(logits(path), expected)


# --- the head

@pytest.mark.parametrize(("prefix", "head"), LAYOUTS.items())
def test_copies_of_a_tied_head_are_not_read(tmp_path, prefix, head):
    config = tiny.nested("gemma3")
    other = np.ones((64, 32), np.float32)
    plain = tiny.write_checkpoint(tmp_path / "plain", config, prefix=prefix)
    copied = tiny.write_checkpoint(tmp_path / "copied", config, prefix=prefix, extra={head: other})
    np.testing.assert_array_equal(logits(copied), logits(plain))
    llm = LLM(copied, device="cpu")
    assert llm.weights.unused == (head,)
    assert "head: tied to the embedding" in llm.explain() and f"does not read: 1 ({head})" in llm.explain()


def test_a_head_of_its_own_is_used(tmp_path):
    config = tiny.flat("gemma3", tie_word_embeddings=False)
    tensors = tiny.random_tensors(config)
    llm = LLM(tiny.write_checkpoint(tmp_path / "own", config, tensors), device="cpu")
    assert "head: its own matrix" in llm.explain() and llm.weights.unused == ()
    states = llm.forward([IDS], return_hidden_states=True).hidden_states[0]
    np.testing.assert_allclose(llm.forward([IDS], return_logits="all").logits[0],
                               states @ tensors["lm_head.weight"].T, rtol=0, atol=1e-5)
    doubled = {**tensors, "lm_head.weight": 2 * tensors["lm_head.weight"]}
    twice = tiny.write_checkpoint(tmp_path / "doubled", config, doubled)
    np.testing.assert_array_equal(logits(twice), 2 * logits(tmp_path / "own"))


def test_an_untied_config_without_a_head_uses_the_embedding(tmp_path):
    """Whether the tensor is there is a surer sign than what the config says."""
    tensors = tiny.random_tensors(tiny.flat("gemma3"))
    tied = tiny.write_checkpoint(tmp_path / "tied", tiny.flat("gemma3"), tensors)
    untied = tiny.write_checkpoint(tmp_path / "untied", tiny.flat("gemma3", tie_word_embeddings=False), tensors)
    np.testing.assert_array_equal(logits(untied), logits(tied))


def test_n_weights_counts_a_head_of_its_own():
    tied, untied = (describe(Config(tiny.flat("gemma3", tie_word_embeddings=tied))) for tied in (True, False))
    assert n_weights(untied) - n_weights(tied) == 64 * 32
    assert n_weights(untied) == sum(values.size for values in tiny.random_tensors(
        tiny.flat("gemma3", tie_word_embeddings=False)).values())


# --- tensors that do not fit

@pytest.fixture
def gemma4(tmp_path):
    """(config, tensors, write): write(tensors, extra) makes a checkpoint of what the test has changed."""
    config = tiny.nested("gemma4")

    def write(tensors, **extra):
        return tiny.write_checkpoint(tmp_path / "c", config, tensors, prefix="model.language_model.", extra=extra)
    return config, tiny.random_tensors(config), write


def test_missing(gemma4):
    _, tensors, write = gemma4
    del tensors["layers.4.mlp.up_proj.weight"]
    refuses(write(tensors), "the checkpoint has no model.language_model.layers.4.mlp.up_proj.weight [40, 32]")


def test_surplus(gemma4):
    _, tensors, write = gemma4
    tensors["layers.6.mlp.up_proj.weight"] = np.zeros((40, 32), np.float32)
    refuses(write(tensors), "model.language_model.layers.6.mlp.up_proj.weight is not a tensor of gemma4 with 6 layers")


def test_a_v_projection_where_v_is_k(gemma4):
    _, tensors, write = gemma4
    tensors["layers.2.self_attn.v_proj.weight"] = tensors["layers.2.self_attn.k_proj.weight"]
    refuses(write(tensors), "model.language_model.layers.2.self_attn.v_proj.weight is not a tensor of gemma4")


def test_misspelt(gemma4):
    _, tensors, write = gemma4
    tensors["layers.3.self_attn.qnorm.weight"] = tensors.pop("layers.3.self_attn.q_norm.weight")
    refuses(write(tensors), "has no model.language_model.layers.3.self_attn.q_norm.weight [16]; the nearest name is "
                            "model.language_model.layers.3.self_attn.qnorm.weight", "(and 1 more")


@pytest.mark.parametrize(("name", "shape", "expected"), [
    ("layers.0.self_attn.q_proj.weight", (32, 64), "is [32, 64], expected [64, 32] by config.json"),
    ("layers.2.self_attn.q_norm.weight", (16,), "is [16], expected [32] by config.json"),
    ("embed_tokens.weight", (65, 32), "is [65, 32], expected [64, 32] by config.json"),
    ("layers.0.layer_scalar", (), "is [], expected [1] by config.json"),
])
def test_wrong_shape(gemma4, name, shape, expected):
    _, tensors, write = gemma4
    tensors[name] = np.zeros(shape, np.float32)
    refuses(write(tensors), f"model.language_model.{name} {expected}")


def test_no_embedding(gemma4):
    _, tensors, write = gemma4
    del tensors["embed_tokens.weight"]
    refuses(write(tensors), "has no embed_tokens.weight under any of the known prefixes (language_model.model., ",
            "begins with model.language_model.layers.0.")


def test_account_lists_every_problem(gemma4):
    config, tensors, write = gemma4
    del tensors["norm.weight"]
    tensors["layers.0.layer_scalar"] = np.zeros(2, np.float32)
    tensors["rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    with Checkpoint.open(write(tensors)) as checkpoint:
        problems = account(describe(Config(config)), checkpoint.tensors).problems
    assert [re.search(r"model\.language_model\.\S+", problem)[0] for problem in problems] == [
        "model.language_model.norm.weight", "model.language_model.layers.0.layer_scalar",
        "model.language_model.rotary_emb.inv_freq"]


def test_only_a_few_problems_look_for_the_nearest_name():
    """Each look-up compares with every name of the file: 27B with other names throughout took more than a minute."""
    spec = describe(Config(tiny.flat("gemma3")))
    names = [name for target in targets(spec) for name, _ in target.parts if name != "embed_tokens.weight"]
    tensors = {"model." + name.replace("layers.", "blocks."): SimpleNamespace(shape=()) for name in names}
    tensors["model.embed_tokens.weight"] = SimpleNamespace(shape=(64, 32))
    problems = account(spec, tensors).problems
    assert "the nearest name is model.blocks.0.input_layernorm.weight" in problems[0]
    assert len(problems) > 2 * 5 * 13 and sum("nearest" in problem for problem in problems) == 10


# --- parts that a text run does not read

@pytest.mark.parametrize(("family", "names"), [
    ("gemma3", ["vision_tower.vision_model.post_layernorm.bias", "multi_modal_projector.mm_soft_emb_norm.weight",
                "model.vision_tower.post_layernorm.bias", "model.multi_modal_projector.mm_input_projection_weight"]),
    ("llama4", ["vision_model.class_embedding", "multi_modal_projector.linear_1.weight"]),
    ("gemma4", ["model.vision_tower.std_bias", "model.audio_tower.output_proj.bias",
                "model.vision_embedder.pos_embedding", "model.embed_vision.embedding_projection.weight",
                "model.embed_audio.embedding_projection.weight"]),
])
def test_vision_and_audio_tensors(tmp_path, family, names):
    extra = {name: np.zeros(3, np.int64) for name in names}         # of any dtype: they are not read
    path = tiny.write_checkpoint(tmp_path / "nested", tiny.nested(family), prefix="language_model.model.", extra=extra)
    llm = LLM(path, device="cpu")
    assert sorted(llm.weights.unused) == sorted(names)
    assert f"tensors in the file that a text run does not read: {len(names)} (" in llm.explain()
    assert llm.weights.unused[0] in llm.explain()
    path = tiny.write_checkpoint(tmp_path / "text", tiny.flat(family), extra=extra)
    refuses(path, f"is not a tensor of {family}", f"(and {len(names) - 1} more")


def test_a_part_of_a_vision_name_is_not_enough(tmp_path):
    path = tiny.write_checkpoint(tmp_path / "c", tiny.nested("gemma3"), prefix="language_model.model.",
                                 extra={"language_model.model.vision_tower.w": np.zeros(3, np.float32)})
    refuses(path, "language_model.model.vision_tower.w is not a tensor of gemma3")


def test_an_index_that_misses_a_tensor(tmp_path):
    path = tiny.write_checkpoint(tmp_path / "c", tiny.flat("gemma3"), n_shards=2)
    index = path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map["model.norm.weight"]
    index.write_text(json.dumps({"weight_map": weight_map}))
    refuses(path, "model.norm.weight", "does not name")


# --- layers that read another's K and V

LEFT_OVER = [f"model.language_model.layers.{i}.self_attn.{name}.weight" for i in (3, 4, 5)
             for name in ("k_proj", "v_proj", "k_norm")]


def test_k_and_v_that_no_layer_uses(tmp_path):
    """Released E-series files hold them for layers that read another's; re-released ones do not."""
    config = tiny.nested("gemma4-e")
    extra = {name: np.ones((32, 32), np.float32) for name in LEFT_OVER}
    plain, full = (tiny.write_checkpoint(tmp_path / name, config, prefix="model.language_model.", extra=more)
                   for name, more in (("plain", {}), ("full", extra)))
    llm = LLM(full, device="cpu")
    assert sorted(llm.weights.unused) == sorted(LEFT_OVER)
    np.testing.assert_array_equal(logits(full), logits(plain))


@pytest.mark.parametrize("name", ["layers.3.self_attn.k_proj.bias", "layers.3.self_attn.v_norm.weight"])
def test_only_these_are_known(tmp_path, name):
    path = tiny.write_checkpoint(tmp_path / "c", tiny.flat("gemma4-e"), extra={"model." + name: np.ones(3, np.float32)})
    refuses(path, f"model.{name} is not a tensor of gemma4")


@pytest.mark.parametrize(("family", "name", "shape", "expected"), [
    ("gemma4-moe", "layers.2.experts.gate_up_proj", (8, 32, 24), "is [8, 32, 24], expected [8, 24, 32]"),
    ("llama4", "layers.1.feed_forward.experts.gate_up_proj", (8, 48, 32), "is [8, 48, 32], expected [8, 32, 48]"),
    ("llama4", "layers.1.feed_forward.experts.down_proj", (8, 32, 24), "is [8, 32, 24], expected [8, 24, 32]"),
])
def test_transposed_experts(tmp_path, family, name, shape, expected):
    config = tiny.flat(family)
    tensors = {**tiny.random_tensors(config), name: np.zeros(shape, np.float32)}
    refuses(tiny.write_checkpoint(tmp_path / "c", config, tensors), f"model.{name} {expected} by config.json")
