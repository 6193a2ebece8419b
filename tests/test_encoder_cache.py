"""engine/vision/encoder_cache.py: what is encoded and when, what goes first, and who holds what."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.vision.encoder_cache import DEFAULT_PICTURES, EncoderCache
from tests.fake_encoder import FakeEncoder, assert_soft_tokens, picture, soft_tokens

LANE = SimpleNamespace(empty=np.zeros)
A, B, C, D = (picture(name, 4) for name in "abcd")


def cache_of(n_rows):
    return EncoderCache(FakeEncoder(), n_rows, 2, LANE)


def ask(cache, sequence, *pictures):
    """A step that holds all of the pictures; the keys that it made the encoder encode."""
    n_calls = len(cache.encoder.calls)
    assert_soft_tokens(cache, [(sequence, one, 0, one.n_tokens) for one in pictures])
    assert len(cache.encoder.calls) <= n_calls + 1              # all that is missing is one batch
    return [name for name, _ in cache.encoder.calls[n_calls]] if len(cache.encoder.calls) > n_calls else []


def test_a_picture_is_encoded_once():
    cache = cache_of(12)
    assert ask(cache, 1, A, B, A) == ["a", "b"]                 # twice in one prompt
    assert ask(cache, 2, B) == []                               # in another beside it
    cache.release(1)
    cache.release(2)
    assert ask(cache, 3, A, C) == ["c"]                         # after they ended
    assert cache.stats() == {"lookups": 6, "hits": 3, "encoded_pictures": 3, "encoded_tokens": 12, "evictions": 0,
                             "pictures": 3, "held_pictures": 2, "bytes": 12 * 16, "capacity_bytes": 12 * 16}


def test_parts_of_pictures():
    """A picture that is split between steps is looked up once, at its first soft token."""
    cache = cache_of(8)
    for media in ([(1, A, 0, 3)], [(1, A, 3, 4), (1, B, 0, 1)], [(1, B, 1, 4)]):
        assert_soft_tokens(cache, media)
    stats = cache.stats()
    assert (stats["lookups"], stats["hits"], stats["encoded_pictures"]) == (2, 0, 2)
    assert cache.source_of([(1, A, 3, 4)]).dtype == np.int32


def test_the_same_picture_in_another_size_is_another():
    cache = cache_of(12)
    assert ask(cache, 1, A, picture("a", 6)) == ["a", "a"]


def test_what_nobody_holds_goes_first_and_the_least_recently_used_of_it():
    cache = cache_of(12)
    ask(cache, 1, A)
    ask(cache, 2, B)
    ask(cache, 2, C)
    cache.release(2)
    ask(cache, 3, B)
    cache.release(3)                                            # held: a; not held: c, then b
    assert ask(cache, 4, D) == ["d"]
    cache.release(4)
    assert ask(cache, 5, A, B, D) == []
    cache.release(5)                                            # a is held by 1 all the time, and used before b and d
    assert ask(cache, 6, C) == ["c"] and cache.stats()["evictions"] == 2
    cache.release(6)
    assert ask(cache, 6, A, D, C) == []


def test_what_is_held_goes_where_a_step_needs_the_room_and_is_encoded_again():
    cache = cache_of(8)
    ask(cache, 1, A)
    ask(cache, 1, B)
    assert ask(cache, 2, C, B) == ["c"]                         # a, though held: b is needed
    assert cache.stats()["held_pictures"] == 2
    assert ask(cache, 1, A) == ["a"]
    cache.release(1)
    cache.release(2)
    assert cache.stats()["held_pictures"] == 0


def test_more_than_there_is_room_for_in_one_step_is_our_own_mistake():
    with pytest.raises(AssertionError, match="more soft tokens in a step"):
        ask(cache_of(7), 1, A, B)


def test_stats_may_be_asked_while_another_thread_steps():
    class Meanwhile(set):
        def __bool__(self):
            cache._entries.pop(B.key, None)                     # what a step may do between two entries
            return True

    cache = cache_of(12)
    ask(cache, 1, A, B, C)
    cache._entries[A.key].holders = Meanwhile()
    assert cache.stats()["held_pictures"] == 3


def test_an_encoder_that_fails_leaves_the_cache_as_it_was(monkeypatch):
    cache = cache_of(8)
    ask(cache, 1, A)
    before = cache.stats()

    def fails(*args):
        raise RuntimeError("no")
    with monkeypatch.context() as patch:
        patch.setattr(cache.encoder, "encode", fails)
        with pytest.raises(RuntimeError):
            ask(cache, 2, A, B)
    after = cache.stats()
    assert {**after, "lookups": 0, "hits": 0} == {**before, "lookups": 0, "hits": 0}
    assert ask(cache, 2, A, B) == ["b"]
    cache.clear()
    assert cache.stats()["bytes"] == cache.stats()["pictures"] == 0
    assert ask(cache, 2, A, B) == ["a", "b"]


@settings(max_examples=300, deadline=None)
@given(n_rows=st.integers(12, 30), data=st.data())
def test_any_history_agrees_with_a_dict(n_rows, data):
    """Whatever comes and goes: soft tokens are right, rows are those of one picture, none is lost."""
    cache, held = cache_of(n_rows), {}
    pictures = [picture(name, n) for name, n in zip("abcdefg", (1, 2, 3, 4, 5, 6, 6), strict=True)]
    for _ in range(data.draw(st.integers(1, 12))):
        if held and data.draw(st.booleans()):
            sequence = data.draw(st.sampled_from(sorted(held)))
            cache.release(sequence)
            del held[sequence]
            continue
        sequence, wanted = data.draw(st.integers(0, 3)), data.draw(st.lists(st.sampled_from(pictures), max_size=4))
        while sum(one.n_tokens for one in {one.key: one for one in wanted}.values()) > n_rows:
            wanted.pop()
        if wanted:
            ask(cache, sequence, *wanted)
            held.setdefault(sequence, set()).update(one.key for one in wanted)
        stats = cache.stats()
        present = [one for one in pictures if one.key in cache._entries]
        for keys in held.values():
            keys &= set(cache._entries)                         # nobody holds what had to go
        rows = np.concatenate([cache._free, *(cache._entries[one.key].rows for one in present)])
        assert sorted(rows.tolist()) == list(range(n_rows))
        for one in present:
            np.testing.assert_array_equal(cache.soft[cache._entries[one.key].rows],
                                          soft_tokens(one.key, one.n_tokens))
        assert stats["held_pictures"] == sum(any(one.key in keys for keys in held.values()) for one in present)
        assert stats["bytes"] == 16 * sum(one.n_tokens for one in present)
        assert stats["encoded_pictures"] == stats["evictions"] + len(present)


@pytest.mark.parametrize(("has_blocks", "n_bytes", "n_rows"), [
    (True, None, DEFAULT_PICTURES * 1120), (True, 0, 2048), (True, 16 * 5000, 5000), (False, 0, 2048 + 2 * 1119)])
def test_rows_within_a_budget_of_bytes_but_enough_for_a_step(has_blocks, n_bytes, n_rows):
    spec = SimpleNamespace(has_blocks=has_blocks, hidden=8)
    assert EncoderCache.n_rows(spec, 2048, 1120, n_bytes, 2) == n_rows
