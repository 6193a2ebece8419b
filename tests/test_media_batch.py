"""Soft tokens in the arrays of a step: engine/batch.py, and engine/step_inputs.py, which brings them to a lane."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import SamplingParams
from engine.backend import HostLane
from engine.batch import Batch
from engine.kernels import ops
from engine.kernels.paged import plan
from engine.kv_cache import KVCache, PoolSpec
from engine.models import AttentionSpec, DenseSpec, LayerSpec, ModelSpec, RopeSpec
from engine.sequence import MediaRun, Sequence
from engine.step_inputs import Stager
from tests.fake_encoder import picture

LANE = HostLane("emulated", ops, np.dtype(np.float32))
PAD, IMAGE = 0, 9
SPECS = [PoolSpec(3, 1, 16, (0,), sees_blocks=True), PoolSpec(None, 1, 16, (1,))]
WHOLE = PoolSpec(3, 1, 16, (2,), sees_blocks=True, sees_whole_blocks=True)


def cache_of(specs=SPECS, page_size=4):
    return KVCache(specs, [64] * len(specs), page_size, LANE)


def sequence_of(cache, n_tokens, runs=(), first_logit=None, samples=False):
    """Tokens are 10, 11, ... and IMAGE at the soft tokens of runs [(begin, n)]."""
    media = [MediaRun(begin, picture(f"{begin}", n)) for begin, n in runs]
    task = SimpleNamespace(first_logit=n_tokens - 1 if first_logit is None else first_logit, hidden=None,
                           samples=samples, rule=lambda: (SamplingParams(), 0, 0),
                           edits=lambda drafts: [(SamplingParams(), None)])
    tokens = list(range(10, 10 + n_tokens))
    for run in media:
        tokens[run.begin:run.end] = [IMAGE] * run.picture.n_tokens
    return Sequence(0, tokens, task, cache.new_page_lists(), media)


def batch_of(cache, *work):
    for sequence, n in work:
        assert cache.reserve(sequence, n) == n
    return Batch.build(work, cache, PAD)


def test_soft_tokens_are_looked_up_as_pad_and_placed_afterwards():
    cache = cache_of()
    seeing, text = sequence_of(cache, 10, [(2, 3), (6, 2)]), sequence_of(cache, 4)
    batch = batch_of(cache, (text, 4), (seeing, 10))
    assert batch.token_ids.tolist() == [10, 11, 12, 13, 10, 11, PAD, PAD, PAD, 15, PAD, PAD, 18, 19]
    assert batch.media_rows.tolist() == [6, 7, 8, 10, 11] and batch.media_rows.dtype == np.int32
    assert [(s, one.key, first, end) for s, one, first, end in batch.media] == [
        (seeing, ("2", 3), 0, 3), (seeing, ("6", 2), 0, 2)]
    assert seeing.tokens[2:5] == [IMAGE] * 3                    # what the prompt was stays known


def test_tokens_see_the_whole_picture_only_where_layers_do():
    cache = cache_of()
    seeing, text = sequence_of(cache, 10, [(2, 3), (6, 2)]), sequence_of(cache, 4)
    sliding, causal = batch_of(cache, (text, 4), (seeing, 10)).pools
    assert sliding.last_visible.tolist() == [0, 1, 2, 3, 0, 1, 4, 4, 4, 5, 7, 7, 8, 9]
    assert causal.last_visible is None
    seeing.n_cached = 8
    assert all(pool.last_visible is None for pool in batch_of(cache, (text, 4), (seeing, 2)).pools)


def test_a_step_with_a_part_of_a_picture():
    """Where all layers are causal, pictures are split; a soft token is that of its place in the picture."""
    cache = cache_of([PoolSpec(None, 1, 16, (0,))])
    sequence = sequence_of(cache, 9, [(1, 4), (6, 2)])
    sequence.n_cached = 2
    batch = batch_of(cache, (sequence, 5))
    assert batch.token_ids.tolist() == [PAD, PAD, PAD, 15, PAD]
    assert batch.media_rows.tolist() == [0, 1, 2, 4]
    assert [(first, end) for _, _, first, end in batch.media] == [(1, 4), (0, 1)]
    assert batch.pools[0].last_visible is None


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_what_is_visible_in_any_batch_and_of_what_is_kept(data):
    """Token by token: its own position, or the last one and the first one of its picture; rows that are kept keep
    theirs."""
    cache, work = cache_of([*SPECS, WHOLE]), []
    for _ in range(data.draw(st.integers(1, 3))):
        runs, at = [], 0
        for gap, n in data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), max_size=3)):
            runs.append((at + gap, n))
            at += gap + n
        n_tokens = at + data.draw(st.integers(1, 4))
        ends = [end for end in range(n_tokens + 1) if not any(begin < end < begin + n for begin, n in runs)]
        begin = data.draw(st.sampled_from(ends[:-1]))
        end = data.draw(st.sampled_from([end for end in ends if end > begin]))
        sequence = sequence_of(cache, n_tokens, runs, data.draw(st.integers(0, n_tokens - 1)))
        assert cache.reserve(sequence, begin) == begin
        sequence.n_cached = begin
        sequence.next_logit = max(sequence.next_logit, begin)
        work.append((sequence, end - begin))
    batch = batch_of(cache, *work)
    expected, kept = ([], []), ([], [])
    for sequence, n in work:
        positions = range(sequence.n_cached, sequence.n_cached + n)
        for i, of_run in enumerate((lambda run: run.end - 1, lambda run: run.begin)):
            seen = [next((of_run(run) for run in sequence.media if run.begin <= p < run.end), p) for p in positions]
            expected[i].extend(seen)
            kept[i].extend(seen[max(0, sequence.next_logit - sequence.n_cached):])
    has_media = any(run.begin < s.n_cached + n and s.n_cached < run.end for s, n in work for run in s.media)
    for pools, (last, first) in ((batch.pools, expected), (batch.kept_pools, kept)):
        sliding, causal, whole = pools
        assert [causal.last_visible, causal.first_visible, sliding.first_visible] == [None] * 3
        if has_media:
            assert sliding.last_visible.tolist() == whole.last_visible.tolist() == last
            assert whole.first_visible.tolist() == first
        else:
            assert [sliding.last_visible, whole.last_visible, whole.first_visible] == [None] * 3


def test_a_step_with_a_soft_token_is_no_decode_step():
    """One token left of a prompt, to be sampled after: as a decode's, but for what stands there. Graphs have no place
    for that."""
    cache = cache_of([PoolSpec(None, 1, 16, (0,))])
    ends_in_a_picture, text = sequence_of(cache, 6, [(2, 4)], samples=True), sequence_of(cache, 6, samples=True)
    for sequence in (ends_in_a_picture, text):
        assert cache.reserve(sequence, 5) == 5
        sequence.n_cached = 5
    assert batch_of(cache, (text, 1)).is_decode
    assert not batch_of(cache, (text, 1), (ends_in_a_picture, 1)).is_decode


# --- staged

def stager_of(cache, max_tokens=64, longest_run=16):
    rope = RopeSpec(1e4)
    layers = tuple(LayerSpec(AttentionSpec(2, 1, 16, 1.0, rope, pool.window, sees_blocks=pool.sees_blocks,
                                           sees_whole_blocks=pool.sees_whole_blocks), DenseSpec(16))
                   for pool in cache.specs)
    spec = ModelSpec("tiny", 16, 32, layers, 1e-6, 0.0, 1.0, None, 96, True)
    return Stager(spec, cache, 96, max_tokens, 4, LANE, longest_run=longest_run)


@pytest.mark.parametrize("last_sees", [False, True])
def test_what_is_staged_of_pictures(last_sees):
    """The last layer, where rows are dropped, is causal or sees blocks; text beside and a step without pictures."""
    sees, causal = (1, 0) if last_sees else (0, 1)              # numbers of layers and their pools
    cache = cache_of([replace(spec, layers=(i,)) for i, spec in enumerate(SPECS[::-1] if last_sees else SPECS)])
    seeing, text = sequence_of(cache, 10, [(2, 3), (6, 4)]), sequence_of(cache, 4)
    seeing.next_logit = 7
    stager = stager_of(cache)
    batch = batch_of(cache, (seeing, 10), (text, 4))
    batch.media_source = np.arange(100, 107, dtype=np.int32)
    got = stager(batch)
    assert got.media_rows.tolist() == batch.media_rows.tolist() == [2, 3, 4, 6, 7, 8, 9]
    assert got.media_source.tolist() == list(range(100, 107))
    assert got.pools[sees].last_visible.tolist() == [0, 1, 4, 4, 4, 5, 9, 9, 9, 9, 0, 1, 2, 3]
    assert got.pools[causal].last_visible is None
    kept = got.kept_pools[1]
    assert (kept.last_visible.tolist() == [9, 9, 9, 3]) if last_sees else kept.last_visible is None
    expected = plan(batch.pools[sees].rows, n_heads=2, n_kv_heads=1, head_dim=16, window=3,
                    last_visible=batch.pools[sees].last_visible)
    np.testing.assert_array_equal(got.pools[sees].prefill_work, expected.prefill)
    np.testing.assert_array_equal(got.pools[sees].decode_work, expected.decode)
    seeing.n_cached, text.n_cached = 10, 4
    seeing.tokens.append(1)
    text.tokens.append(1)
    got = stager(batch_of(cache, (seeing, 1), (text, 1)))
    assert got.media_rows is None and got.media_source is None
    assert all(pool.last_visible is None for pool in got.pools)


def test_what_is_staged_where_windows_do_not_cut_pictures():
    """The picture ends the prompt, and begins in an earlier tile of keys than the last layer's window of 3."""
    cache = cache_of([replace(SPECS[0], layers=(0,)), replace(WHOLE, layers=(1,))])
    seeing, text = sequence_of(cache, 76, [(60, 16)]), sequence_of(cache, 4)
    seeing.next_logit = 72
    batch = batch_of(cache, (seeing, 76), (text, 4))
    batch.media_source = np.arange(16, dtype=np.int32)
    got = stager_of(cache)(batch)
    sliding, whole = got.pools
    kept = got.kept_pools[1]
    assert sliding.first_visible is None
    assert whole.first_visible.tolist() == [*range(60), *[60] * 16, 0, 1, 2, 3]
    assert whole.last_visible.tolist() == sliding.last_visible.tolist()
    assert (kept.first_visible.tolist(), kept.last_visible.tolist()) == ([60] * 4 + [3], [75] * 4 + [3])
    for staged, pool in ((whole, batch.pools[1]), (kept, batch.kept_pools[1])):
        expected = plan(pool.rows, n_heads=2, n_kv_heads=1, head_dim=16, window=3, last_visible=pool.last_visible,
                        first_visible=pool.first_visible)
        np.testing.assert_array_equal(staged.prefill_work, expected.prefill)
        np.testing.assert_array_equal(staged.decode_work, expected.decode)


@pytest.mark.parametrize("n_seqs", [1, 4])
def test_the_buffer_is_large_enough_for_a_step_of_soft_tokens(n_seqs):
    """Pictures alone, windows that reach back, few pages a sequence: nothing has to be allocated for it."""
    cache = cache_of(page_size=1)
    stager = stager_of(cache)
    buffer, work = stager._buffer, []
    for _ in range(n_seqs):
        sequence = sequence_of(cache, 16, [(0, 16)], first_logit=0)
        work.append((sequence, 16))
    batch = batch_of(cache, *work)
    batch.media_source = np.arange(16 * n_seqs, dtype=np.int32)
    stager(batch)
    assert stager._buffer is buffer
