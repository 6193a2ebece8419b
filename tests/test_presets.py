"""engine/models/presets.py: released shapes by name. tests/test_models.py holds them against what is published."""

import pytest

from engine.errors import ConfigError
from engine.models.presets import PRESETS, preset
from engine.models.spec import ModelSpec
from tests.released import RELEASED


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_spec_of_its_config(name):
    spec = preset(name)
    text = PRESETS[name].get("text_config", PRESETS[name])
    assert isinstance(spec, ModelSpec) and spec.vocab == text.get("vocab_size", 262208)
    assert (spec.hidden, len(spec.layers)) == (text["hidden_size"], text["num_hidden_layers"])


def test_every_preset_has_published_counts_to_answer_to():
    assert list(RELEASED) == list(PRESETS)


def test_the_models_that_kernels_are_checked_for_are_there():
    assert {"gemma-3-1b", "gemma-3-4b", "gemma-3-12b", "gemma-3-27b", "gemma-4-31b"} <= set(PRESETS)


def test_a_wrong_name_lists_the_right_ones():
    with pytest.raises(ConfigError, match=r"no preset 'gemma-4-1b', expected one of gemma-3-270m, gemma-3-1b, .*31b"):
        preset("gemma-4-1b")
