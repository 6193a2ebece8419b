"""Paged attention against dense attention in float64, bit for bit against itself, and its plan of who does what."""

from dataclasses import dataclass, replace
from itertools import pairwise, product

import numpy as np
import pytest

from engine import cost
from engine.batch import PagedBatch
from engine.errors import ShapeError
from engine.kernels import paged as planning
from engine.kernels.attention import attention
from engine.kernels.paged import PagedInputs, geometry, plan, scratch_size, split_keys
from engine.kv_cache import PageList
from engine.workspace import Scratch
from tests.kernels.closeness import BF16, assert_as_good, bf16, f64
from tests.kernels.declared import assert_least_traffic, least_bytes

HEAD_DIMS = [4, 12, 64, 72, 80, 128, 256, 512]


@pytest.fixture
def lane(lane, monkeypatch):
    """A small machine: blocks have several items each, and who overruns the scratch is soon found out."""
    monkeypatch.setattr(planning, "N_BLOCKS", 24)
    monkeypatch.setattr(planning, "PARTIAL_FLOATS", 2**20)
    return lane


@dataclass
class Case:
    """A ragged batch over a cache in which whatever nobody may read is NaN.

    rows  [(first query, end, context)] of each sequence
    see   {"window": .., "chunk": .., "softcap": .., "last_visible": .., "first_visible": ..}
    """

    q: np.ndarray
    k: np.ndarray                   # [n_pages, page_size, n_kv_heads, head_dim]
    v: np.ndarray
    lists: list
    rows: list
    see: dict

    @classmethod
    def make(cls, sequences, head_dim, n_kv_heads=1, group=1, page_size=16, **see):
        """Random q, K and V for sequences of (n_new, context)."""
        rng = np.random.default_rng([head_dim, n_kv_heads, group, page_size, *(n for pair in sequences for n in pair)])
        rows = rows_of(sequences)
        starts = [min([interval(context - n, see)[0], *see.get("first_visible", ())]) for n, context in sequences]
        counts = [-(-context // page_size) - start // page_size
                  for (_, context), start in zip(sequences, starts, strict=True)]
        pages = rng.permutation(sum(counts) + 3).tolist()           # three that nobody holds
        lists = [PageList([pages.pop() for _ in range(n)], start // page_size)
                 for n, start in zip(counts, starts, strict=True)]
        k, v = np.full((2, sum(counts) + 3, page_size, n_kv_heads, head_dim), np.nan)
        for held, start, (_, context) in zip(lists, starts, sequences, strict=True):
            for at in range(start, context):
                page = held.pages[at // page_size - held.first]
                k[page, at % page_size], v[page, at % page_size] = rng.standard_normal((2, n_kv_heads, head_dim))
        q = 2 * rng.standard_normal((rows[-1][1], n_kv_heads * group * head_dim))
        return cls(bf16(q), bf16(k), bf16(v), lists, rows, see)

    @property
    def dims(self):
        n_kv_heads, head_dim = self.k.shape[2:]
        return {"n_heads": self.q.shape[1] // head_dim, "n_kv_heads": n_kv_heads, "head_dim": head_dim}

    @property
    def scale(self):
        return self.k.shape[3] ** -0.5

    def inputs(self, put):
        """PagedInputs on the lane that put(host array) brings arrays to."""
        page_size = self.k.shape[1]
        limits = {name: np.array(self.see[name], np.int32) for name in ("last_visible", "first_visible")
                  if self.see.get(name) is not None}
        see = {name: self.see.get(name) for name in ("window", "chunk")}
        work = plan(self.rows, **self.dims, **limits, **see)
        batch = PagedBatch(self.lists, None, self.rows, page_size)      # k and v are there: slots are not read
        blocks = [planning.blocks(len(items), self.dims["n_kv_heads"]) for items in work]
        return PagedInputs(
            slots=None, page_table=put(batch.page_table), page_begin=put(batch.page_begin),
            context_lens=put(batch.context_lens), cu_seqlens=put(batch.cu_seqlens),
            **{"last_visible": None, **{name: put(limit) for name, limit in limits.items()}}, page_size=page_size,
            decode_work=put(work.decode), n_decode_work=put(np.array([len(work.decode)], np.int32)),
            n_decode_blocks=blocks[0], prefill_work=put(work.prefill),
            n_prefill_work=put(np.array([len(work.prefill)], np.int32)), n_prefill_blocks=blocks[1])

    def only(self, sequence, first, end):
        """New tokens first..end of one sequence, computed when the cache held no more than they see."""
        begin, stop, context = self.rows[sequence]
        tokens = slice(begin + first, begin + end)
        see = dict(self.see)
        if see.get("last_visible") is not None:
            see |= {name: see[name][tokens] for name in ("last_visible", "first_visible") if name in see}
            context = max(context - (stop - begin) + end, int(see["last_visible"].max()) + 1)
        else:
            context -= stop - begin - end
        n_unseen = context - (self.rows[sequence][2] - (stop - begin) + end)       # of an image block cut in two
        q = np.concatenate([self.q[tokens], np.zeros((n_unseen, self.q.shape[1]), BF16)])
        if n_unseen:
            see |= {name: np.concatenate([see[name], np.arange(context - n_unseen, context)])
                    for name in ("last_visible", "first_visible") if name in see}
        return replace(self, q=q, lists=[self.lists[sequence]], rows=[(0, len(q), context)], see=see)

    def key(self, sequence, positions):
        held, size = self.lists[sequence], self.k.shape[1]
        pages = np.array(held.pages)[positions // size - held.first]
        return self.k[pages, positions % size], self.v[pages, positions % size]


def rows_of(sequences):
    """[(first query, end, context)] of sequences of (n_new, context)."""
    ends = np.cumsum([n for n, _ in sequences]).tolist()
    return [(end - n, end, context) for end, (n, context) in zip(ends, sequences, strict=True)]


def interval(position, see, token=None):
    """The first and last position that a query sees."""
    window, chunk = see.get("window") or 10**9, see.get("chunk") or 10**9
    first = max(0, position - window + 1, position // chunk * chunk)
    if token is not None and see.get("first_visible") is not None:
        first = min(first, int(see["first_visible"][token]))
    return first, position if token is None or see.get("last_visible") is None else int(see["last_visible"][token])


def dense(case, dtype):
    """Attention row by row: in float64, or plainly in bfloat16 (float32 sums, probabilities and result rounded)."""
    n_heads, n_kv_heads, head_dim = case.dims.values()
    out = np.zeros((len(case.q), n_heads, head_dim), dtype)
    for s, (begin, end, context) in enumerate(case.rows):
        for t in range(begin, end):
            first, last = interval(context - (end - t), case.see, t)
            k, v = (x.astype(dtype).transpose(1, 0, 2) for x in case.key(s, np.arange(first, last + 1)))
            q = case.q[t].astype(dtype).reshape(n_kv_heads, -1, head_dim)
            scores = q @ k.transpose(0, 2, 1) * dtype(case.scale)
            if case.see.get("softcap"):
                scores = dtype(case.see["softcap"]) * np.tanh(scores / dtype(case.see["softcap"]))
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            if dtype == np.float32:
                weights = bf16(weights).astype(dtype)
            out[t] = (weights @ v).reshape(n_heads, head_dim)
    return out.reshape(case.q.shape) if dtype == np.float64 else bf16(out.reshape(case.q.shape))


def attend(lane, case, inputs=None):
    """The kernel's answer; its counters are zero afterwards."""
    inputs = inputs or case.inputs(lane.put)
    see = {name: case.see.get(name) for name in ("window", "chunk", "softcap")}
    n_floats, n_counters = scratch_size(case.dims["n_kv_heads"], case.dims["head_dim"])
    scratch = Scratch(lane.empty((n_floats,), np.float32), lane.zeros((n_counters,), np.int32))
    out = lane.empty(case.q.shape, BF16)
    attention(lane.put(case.q), lane.put(case.k), lane.put(case.v), inputs, scale=case.scale, out=out, scratch=scratch,
              **see)
    assert not lane.to_host(scratch.counters).any()
    return lane.to_host(out)


def check(lane, case):
    answers = attend(lane, case), dense(case, np.float64), dense(case, np.float32)
    assert_as_good(*(x.reshape(-1, case.dims["head_dim"]) for x in answers))


def same_bits(a, b):
    return a.shape == b.shape and np.array_equal(a.view(np.uint16), b.view(np.uint16))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_ragged_batch_is_as_good_as_plain_math(lane, head_dim):
    check(lane, Case.make([(1, 1), (1, 70), (9, 9), (5, 300), (1, 150)], head_dim, n_kv_heads=2, group=4))


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8, 16])
def test_groups_of_heads(lane, group):
    check(lane, Case.make([(1, 40), (7, 90)], 64, n_kv_heads=2, group=group))


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_page_sizes_with_leading_pages_gone(lane, page_size):
    check(lane, Case.make([(1, 130), (6, 200), (3, 3)], 72, n_kv_heads=2, page_size=page_size, window=50))


@pytest.mark.parametrize("head_dim", [64, 512])
def test_contexts_around_tiles_and_splits(lane, head_dim):
    check(lane, Case.make([(1, n + d) for n, d in product((32, 64, 256, 512), (-1, 0, 1))], head_dim, group=2))


@pytest.mark.parametrize("n_new", [1, 40])
def test_contexts_around_the_window(lane, n_new):
    check(lane, Case.make([(n_new, n + d) for n, d in product((64, 128, 192), (-1, 0, 1))], 64, group=2, window=64))


@pytest.mark.parametrize("n_new", [1, 40])
def test_contexts_around_chunks(lane, n_new):
    check(lane, Case.make([(n_new, n + d) for n, d in product((100, 200, 300), (-1, 0, 1))], 64, group=2, chunk=100))


@pytest.mark.parametrize("window", [None, 8])
def test_an_image_block_is_seen_whole_whatever_the_window(lane, window):
    last = np.r_[np.arange(60, 70), [99] * 30, np.arange(100, 110)]
    check(lane, Case.make([(50, 110)], 64, group=2, window=window, last_visible=last))


@pytest.mark.parametrize("window", [None, 8, 100])
def test_an_image_block_sees_all_of_itself_beyond_the_window(lane, window):
    last = np.r_[np.arange(60, 70), [99] * 30, np.arange(100, 110)]
    first = np.r_[np.arange(60, 70), [70] * 30, np.arange(100, 110)]
    case = Case.make([(50, 110)], 64, group=2, window=window, last_visible=last, first_visible=first)
    check(lane, case)
    whole = attend(lane, case)
    for at, end in ((0, 10), (10, 40), (40, 50)):
        assert same_bits(attend(lane, case.only(0, at, end))[:end - at], whole[at:end])


@pytest.mark.parametrize("n_new", [4, 100])
def test_tiles_that_begin_in_an_image_block_see_it_from_its_beginning(lane, n_new):
    """Positions 60 to 159 are one image, of which the last are wanted: 8 rows of the decode kernel, or two tiles. The
    window of 8 begins in later key tiles than the image."""
    last, first = np.full(n_new, 159), np.full(n_new, 60)
    check(lane, Case.make([(n_new, 160)], 64, group=2, window=8, last_visible=last, first_visible=first))


def test_softcap(lane):
    check(lane, Case.make([(1, 200), (6, 90)], 64, group=2, softcap=3.0))


def test_large_scores_neither_overflow_nor_vanish(lane):
    case = Case.make([(1, 200), (6, 90)], 64, group=2)
    case.q = bf16(f64(case.q) * 2000)
    check(lane, case)


SAME = [{"head_dim": 64, "group": 2}, {"head_dim": 12, "group": 3, "window": 200},
        {"head_dim": 128, "group": 5, "chunk": 150}, {"head_dim": 256, "group": 4, "window": 40},
        {"head_dim": 512, "group": 8}]


@pytest.mark.parametrize("dims", SAME, ids=str)
def test_same_bits_alone_and_in_a_batch_of_any_order(lane, dims):
    sequences = [(40, 300), (1, 290), (3, 3), (1, 513)]
    case = Case.make(sequences, **dims)
    whole = attend(lane, case)
    for s, (begin, end, _) in enumerate(case.rows):
        assert same_bits(attend(lane, case.only(s, 0, end - begin)), whole[begin:end])
    backwards = replace(case, q=np.concatenate([case.q[a:b] for a, b, _ in case.rows[::-1]]), lists=case.lists[::-1],
                        rows=rows_of(sequences[::-1]))
    assert same_bits(attend(lane, backwards), np.concatenate([whole[a:b] for a, b, _ in case.rows[::-1]]))


@pytest.mark.parametrize("dims", SAME, ids=str)
def test_same_bits_in_chunks_of_any_size(lane, dims):
    case = Case.make([(150, 290)], **dims)
    whole = attend(lane, case)
    for first, end in ((0, 1), (1, 3), (3, 10), (10, 74), (74, 149), (149, 150)):       # 1, 2, 7, 64, 75
        assert same_bits(attend(lane, case.only(0, first, end)), whole[first:end])


def test_same_bits_in_chunks_with_image_blocks(lane):
    last = np.r_[np.arange(60, 70), [99] * 30, np.arange(100, 110)]
    case = Case.make([(50, 110)], 64, group=2, window=8, last_visible=last)
    whole = attend(lane, case)
    for first, end in ((0, 10), (10, 40), (12, 15), (40, 50)):
        assert same_bits(attend(lane, case.only(0, first, end))[:end - first], whole[first:end])


def items(case, shape, n_first):
    """A work list made by hand, last things first: tiles of shape.rows rows in parts, n_first splits in the first part
    and one in each other; None puts all in one part."""
    n_heads, n_kv_heads, _ = case.dims.values()
    group, work, units = n_heads // n_kv_heads, [], 0
    split = split_keys(n_kv_heads, case.see.get("window"), case.see.get("chunk"))
    for s, (begin, end, context) in enumerate(case.rows):
        for row in range(0, (end - begin) * group, shape.rows):
            last_row = min(row + shape.rows, (end - begin) * group) - 1
            first, last = (interval(context - (end - begin) + r // group, case.see) for r in (row, last_row))
            bounds = [first[0], *range((first[0] // split + 1) * split, last[1] + 1, split), last[1] + 1]
            del bounds[1:-1 if n_first is None else min(n_first, len(bounds) - 1)]
            n_parts = len(bounds) - 1
            work += [(s, row, a // shape.keys, -(-b // shape.keys), part, n_parts, units)
                     for part, (a, b) in enumerate(pairwise(bounds))]
            units += n_parts * -(-(last_row - row + 1) // 8)
    return np.array(work[::-1], np.int32)


@pytest.mark.parametrize("dims", SAME, ids=str)
def test_same_bits_split_or_serial_in_small_or_large_tiles(lane, dims):
    case = Case.make([(1, 600), (3, 300), (20, 280)], **dims)
    whole = attend(lane, case)
    n_kv_heads = case.dims["n_kv_heads"]
    for is_decode, n_first in product((True, False), (None, 1, 2)):
        work = items(case, geometry(dims["head_dim"], is_decode), n_first)
        given = {"work": lane.put(work), "blocks": planning.blocks(len(work), n_kv_heads), "none": lane.put(work[:0])}
        names = ("decode", "prefill") if is_decode else ("prefill", "decode")
        inputs = replace(case.inputs(lane.put), **{
            f"{names[0]}_work": given["work"], f"n_{names[0]}_work": lane.put(np.array([len(work)], np.int32)),
            f"n_{names[0]}_blocks": given["blocks"], f"{names[1]}_work": given["none"], f"n_{names[1]}_blocks": 0})
        assert same_bits(attend(lane, case, inputs), whole), (is_decode, n_first)


def test_a_grid_of_any_size_does_a_list_of_any_length(lane):
    """A captured launch: room for more work than there is, more and fewer blocks than items, and no work at all."""
    case = Case.make([(1, 600), (1, 30), (1, 300)], 64, group=2)
    whole = attend(lane, case)
    inputs = case.inputs(lane.put)
    work = np.concatenate([lane.to_host(inputs.decode_work), np.full((50, planning.ITEM), 2**30, np.int32)])
    for n_blocks in (1, 2, 40):
        padded = replace(inputs, decode_work=lane.put(work), n_decode_blocks=n_blocks)
        assert same_bits(attend(lane, case, padded), whole)
    nothing = attend(lane, case, replace(inputs, n_decode_work=lane.zeros((1,), np.int32)))
    assert (nothing.view(np.uint16) == 0xFFFF).all()                # as lane.empty() left it


def test_no_new_tokens_launch_nothing(lane):
    case = Case.make([(1, 5)], 64)
    empty = replace(case, q=case.q[:0], lists=[], rows=[])
    assert attend(lane, empty).shape == (0, 64)
    assert not len(plan([], **case.dims).decode) and not len(plan([(0, 0, 7)], **case.dims).prefill)


@pytest.mark.parametrize("message, change", {
    r"q is \[1, 64\] bfloat16, expected|q is 64 wide": lambda q, k, v: (q[:, :64].copy(), k, v),
    "q is .* float32, expected .* bfloat16": lambda q, k, v: (q.astype(np.float32), k, v),
    "q is 2176 wide, expected 1 to 16 times the 128 of 2": lambda q, k, v: (np.tile(q, (1, 17)), k, v),
    r"v_pages is \[.* 60\]": lambda q, k, v: (q, k, v[..., :60].copy()),
    "v_pages .* has strides": lambda q, k, v: (q, k, np.asfortranarray(v)),
    "planned for pages of 16 positions, k_pages has 8": lambda q, k, v: (q, k[:, :8].copy(), v[:, :8].copy()),
    "head_dim is 62, expected a multiple of 4": lambda q, k, v: (q[:, :124].copy(), k[..., :62].copy(),
                                                                 v[..., :62].copy()),
}.items())
def test_what_does_not_fit_is_refused(message, change):
    case = Case.make([(1, 5)], 64, n_kv_heads=2)
    q, k, v = change(case.q, case.k, case.v)
    sizes = scratch_size(2, 64)
    with pytest.raises(ShapeError, match=message):
        attention(q, k, v, case.inputs(np.array), scale=1.0, out=np.empty(q.shape, BF16),
                  scratch=Scratch(np.empty(sizes[0], np.float32), np.zeros(sizes[1], np.int32)))


def test_a_small_scratch_is_refused():
    case = Case.make([(1, 5)], 64, n_kv_heads=2)
    for missing in ((1, 0), (0, 1)):
        n_floats, n_counters = np.subtract(scratch_size(2, 64), missing)
        with pytest.raises(ShapeError, match=r"expected at least .*scratch_size"):
            attention(case.q, case.k, case.v, case.inputs(np.array), scale=1.0, out=np.empty_like(case.q),
                      scratch=Scratch(np.empty(n_floats, np.float32), np.zeros(n_counters, np.int32)))


@pytest.mark.parametrize("head_dim, n_kv_heads, group, window",
                         [(128, 2, 2, None), (256, 2, 2, 512), (512, 2, 8, None)])
def test_decode_reads_keys_and_values_once(lane, head_dim, n_kv_heads, group, window):
    case = Case.make([(1, 600), (1, 1100)], head_dim, n_kv_heads, group, window=window)
    inputs = case.inputs(lane.put)
    work = lane.to_host(inputs.decode_work)
    out = attend(lane, case, inputs)
    traffic = lane.traffic()
    seen = [interval(context - 1, case.see) for _, _, context in case.rows]
    n_tables = sum(last // 16 - first // 16 + 1 for first, last in seen)
    n_counts = 2 * 2 * n_kv_heads                                   # of 2 tiles, read and written
    assert (work[:, 5] > 1).all()                                   # the dearest way: all in parts
    assert_least_traffic(traffic, least_bytes(
        "attention.cu", "attention", n_keys=sum(last - first + 1 for first, last in seen), n_kv_heads=n_kv_heads,
        head_dim=head_dim, n_tokens=2, n_heads=n_kv_heads * group, n_part_rows=len(work) * n_kv_heads * group,
        n_index_bytes=4 * (work.size + 1 + n_tables + 2 + 2 + 3 + n_counts)),
        cost.attention(case.q, case.k, case.v, inputs, scale=case.scale, out=out, **case.see))


@pytest.mark.parametrize("head_dim, sequences, see", [
    (64, [(40, 140)], {}), (128, [(40, 140), (33, 33)], {"chunk": 64}), (256, [(70, 300), (20, 90)], {"window": 50}),
    (256, [(40, 40)], {"last_visible": [*range(8), *32 * [39]], "first_visible": [*range(8), *32 * [8]],
                       "window": 12})])
def test_prefill_touches_what_its_cost_says(lane, head_dim, sequences, see):
    """Each byte once: tiles of queries read K and V anew, from a cache. Two numbers of its lists may stay unread."""
    case = Case.make(sequences, head_dim, 2, 2, **see)
    inputs = case.inputs(lane.put)
    out = attend(lane, case, inputs)
    see = {name: case.see.get(name) for name in ("window", "chunk")}
    got = cost.attention(case.q, case.k, case.v, inputs, scale=case.scale, out=out, **see)
    assert 0 <= got.traffic_bytes - lane.traffic().distinct_bytes <= 8


@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])       # rows of 80 are copied with some: 10 chunks to 8 banks
def test_prefill_meets_no_bank_conflict(lane, head_dim):
    attend(lane, Case.make([(40, 140)], head_dim, group=2))
    assert lane.traffic().bank_conflicts == 0
