"""engine/kv_cache.py, and the arrays engine/batch.py makes of it: who owns which page, and where each token lies."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Batch
from engine.kv_cache import KVCache, PageAllocator, PoolSpec, pool_specs
from engine.models.presets import preset
from engine.models.spec import AttentionSpec, DenseSpec, LayerSpec, ModelSpec, RopeSpec

LANE = SimpleNamespace(empty=lambda shape: np.empty(shape, np.float32))


def pool(window, layers=(0,), n_kv_heads=1, head_dim=1, chunk=None):
    return PoolSpec(window, n_kv_heads, head_dim, layers, chunk)


def chunked_cache(chunk, n_pages, page_size):
    return KVCache([pool(None, chunk=chunk)], [n_pages], page_size, LANE)


def cache_of(*windows, n_pages, page_size):
    n_pages = [n_pages] * len(windows) if isinstance(n_pages, int) else n_pages
    return KVCache([pool(window, (i,)) for i, window in enumerate(windows)], n_pages, page_size, LANE)


def sequence_in(cache, n_tokens=0):
    return SimpleNamespace(page_lists=cache.new_page_lists(), n_cached=0, drafts=[], tokens=list(range(n_tokens)),
                           next_logit=n_tokens - 1, task=SimpleNamespace(hidden=None, samples=False), media=())


def compute(cache, sequence, n):
    """One step of n tokens for one sequence; returns the pages it held in each pool while computing."""
    assert cache.reserve(sequence, n) == n
    held = [list(pages.pages) for pages in sequence.page_lists]
    sequence.n_cached += n
    cache.trim(sequence)
    return held


def n_runs(pages):
    return 1 + int((np.diff(pages) != 1).sum())


# --- PageAllocator

@settings(max_examples=300, deadline=None)
@given(st.integers(1, 24), st.data())
def test_allocator_agrees_with_a_set(n_pages, data):
    """No page is handed out twice, none is lost, and the page after `after` comes first when it is free."""
    allocator, free = PageAllocator(n_pages), set(range(n_pages))
    for _ in range(data.draw(st.integers(1, 12))):
        used = sorted(set(range(n_pages)) - free)
        if used and data.draw(st.booleans()):
            back = data.draw(st.lists(st.sampled_from(used), unique=True))
            allocator.free(back)
            free |= set(back)
        else:
            after = data.draw(st.none() | st.sampled_from(used)) if used else None
            pages = allocator.allocate(data.draw(st.integers(0, len(free))), after)
            assert len(set(pages)) == len(pages) and set(pages) <= free
            if pages and after is not None and after + 1 in free:
                assert pages[0] == after + 1
            free -= set(pages)
        assert allocator.n_free == len(free)
    for page in free:
        with pytest.raises(AssertionError, match=f"page {page} freed twice"):
            allocator.free([page])


def test_allocator_takes_no_more_than_it_has():
    allocator = PageAllocator(3)
    assert allocator.allocate(0) == []
    with pytest.raises(AssertionError):
        allocator.allocate(4)
    assert sorted(allocator.allocate(3)) == [0, 1, 2]
    with pytest.raises(AssertionError):
        allocator.allocate(1)
    assert PageAllocator(0).n_free == 0


def test_a_lone_growing_sequence_has_one_run_of_pages():
    cache = cache_of(None, n_pages=32, page_size=4)
    sequence = sequence_in(cache)
    for n in (5, 1, 1, 9, 1, 60, 51):
        compute(cache, sequence, n)
    assert n_runs(sequence.page_lists[0].pages) == 1 and len(sequence.page_lists[0].pages) == 32


def test_freed_pages_join_again():
    """Freed in whatever order, the next sequence finds one run as long as the pool."""
    allocator = PageAllocator(16)
    pages = allocator.allocate(16)
    allocator.free(pages[1::2])
    allocator.free(pages[::2][::-1])
    assert n_runs(allocator.allocate(16)) == 1


def test_sequences_that_grow_side_by_side_get_runs():
    """Two sequences that take pages in turn do not end up with every second page each."""
    cache = cache_of(None, n_pages=64, page_size=1)
    pair = [sequence_in(cache), sequence_in(cache)]
    for _ in range(24):
        for sequence in pair:
            compute(cache, sequence, 1)
    assert [n_runs(sequence.page_lists[0].pages) for sequence in pair] == [1, 1]


def test_a_sequence_gets_one_run_where_there_is_one():
    allocator = PageAllocator(16)
    allocator.allocate(2)
    assert n_runs(allocator.allocate(12)) == 1


# --- KVCache

@pytest.mark.parametrize("page_size", [1, 2, 3, 16])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 7, 16, 33])
def test_pages_needed_is_what_a_sequence_holds_at_most(window, page_size):
    """Computed token by token: the plan counts neither a page too few nor one too many."""
    for n_tokens in (1, 2, 5, 16, 17, 60):
        cache = cache_of(window, n_pages=60, page_size=page_size)
        sequence = sequence_in(cache)
        most = max(len(compute(cache, sequence, 1)[0]) for _ in range(n_tokens))
        assert cache.specs[0].pages_needed(n_tokens, page_size) == most


@pytest.mark.parametrize("chunk", [1, 2, 5, 11])
@pytest.mark.parametrize("page_size", [1, 3, 4, 16])
@pytest.mark.parametrize("window", [1, 3, 4, 9])
def test_sliding_pages_cover_the_window_and_no_more(window, page_size, chunk):
    cache = cache_of(window, n_pages=90, page_size=page_size)
    sequence, held = sequence_in(cache), 0
    for _ in range(8):
        start = sequence.n_cached
        during = compute(cache, sequence, chunk)[0]
        first = sequence.page_lists[0].first
        last = start + chunk - 1
        assert len(during) <= cache.specs[0].live_pages(chunk, page_size)
        kept_from = max(0, last - window)                      # P - W stays, with P the last committed position
        assert first == kept_from // page_size
        assert first + len(sequence.page_lists[0].pages) == last // page_size + 1
        assert set(sequence.page_lists[0].pages) <= set(during)
        held = max(held, len(during))
    cache.release(sequence)
    assert cache.allocators[0].n_free == 90


@pytest.mark.parametrize("page_size", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("chunk", [1, 2, 3, 8, 12, 16, 20])
def test_pages_needed_for_chunks_is_what_a_sequence_holds_at_most(chunk, page_size):
    """Whether or not chunks begin where pages do."""
    for n_tokens in (1, 2, chunk, chunk + 1, 2 * chunk + 1, 60):
        cache = chunked_cache(chunk, 60, page_size)
        sequence = sequence_in(cache)
        most = max(len(compute(cache, sequence, 1)[0]) for _ in range(n_tokens))
        assert cache.specs[0].pages_needed(n_tokens, page_size) == most


@pytest.mark.parametrize("n_new", [1, 2, 5, 11, 24])
@pytest.mark.parametrize("page_size", [1, 3, 4, 16])
@pytest.mark.parametrize("chunk", [1, 4, 6, 16])
def test_chunked_pages_cover_the_chunk_of_the_last_position(chunk, page_size, n_new):
    """Pages behind it are free again, and no page that holds one of its positions is."""
    cache = chunked_cache(chunk, 200, page_size)
    sequence = sequence_in(cache)
    for _ in range(8):
        last = sequence.n_cached + n_new - 1
        during = compute(cache, sequence, n_new)[0]
        held = sequence.page_lists[0]
        assert len(during) <= cache.specs[0].live_pages(n_new, page_size)
        assert held.first == last // chunk * chunk // page_size
        assert held.first + len(held.pages) == last // page_size + 1
        assert cache.allocators[0].n_free == 200 - len(held.pages)
        assert set(held.pages) <= set(during)
    cache.release(sequence)
    assert cache.allocators[0].n_free == 200


def test_a_chunk_is_kept_until_the_next_has_a_position():
    """Chunks of 8 in pages of 4: the 8th position is committed with both pages held, the 9th gives both back."""
    cache = chunked_cache(8, 10, 4)
    sequence, n_held = sequence_in(cache), []
    for _ in range(18):
        compute(cache, sequence, 1)
        n_held.append((sequence.page_lists[0].first, len(sequence.page_lists[0].pages)))
    assert n_held == [*[(0, 1)] * 4, *[(0, 2)] * 4, *[(2, 1)] * 4, *[(2, 2)] * 4, *[(4, 1)] * 2]


@pytest.mark.parametrize("run", [1, 2, 7, 20])
@pytest.mark.parametrize("page_size", [1, 3, 4, 16])
@pytest.mark.parametrize("window", [1, 4, 9])
def test_pages_needed_for_a_run_is_what_a_sequence_holds_at_most(window, page_size, run):
    """A run computed at once, wherever it begins in a page, in a sequence computed one token at a time."""
    for n_tokens in (run, run + 1, window + run + 1, 70):
        most = 0
        for begin in range(n_tokens - run + 1):
            cache = cache_of(window, n_pages=80, page_size=page_size)
            sequence = sequence_in(cache)
            for n in [1] * begin + [run] + [1] * (n_tokens - run - begin):
                most = max(most, len(compute(cache, sequence, n)[0]))
        assert most == cache.specs[0].pages_needed(n_tokens, page_size, run)


def test_room_is_what_a_sequence_could_still_take():
    cache = cache_of(None, 4, n_pages=[5, 3], page_size=2)
    sequence, other = sequence_in(cache), sequence_in(cache)
    assert cache.room(sequence) == 6
    compute(cache, sequence, 3)                                 # two pages of each, half of one is left
    assert cache.room(sequence) == 3 and cache.room(other) == 2
    assert cache.reserve(sequence, 100) == 3 and cache.room(sequence) == 3 and cache.room(other) == 0


def test_reserve_gives_as_many_tokens_as_every_pool_has_room_for():
    cache = cache_of(None, 4, n_pages=[5, 3], page_size=2)
    sequence = sequence_in(cache)
    assert cache.reserve(sequence, 100) == 6                   # three pages of the smaller pool
    assert [len(held.pages) for held in sequence.page_lists] == [3, 3]
    assert cache.reserve(sequence, 100) == 6                   # nothing was computed: the same pages again
    assert [len(held.pages) for held in sequence.page_lists] == [3, 3]
    sequence.n_cached = 6
    other = sequence_in(cache)
    assert cache.reserve(other, 1) == 0 and cache.reserve(sequence, 1) == 0
    assert all(not held.pages for held in other.page_lists)    # a refused reservation takes nothing
    cache.release(sequence)
    cache.release(sequence)                                    # twice is harmless
    assert [allocator.n_free for allocator in cache.allocators] == [5, 3]


def test_could_hold_asks_every_pool():
    cache = cache_of(None, 2, n_pages=[4, 3], page_size=2)
    assert cache.could_hold(8) and not cache.could_hold(9)     # the global pool ends first
    other = sequence_in(cache)
    compute(cache, other, 1)
    assert cache.could_hold(4) and not cache.could_hold(5)     # two sliding pages and three global ones are left
    assert cache.could_hold(4, longest_run=4)                   # the window is nothing before the first token
    wide = cache_of(2, n_pages=4, page_size=2)
    assert wide.could_hold(50, longest_run=4) and not wide.could_hold(50, longest_run=5)


def test_layers_that_read_anothers_k_and_v_own_no_pages():
    """Gemma 4 E2B: 3 global and 12 sliding owners of 35 layers; a reader's slot is its owner's."""
    spec = preset("gemma-4-e2b")
    pools = pool_specs(spec)
    assert [(pool.kind, len(pool.layers), len(pool.shared)) for pool in pools] == [
        ("sliding(512)", 12, 16), ("global", 3, 4)]
    cache = KVCache(pools, [1, 1], 1, LANE)
    assert cache.k[0].shape == (12, 1, 1, 1, 256) and cache.k[1].shape == (3, 1, 1, 1, 512)
    assert sorted(cache.layer_slot) == list(range(35))
    for i, layer in enumerate(spec.layers):
        owner = i if layer.kv_from is None else {True: 14, False: 13}[layer.attention.window is None]
        assert cache.layer_slot[i] == cache.layer_slot[owner]
    assert len(set(cache.layer_slot.values())) == 15


def test_chunked_and_global_layers_have_a_pool_each():
    pools = pool_specs(preset("llama-4-maverick"))
    assert [(pool.kind, pool.chunk, pool.window, len(pool.layers), pool.is_local) for pool in pools] == [
        ("chunked(8192)", 8192, None, 36, True), ("global", None, None, 12, False)]
    assert [pool.token_bytes(2) for pool in pools] == [36 * 4096, 49_152]


def test_layers_that_see_all_of_a_picture_have_a_pool_of_their_own():
    """As in Gemma 4, where global ones are causal, and Gemma 3, where all see blocks; or beside layers that are not."""
    def spec_of(*kinds):
        layers = [LayerSpec(AttentionSpec(4, 1, 8, 1.0, RopeSpec(1e4), window, sees_blocks=sees), DenseSpec(8))
                  for window, sees in kinds]
        return ModelSpec("tiny", 8, 16, tuple(layers), 1e-6, 0.0, 1.0, None, 64, True)
    for kinds in (((5, True), (None, False)), ((5, True), (None, True)), ((5, True), (5, False))):
        pools = pool_specs(spec_of(*kinds, *kinds))
        assert [(p.window, p.sees_blocks, p.layers) for p in pools] == [
            (*kinds[0], (0, 2)), (*kinds[1], (1, 3))]


def test_pools_are_grouped_by_window_and_geometry():
    rope = RopeSpec(10000.0)
    def layer(window, n_kv_heads, head_dim):
        return LayerSpec(AttentionSpec(4, n_kv_heads, head_dim, 1.0, rope, window), DenseSpec(8))
    layers = (layer(7, 2, 8), layer(None, 1, 16), layer(7, 2, 8), layer(7, 1, 8), layer(None, 1, 16))
    spec = ModelSpec("tiny", 8, 16, layers, 1e-6, 0.0, 1.0, None, 64, True)
    pools = pool_specs(spec)
    assert [(p.window, p.n_kv_heads, p.head_dim, p.layers) for p in pools] == [
        (7, 2, 8, (0, 2)), (None, 1, 16, (1, 4)), (7, 1, 8, (3,))]
    assert [p.token_bytes(4) for p in pools] == [2 * 2 * 2 * 8 * 4, 2 * 2 * 16 * 4, 2 * 8 * 4]
    cache = KVCache(pools, [3, 2, 4], 5, LANE)
    assert cache.layer_slot == {0: (0, 0), 2: (0, 1), 1: (1, 0), 4: (1, 1), 3: (2, 0)}
    assert cache.k[0].shape == cache.v[0].shape == (2, 3, 5, 2, 8)
    assert (sum(array.nbytes for array in (*cache.k, *cache.v))
            == sum(n * 5 * p.token_bytes(4) for n, p in zip([3, 2, 4], pools, strict=True)))


# --- Batch

@settings(max_examples=150, deadline=None)
@given(window=st.none() | st.integers(1, 9), page_size=st.integers(1, 5), data=st.data())
def test_batch_arrays_against_positions_one_by_one(window, page_size, data):
    """Slots, runs, offsets and positions of ragged batches, against the page lists they come from."""
    cache = cache_of(None, window, n_pages=120, page_size=page_size)
    for allocator in cache.allocators:                          # runs of one, two and three pages are free
        allocator.free([page for page in allocator.allocate(120) if page % 9 not in (1, 4, 8)])
    sequences = [sequence_in(cache, n_tokens=20) for _ in range(3)]
    for _ in range(4):
        work = [(s, data.draw(st.integers(1, 5))) for s in sequences if data.draw(st.booleans())]
        if not work:
            continue
        for sequence, n in work:
            assert cache.reserve(sequence, n) == n
        batch = Batch.build(work, cache)
        assert batch.n_tokens == sum(n for _, n in work)
        new = [(s, position) for s, n in work for position in range(s.n_cached, s.n_cached + n)]
        assert batch.positions.tolist() == [position for _, position in new]
        assert batch.token_ids.tolist() == [s.tokens[position] for s, position in new]
        for p, paged in enumerate(batch.pools):
            def slot(sequence, position, p=p):
                held = sequence.page_lists[p]
                return held.pages[position // page_size - held.first] * page_size + position % page_size
            assert paged.slots.tolist() == [slot(*one) for one in new]
            begin = 0
            for i, ((sequence, n), row) in enumerate(zip(work, paged.rows, strict=True)):
                context = sequence.n_cached + n
                assert row == (begin, begin + n, context)
                live = range(sequence.page_lists[p].first, -(-context // page_size))
                got = [paged.page_table[paged.page_begin[i] + page] for page in live]
                assert got == list(sequence.page_lists[p].pages)
                begin += n
                oldest = sequence.page_lists[p].first * page_size
                for read in range(oldest, context):
                    runs = paged.runs(i, read, context)
                    slots = [first + j for first, size in runs for j in range(size)]
                    assert slots == [slot(sequence, position) for position in range(read, context)]
                    assert all(size for _, size in runs)
                    assert all(a + n_a != b for (a, n_a), (b, _) in pairwise(runs))      # neighbours are joined
        for array in (batch.token_ids, batch.positions, batch.pools[0].slots, batch.pools[0].page_table,
                      batch.pools[0].page_begin, batch.pools[0].cu_seqlens, batch.pools[0].context_lens):
            assert array.dtype == np.int32
        for sequence, n in work:
            sequence.n_cached = min(sequence.n_cached + n, 15)
            cache.trim(sequence)


def test_a_batch_keeps_the_rows_whose_states_are_wanted():
    cache = cache_of(None, n_pages=20, page_size=4)
    middle, end, all_of_it = (sequence_in(cache, n_tokens=10) for _ in range(3))
    all_of_it.next_logit = 0
    work = [(middle, 6), (end, 10), (all_of_it, 3)]
    for sequence, n in work:
        assert cache.reserve(sequence, n) == n
    batch = Batch.build(work, cache)
    assert batch.kept.tolist() == [6 + 9, 16, 17, 18]           # the prompt's last token; every one of the third
    assert batch.kept_rows == [(0, 0, 6), (0, 1, 10), (1, 4, 3)]
    all_of_it.task.hidden = np.zeros((10, 2))
    batch = Batch.build(work, cache)                            # somebody wants hidden states: all rows run to the end
    assert batch.kept is None and batch.kept_rows == batch.pools[0].rows
