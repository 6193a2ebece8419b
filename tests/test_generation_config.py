"""loaders/generation_config.py: stop ids and sampling defaults, under this project's names."""

import json

import pytest

from loaders.errors import CheckpointError, ConfigError
from loaders.generation_config import GenerationConfig, load_generation_config


def load(directory, **values):
    (directory / "generation_config.json").write_text(json.dumps(values))
    return load_generation_config(directory)


def test_no_file(tmp_path):
    assert load_generation_config(tmp_path) == GenerationConfig(eos_token_ids=(), sampling={})


def test_the_file_of_a_released_model(tmp_path):
    """As gemma-4-26b is released."""
    config = load(tmp_path, bos_token_id=2, do_sample=True, eos_token_id=[1, 106, 50], pad_token_id=0, temperature=1.0,
                  top_k=64, top_p=0.95, transformers_version="5.5.0")
    assert config == GenerationConfig((1, 106, 50), {"temperature": 1.0, "top_k": 64, "top_p": 0.95})


def test_names_and_types(tmp_path):
    config = load(tmp_path, eos_token_id=1, temperature=1, top_k=0, top_p=1, min_p=0, repetition_penalty=1.5,
                  max_new_tokens=5, min_new_tokens=2)
    assert config.eos_token_ids == (1,)
    assert config.sampling == {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.5,
                               "max_tokens": 5, "min_tokens": 2}
    assert type(config.sampling["temperature"]) is float


def test_null_is_absent(tmp_path):
    assert load(tmp_path, eos_token_id=None, temperature=None, top_k=None, do_sample=None, max_new_tokens=None) == \
        GenerationConfig()


def test_do_sample_false_is_greedy(tmp_path):
    greedy = load(tmp_path, do_sample=False, temperature=0.7, top_k=64, top_p=0.9, min_p=0.1, repetition_penalty=1.1)
    assert greedy.sampling == {"temperature": 0.0, "repetition_penalty": 1.1}
    assert load(tmp_path, do_sample=False).sampling == {"temperature": 0.0}


@pytest.mark.parametrize(("key", "value", "expected"), [
    ("eos_token_id", "1", "a token id >= 0 or a list of them"),
    ("eos_token_id", [1, "x"], "a token id >= 0 or a list of them"),
    ("eos_token_id", [1, True], "a token id >= 0 or a list of them"),
    ("eos_token_id", -1, "a token id >= 0 or a list of them"),
    ("temperature", "hot", "a number"),
    ("temperature", True, "a number"),
    ("top_p", [], "a number"),
    ("min_p", float("nan"), "a number"),
    ("repetition_penalty", float("inf"), "a number"),
    ("top_k", 1.5, "an int >= -1"),
    ("top_k", -2, "an int >= -1"),
    ("max_new_tokens", 0, "an int >= 1"),
    ("min_new_tokens", "2", "an int >= 0"),
    ("do_sample", 0, "true or false"),
])
def test_wrong_values_are_named(tmp_path, key, value, expected):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, **{key: value})
    text = str(caught.value)
    assert text.startswith(f"generation_config.json: {key} is {json.dumps(value)}")
    assert text.endswith(f"expected {expected}")


@pytest.mark.parametrize("data", [b"{", b"\xff"])
def test_broken_file(tmp_path, data):
    (tmp_path / "generation_config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        load_generation_config(tmp_path)
