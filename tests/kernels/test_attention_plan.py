"""engine/kernels/paged.py: which block does what of a step, in the tiles and splits of attention."""

from itertools import pairwise, product

import numpy as np
import pytest

from engine.kernels import paged as planning
from engine.kernels.paged import geometry, plan, scratch_size, split_keys, work_capacity
from tests.kernels.test_attention import interval, rows_of


@pytest.mark.parametrize("head_dim", range(4, 513, 4))
def test_every_tile_fits_any_gpu(head_dim):
    small, large = geometry(head_dim, True), geometry(head_dim, False)
    assert small.keys == large.keys and small.head_dim == large.head_dim >= head_dim
    assert max(small.smem_bytes, large.smem_bytes) <= 163 * 1024
    assert small.n_threads >= small.keys and large.n_threads >= large.keys


@pytest.mark.parametrize("see", [{}, {"window": 100}, {"chunk": 300}], ids=str)
@pytest.mark.parametrize("n_heads, n_kv_heads", [(1, 1), (8, 2), (40, 8), (64, 4)])
def test_the_plan_gives_each_row_and_split_to_one_block(n_heads, n_kv_heads, see):
    rng = np.random.default_rng(n_heads)
    group, split = n_heads // n_kv_heads, split_keys(n_kv_heads, **see)
    for n_seqs, longest in ((1, 5000), (9, 9000), (300, 300)):
        news = np.where(rng.random(n_seqs) < 0.5, 1, rng.integers(0, 200, n_seqs)).tolist()
        rows = rows_of([(n, n + int(rng.integers(1, longest))) for n in news])
        lists = plan(rows, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=128, **see)
        assert len(lists.decode) <= work_capacity(n_seqs, 9200, n_kv_heads, 128, **see)
        for work, is_decode in zip(lists, (True, False), strict=True):
            shape, parts, used = geometry(128, is_decode), {}, []
            for s, row, *rest in work.tolist():
                parts.setdefault((s, row), []).append(rest)
            assert set(parts) == {(s, row) for s, (a, b, _) in enumerate(rows) if ((b - a) * group <= 16) == is_decode
                                  for row in range(0, (b - a) * group, shape.rows)}
            for (s, row), of_tile in parts.items():
                begin, end, context = rows[s]
                n_rows = min(shape.rows, (end - begin) * group - row)
                first, last = (context - (end - begin) + r // group for r in (row, row + n_rows - 1))
                of_tile.sort(key=lambda rest: rest[2])
                bounds = [a for a, *_ in of_tile] + [of_tile[-1][1]]
                assert bounds == sorted(set(bounds)) and all(b == c for (_, b, *_), (c, *_) in pairwise(of_tile))
                assert bounds[0] == interval(first, see)[0] // shape.keys and bounds[-1] == last // shape.keys + 1
                assert all(bound * shape.keys % split == 0 for bound in bounds[1:-1])
                assert all(b - a <= split // shape.keys for a, b in pairwise(bounds[1:]))
                assert [rest[2:4] for rest in of_tile] == [[i, len(of_tile)] for i in range(len(of_tile))]
                (unit,) = {rest[4] for rest in of_tile}
                used += range(unit, unit + (len(of_tile) > 1) * len(of_tile) * -(-n_rows // 8))
            assert len(used) == len(set(used))                      # no two parts in one place
            assert max(used, default=-1) < scratch_size(n_kv_heads, 128)[1] // n_kv_heads


@pytest.mark.parametrize("see", [{}, {"window": 100}, {"window": 4096}, {"chunk": 300}], ids=str)
@pytest.mark.parametrize("n_heads, n_kv_heads, head_dim", [(1, 1, 64), (16, 4, 256), (40, 8, 128), (64, 4, 512)])
def test_the_plan_of_decode_steps_is_that_of_any_step(n_heads, n_kv_heads, head_dim, see):
    """Steps of a token or a few a sequence take a shorter way; saying that each token sees itself takes the other."""
    rng = np.random.default_rng(n_heads)
    dims = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": head_dim, **see}
    for n_seqs in (0, 1, 2, 7, 64):
        for longest in (70, 3000, 40000):
            contexts = rng.integers(1, longest, n_seqs)
            several = rng.integers(0, 7, n_seqs)
            for later, news in product((0, 1, 40, 64), (several * 0 + 1, several)):     # the same tiles, and the next
                rows = rows_of(list(zip(news.tolist(), (contexts + later + news - 1).tolist(), strict=True)))
                positions = [at for a, b, context in rows for at in range(context - (b - a), context)]
                for got, expected in zip(plan(rows, **dims), plan(rows, **dims, last_visible=np.array(positions, int)),
                                         strict=True):
                    assert got.dtype == np.int32 and got.flags.c_contiguous
                    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("head_dim", [64, 256, 512])
def test_the_plan_of_a_full_tile_and_of_one_row_more(head_dim):
    full, dims = geometry(head_dim, False).rows, {"n_heads": 4, "n_kv_heads": 4, "head_dim": head_dim}
    for n in (full, full + 1):
        got = plan([(0, n, n + 50)], **dims)
        expected = plan([(0, n, n + 50)], **dims, last_visible=np.arange(50, n + 50))
        for items, wanted in zip(got, expected, strict=True):
            np.testing.assert_array_equal(items, wanted)


@pytest.mark.parametrize("n_new", [1, 5])
def test_a_step_whose_tiles_are_those_of_the_last_finds_its_plan(n_new):
    """With drafts too, as long as the last position is in one key tile, here of 64, and the first sees all."""
    plans = [plan([(0, n_new, context)], n_heads=32, n_kv_heads=4, head_dim=128) for context in range(70, 120)]
    assert all(a is b for a, b in pairwise(plans))


@pytest.mark.parametrize("n_kv_heads, head_dim, window", [(4, 128, 512), (2, 32, 16), (1, 64, 100), (8, 16, 256)])
def test_a_long_prompt_under_a_window_stays_within_the_scratch(n_kv_heads, head_dim, window):
    """A tile's keys are its window and its tokens: it may touch a split more than one row does."""
    n = geometry(head_dim, False).rows * (planning.N_BLOCKS // n_kv_heads - 1)       # the most tiles that are split
    work = plan([(0, n, n)], n_heads=n_kv_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, window=window).prefill
    assert (work[:, 5] > 1).any()
    assert (work[:, 6] + work[:, 5] * 16)[work[:, 5] > 1].max() <= scratch_size(n_kv_heads, head_dim)[1] // n_kv_heads


def test_one_long_sequence_fills_the_machine_and_many_do_not_split():
    dims = {"n_heads": 32, "n_kv_heads": 4, "head_dim": 512}
    assert len(plan([(0, 1, 32768)], **dims).decode) == 32          # 128 blocks with 4 KV heads
    many = plan([(i, i + 1, 8000) for i in range(128)], **dims).decode
    assert len(many) == 128
    few = plan([(i, i + 1, 131072) for i in range(16)], **dims).decode      # 2048 splits, units for half of them
    assert (few[:, 3] - few[:, 2]).max() * 32 <= 66 * 1024 and len(few) == 16 * 63
