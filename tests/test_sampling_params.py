"""engine/sampling_params.py: every field is checked at the door, and says what it expected."""

import math
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest

from engine import ParamsError, RawgemError, SamplingParams

BAD = {
    "max_tokens": [0, -1, 1.0, True, "4", None], "temperature": [-0.1, math.nan, math.inf, "1", None, True, 1j],
    "top_k": [-2, 1.5, True, None, "3"], "top_p": [0, -0.5, 1.01, math.nan, None, "1"],
    "min_p": [-0.1, 1.1, math.nan, None], "seed": [-1, 2**64, 1.0, True, "7"],
    "n_logprobs": [-1, 1.5, True, None], "prompt_logprobs": [-1, 0.5, True, None],
    "stop": ["", ("a", ""), ["a", 3], 5, b"x", {"a": 1}, 0, False],
    "stop_token_ids": [(-1,), [1.0], [True], 5, 0, "ab", b"ab", {3: 1}, np.array([0.5])],
    "ignore_eos": [1, None, "yes"], "min_tokens": [-1, 17, True, 1.0],
    "repetition_penalty": [0, -1, math.inf, None, "1"], "presence_penalty": [math.nan, math.inf, None, True],
    "frequency_penalty": [-math.inf, "0", None],
    "logit_bias": [[(1, 2.0)], {-1: 1.0}, {1: math.inf}, {1: math.nan}, {1.0: 1.0}, {True: 1.0}, {1: "2"}, 3],
}
GOOD = {
    "max_tokens": [1, 10**9, np.int64(3)], "temperature": [0, 1e-9, 100, np.float32(0.5)], "top_k": [0, 1, 10**6, -1],
    "top_p": [1e-9, 1, 1.0], "min_p": [0, 1, 0.5], "seed": [None, 0, 2**64 - 1, np.uint64(2**64 - 1)],
    "n_logprobs": [0, 20], "prompt_logprobs": [0, 20], "stop": [(), [], None, "a", ["a", "bc"], {"a"}],
    "stop_token_ids": [(), None, [0], {5}, np.array([3, 4])], "ignore_eos": [True, False], "min_tokens": [0, 16],
    "repetition_penalty": [1e-3, 1, 2.5], "presence_penalty": [-2, 0, 2.0], "frequency_penalty": [-2, 0, 2.0],
    "logit_bias": [None, {}, {0: -100}, {5: 1.5, np.int64(7): np.float32(2)}],
}


def cases(table):
    return [pytest.param(name, value, id=f"{name}={value!r}") for name, values in table.items() for value in values]


def test_every_field_is_tried():
    assert set(BAD) == set(GOOD) == {field.name for field in fields(SamplingParams)}


@pytest.mark.parametrize("name, value", cases(BAD))
def test_a_bad_value_is_named_with_what_was_expected(name, value):
    with pytest.raises(ParamsError, match=f"^SamplingParams: {name} is .*, expected ") as caught:
        SamplingParams(**{name: value})
    assert isinstance(caught.value, RawgemError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name, value", cases(GOOD))
def test_a_good_value_is_taken(name, value):
    SamplingParams(**{name: value})


def test_unknown_fields_and_changes_are_refused():
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)
    with pytest.raises(FrozenInstanceError):
        SamplingParams().temperature = 0.0


def test_spellings_that_mean_the_same_compare_equal():
    assert SamplingParams(stop="end") == SamplingParams(stop=["end"]) == SamplingParams(stop=("end",))
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams()
    assert SamplingParams(stop_token_ids=[3]) == SamplingParams(stop_token_ids=(3,))
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)


def test_greedy_is_temperature_zero_and_next_to_it():
    assert SamplingParams(temperature=0).is_greedy and SamplingParams(temperature=1e-6).is_greedy
    assert not SamplingParams().is_greedy and not SamplingParams(temperature=1e-4).is_greedy
