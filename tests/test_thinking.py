"""engine/thinking.py: the relaxed rule as an argument, and which tokens are thought."""

from types import SimpleNamespace

import numpy as np
import pytest

from engine import SamplingParams
from engine.errors import ConfigError
from engine.tasks import Generation
from engine.thinking import RelaxedRule, ThinkingMarks

OPEN, CLOSE = 7, 8
MARKS = ThinkingMarks(OPEN, CLOSE)


@pytest.mark.parametrize("given, rule", [
    ({}, (10, 0.6)), ({"top_k": 3}, (3, 0.6)), ({"delta": 0}, (10, 0.0)),
    ({"top_k": np.int64(2), "delta": 1}, (2, 1.0)), ({"top_k": 2**40}, (2**31 - 1, 0.6)),
    (RelaxedRule(4, 0.5), (4, 0.5))])
def test_rules(given, rule):
    got = RelaxedRule.of(given)
    assert (got.top_k, got.delta) == rule and type(got.top_k) is int and type(got.delta) is float


@pytest.mark.parametrize("given, message", [
    (0.6, "relaxed_acceptance is 0.6, expected None or a dict with top_k and delta"), (True, "is True, expected"),
    ({"topk": 3}, "is {'topk': 3}, expected"), ({"top_k": 0}, "top_k is 0, expected an int >= 1"),
    ({"top_k": 2.0}, "top_k is 2.0"), ({"top_k": True}, "top_k is True"), ({"delta": 1.5}, "delta is 1.5, expected a"),
    ({"delta": float("nan")}, "delta is nan"), ({"delta": None}, "delta is None")])
def test_what_is_no_rule(given, message):
    with pytest.raises(ConfigError, match=message):
        RelaxedRule.of(given)


def test_marks_are_found_by_name():
    def tokenizer(known):
        return SimpleNamespace(token_id=known.get)
    assert ThinkingMarks.of(tokenizer({"<|channel>": 5, "<channel|>": 0})) == ThinkingMarks(5, 0)
    assert ThinkingMarks.of(tokenizer({"<|channel>": 5})) is None
    assert ThinkingMarks.of(None) is None


def test_the_last_mark_decides():
    for before in (False, True):
        assert MARKS.after(before, [1, 2]) == MARKS.after(before, []) == before
        assert MARKS.after(before, [CLOSE, OPEN, 1]) and not MARKS.after(before, [OPEN, 1, CLOSE, 2])


def test_along_drafts_a_mark_counts_behind_it():
    assert MARKS.along(True, [1, CLOSE, 2, OPEN, 3]) == [True, True, False, False, True]
    assert MARKS.along(False, [1, OPEN, OPEN, CLOSE, 3]) == [False, False, True, True, False]
    assert MARKS.along(True, []) == []


def generation(prompt, marks=MARKS, **params):
    return Generation(prompt, SamplingParams(**{"max_tokens": 9, **params}), 0, (), None, 99, marks)


def test_a_request_follows_its_prompt_and_its_tokens():
    """The prompt says how it begins, committed tokens go on; what was only drafted changes nothing."""
    task = generation([1, OPEN, 2])
    assert task.relaxed([CLOSE, 3]) == [True, False]
    assert task.relaxed([4, 3]) == [True, True]
    for token, expected in ((5, True), (CLOSE, False), (6, False), (OPEN, True)):
        task.append(token, None)
        assert task.relaxed([1]) == [expected]
    assert generation([1, OPEN, 2, CLOSE]).relaxed([1, OPEN, 1]) == [False, False, True]


def test_no_other_request_is_relaxed():
    """Not a greedy one, and none without the rule."""
    assert generation([OPEN], temperature=0).relaxed([1, 2]) == [False, False]
    assert generation([OPEN], marks=None).relaxed([1, 2]) == [False, False]
