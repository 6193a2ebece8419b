"""engine/draft_health.py: acceptance by place in the draft, tokens a step, and the warning that drafts never hold."""

import warnings

import pytest

from engine.draft_health import ENOUGH, DraftHealth


def noted(*checks):
    health = DraftHealth()
    for n_drafted, n_accepted in checks:
        health.note(n_drafted, n_accepted)
    return health


def test_rates_by_place():
    """Drafts of different lengths: a place counts where it was drafted."""
    stats = noted((3, 3), (3, 1), (2, 0), (1, 1), (0, 0)).stats()
    assert stats == {"steps": 5, "checks": 4, "drafted": 9, "accepted": 5, "tokens_per_check": 9 / 4,
                     "tokens_per_step": 2.0, "acceptance": [3 / 4, 1 / 3, 1 / 2],
                     "conditional_acceptance": [3 / 4, 1 / 2, 1.0]}


def test_tokens_of_a_check_count_the_one_behind():
    """One draft that always holds: two tokens a check."""
    assert noted(*[(1, 1)] * 7).stats()["tokens_per_check"] == 2.0
    assert noted(*[(1, 0)] * 7).stats()["tokens_per_check"] == 1.0


def test_nothing_checked():
    stats = noted((0, 0)).stats()
    assert stats["tokens_per_step"] == 1.0 and stats["tokens_per_check"] == 0 and stats["acceptance"] == []
    assert list(DraftHealth().lines()) == ["  no drafted token was checked in 0 steps of a sequence"]


def test_lines():
    lines = list(noted(*[(2, 2)] * 3, (2, 0), (0, 0)).lines())
    assert lines == ["  6 of 8 drafted tokens accepted in 4 checks: 2.50 tokens a check, 2.20 a step",
                     "  acceptance by place: 75 75 %; of those whose predecessors held: 75 100 %"]


def test_the_rate_of_all():
    health = DraftHealth()
    assert health.rate(0.7, 4) == 0.7
    health.note(4, 1)                                       # one kept of two judged
    assert health.rate(0.7, 4) == pytest.approx((1 + 4 * 0.7) / (2 + 4))


def test_drafts_that_never_hold_are_warned_of_once():
    health = DraftHealth()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(ENOUGH - 1):
            health.note(4, 0)
    with pytest.warns(RuntimeWarning, match=f"of {ENOUGH} first drafted tokens 0 were accepted.*made for this target"):
        health.note(4, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(ENOUGH):
            health.note(4, 0)


def test_drafts_that_seldom_hold_are_not():
    """The worst prompts known keep 8 of 100; a sequence that only prefills or decodes plainly says nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noted(*[(4, int(i % 12 == 0)) for i in range(5 * ENOUGH)], *[(0, 0)] * 5 * ENOUGH)
        noted(*[(0, 0)] * 5 * ENOUGH)
