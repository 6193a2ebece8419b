"""Which block of attention does what: the work lists of a step, planned on the host, and what else it reads of a pool.

A sequence's rows are its (new token, query head of the group) pairs of one KV head. Up to 16 rows are one tile of the
decode kernel, more are tiles of the prefill kernel. A tile is done by one block, or in parts: a block for each stretch
of `split_keys` keys, the first for several if need be. All ways give the same bits; the plan only fills the machine.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

TILE_ROWS = 16              # rows of the smallest tile, one tensor core instruction
UNIT_ROWS = 8               # rows of one unit of partial sums
N_BLOCKS = 264              # blocks of a launch at most: two for each of the 132 multiprocessors of an H100 or H200
PARTIAL_FLOATS = 2**24      # 64 MiB of partial sums at most: 16 sequences of 64k at head_dim 512 with 4 KV heads
NO_LIMIT = 2**31 - 1        # as a window or chunk: every earlier position
ITEM = 7                    # (sequence, first row, first key tile, tile behind the last, part, n_parts, first unit)
NO_ITEMS = np.empty((0, ITEM), np.int32)


@dataclass(frozen=True)
class Geometry:
    """One build of cuda/attention.cu: what its constants mean is said there."""

    head_dim: int
    keys: int
    warps_m: int
    warps_n: int
    slots: int
    min_blocks: int

    @property
    def rows(self):
        return TILE_ROWS * self.warps_m

    @property
    def n_threads(self):
        return 32 * self.warps_m * self.warps_n

    @property
    def smem_bytes(self):
        """Dynamic shared memory: q, the ring of K and V tiles, P and its row maxima, key slots, rows, a counter."""
        shared_p = self.rows * (2 * self.keys + 16 + 4 * self.warps_n) if self.warps_n > 1 else 0
        tiles = (self.rows + self.slots * self.keys) * (2 * self.head_dim + 16)
        return tiles + shared_p + 8 * self.keys + 12 * self.rows + 4

    @property
    def constants(self):
        return {"HEAD_DIM": self.head_dim, "KEYS": self.keys, "WARPS_M": self.warps_m, "WARPS_N": self.warps_n,
                "SLOTS": self.slots, "MIN_BLOCKS": self.min_blocks}


@lru_cache
def geometry(head_dim, is_decode):
    """The build for any head_dim up to 512. Decode keeps K and V in flight (3 of 4 tiles of a ring), prefill feeds the
    tensor cores from 128 rows, or 64 where the accumulators of more would not fit. Everything fits 163 KB."""
    width = next(n for n in (16, 32, 64, 80, 128, 256, 512) if n >= head_dim)
    keys = 32 if width == 512 else 64                               # never depends on is_decode: it is in the bits
    if is_decode:
        return Geometry(width, keys, 1, 4, slots=3 if width == 256 else 4, min_blocks=1 if width == 512 else 2)
    warps_m, warps_n, slots = {256: (4, 4, 3), 512: (4, 2, 2)}.get(width, (8, 1, 4))
    return Geometry(width, keys, warps_m, warps_n, slots, min_blocks=1)


def split_keys(n_kv_heads, window=None, chunk=None):
    """Keys of a split: few where a short window or few heads make few blocks; merging is cheap beside reading them."""
    if min(window or NO_LIMIT, chunk or NO_LIMIT) <= 2048:
        return 128 if n_kv_heads < 4 else 256
    return min(256 * n_kv_heads, 1024)


def max_units(n_kv_heads, head_dim):
    """Units of partial sums, [n_kv_heads, 8 rows], that a launch may use."""
    width = geometry(head_dim, True).head_dim
    return max(1, PARTIAL_FLOATS // (n_kv_heads * UNIT_ROWS * (width + 2)))


def scratch_size(n_kv_heads, head_dim):
    """(floats, counters) that attention needs of its scratch, whatever the step: plan() stays within max_units."""
    n_units = max_units(n_kv_heads, head_dim)
    shapes = geometry(head_dim, True), geometry(head_dim, False)
    n_running = N_BLOCKS * max(shape.rows * shape.head_dim + 4 * shape.n_threads for shape in shapes)
    return n_running + n_units * n_kv_heads * UNIT_ROWS * (shapes[0].head_dim + 2), n_units * n_kv_heads


class WorkPlan(NamedTuple):
    """Work lists of a step, int32 [n, ITEM] each."""

    decode: np.ndarray
    prefill: np.ndarray


def plan(rows, *, n_heads, n_kv_heads, head_dim, window=None, chunk=None, last_visible=None, first_visible=None):
    """The WorkPlan of a step.

    rows          [(first query, end, context)] of each sequence; its last query has position context - 1
    window, chunk as attention takes them
    last_visible, first_visible    host int32 [n_tokens] or None, never descending within a sequence
    """
    group, split = n_heads // n_kv_heads, split_keys(n_kv_heads, window, chunk)
    n_units = max_units(n_kv_heads, head_dim)
    most = geometry(head_dim, False).rows
    if last_visible is None and all((end - begin) * group <= most for begin, end, _ in rows):
        keys, before, limit = geometry(head_dim, True).keys, (window or NO_LIMIT) - 1, chunk or NO_LIMIT
        tiles = tuple([((n := end - begin) * group, ((first := context - n) - min(first % limit, before)) // keys,
                        (context - 1) // keys + 1) for begin, end, context in rows])
        return _plan_of_tiles(tiles, n_kv_heads, split // keys, n_units, N_BLOCKS)
    begin, end, context = np.array(rows, np.int64).reshape(-1, 3).T
    n_rows, first_position = (end - begin) * group, context - (end - begin)
    is_decode = n_rows <= TILE_ROWS

    def items(which, shape):
        if not which.any():                                 # of most steps, one of the two lists is empty
            return NO_ITEMS
        n_tiles = np.where(which, -(-n_rows // shape.rows), 0)
        sequence = np.repeat(np.arange(len(n_rows)), n_tiles)
        first_row = (np.arange(len(sequence)) - np.repeat(np.cumsum(n_tiles) - n_tiles, n_tiles)) * shape.rows
        n_tile_rows = np.minimum(shape.rows, n_rows[sequence] - first_row)
        first_token, last_token = first_row // group, (first_row + n_tile_rows - 1) // group
        position = first_position[sequence] + first_token
        in_chunk = position % (chunk or NO_LIMIT)
        first_key = position - np.minimum(in_chunk, (window or NO_LIMIT) - 1)
        if first_visible is not None:
            first_key = np.minimum(np.asarray(first_visible)[begin[sequence] + first_token], first_key)
        last_key = first_position[sequence] + last_token
        if last_visible is not None:
            last_key = np.minimum(np.asarray(last_visible)[begin[sequence] + last_token], context[sequence] - 1)
        return _items(sequence, first_row, -(-n_tile_rows // UNIT_ROWS), first_key // shape.keys,
                      last_key // shape.keys + 1, n_kv_heads, split // shape.keys, n_units, N_BLOCKS)

    return WorkPlan(items(is_decode, geometry(head_dim, True)), items(~is_decode, geometry(head_dim, False)))


def plan_drafts(ranges, *, n_heads, n_kv_heads, head_dim, window=None):
    """The decode list for one query of each sequence whose position only the device knows: int32 [n, ITEM].

    ranges  [(least, greatest)] position that the query of each sequence may have; its context_lens is one more
    window  as attention takes it
    Key tiles that turn out not to be seen change no bit, and none of their keys is looked up: ranges do not show.
    """
    group, keys = n_heads // n_kv_heads, geometry(head_dim, True).keys
    assert group <= TILE_ROWS, f"{group} query heads of a KV head are more than a row tile"
    tiles = tuple([(group, max(0, least - (window or NO_LIMIT) + 1) // keys, greatest // keys + 1)
                   for least, greatest in ranges])
    return _plan_of_tiles(tiles, n_kv_heads, split_keys(n_kv_heads, window) // keys, max_units(n_kv_heads, head_dim),
                          N_BLOCKS).decode


@lru_cache(maxsize=16)
def _plan_of_tiles(tiles, *limits):
    """The WorkPlan of sequences with a row tile each. tiles: (n rows, begin, end) in key tiles, which stay the same for
    as many tokens as a tile has keys: most steps of few sequences, with drafts or without, find their plan here."""
    n_rows, begin, end = np.array(tiles, np.int64).reshape(-1, 3).T

    def items(which):
        sequence = np.flatnonzero(which)
        return _items(sequence, np.zeros_like(sequence), -(-n_rows[which] // UNIT_ROWS), begin[which], end[which],
                      *limits) if len(sequence) else NO_ITEMS
    return WorkPlan(items((n_rows > 0) & (n_rows <= TILE_ROWS)), items(n_rows > TILE_ROWS))


def _items(sequence, first_row, units_of_part, begin, end, n_kv_heads, split, n_units, n_blocks):
    """Work items of tiles of rows, longest first; begin, end, split in key tiles. A tile that would keep one block for
    longer than its share of the launch is done in parts: one for each split, or, where units are short, for so many of
    the last ones as there are units."""
    n_keys, first_split = end - begin, begin // split
    n_splits = (end - 1) // split - first_split + 1
    is_long = n_keys * n_blocks > n_keys.sum() * n_kv_heads
    wanted = (units_of_part * n_splits)[is_long].sum()
    n_parts = np.where(is_long, np.maximum(1, n_splits * n_units // max(n_units, wanted)), 1)
    units = np.where(n_parts > 1, n_parts * units_of_part, 0)

    of_tile = np.array([sequence, first_row, begin, end, first_split + n_splits - n_parts + 1, n_parts,
                        units.cumsum() - units, n_parts.cumsum() - n_parts])
    sequence, first_row, begin, end, end_split, n_parts, first_unit, first_item = of_tile.repeat(n_parts, axis=1)
    part = np.arange(len(sequence)) - first_item
    end_split += part
    begin = np.where(part == 0, begin, (end_split - 1) * split)
    end = np.minimum(end, end_split * split)
    items = np.array([sequence, first_row, begin, end, part, n_parts, first_unit], np.int32)
    return np.ascontiguousarray(items[:, np.argsort(begin - end, kind="stable")].T)


def work_capacity(n_tiles, max_keys, n_kv_heads, head_dim, window=None, chunk=None, ahead=0):
    """Items that a list of a step with up to n_tiles row tiles can have, which see up to max_keys positions each; with
    last_visible and first_visible it sees `ahead` more than its window shows."""
    tile = geometry(head_dim, False).rows                           # tokens of a tile at most: it sees that much more
    n_keys = min(max_keys, min(window or NO_LIMIT, chunk or NO_LIMIT) + tile + ahead)
    n_splits = 2 + n_keys // split_keys(n_kv_heads, window, chunk)
    return n_tiles + min(max_units(n_kv_heads, head_dim), n_tiles * n_splits)


@dataclass
class PagedInputs:
    """How attention finds the keys of a ragged batch in one pool; arrays on the lane, all int32.

    slots           [n_tokens] page * page_size + offset, where each new token's k and v go; -1 for nowhere
    page_table      [n_entries]; position p of sequence s is in page page_table[page_begin[s] + p // page_size]
    page_begin      [n_seqs], below zero where leading pages are gone
    context_lens    [n_seqs] positions in the cache once the new tokens are written
    cu_seqlens      [n_seqs + 1] queries of sequence s are cu_seqlens[s]..[s + 1], the last at context_lens[s] - 1
    last_visible    [n_tokens] or None: the last position that each query sees, not before itself
    first_visible   [n_tokens] or None: the first, where the window would begin behind it
    decode_work, prefill_work      [at least n, ITEM], items of a WorkPlan
    n_decode_work, n_prefill_work  [1], how many of them count
    n_decode_blocks, n_prefill_blocks  blocks to launch, known to the host; 0 launches nothing
    """

    slots: object
    page_table: object
    page_begin: object
    context_lens: object
    cu_seqlens: object
    last_visible: object
    page_size: int
    decode_work: object
    n_decode_work: object
    n_decode_blocks: int
    prefill_work: object
    n_prefill_work: object
    n_prefill_blocks: int
    first_visible: object = None


def blocks(n_work, n_kv_heads):
    """Blocks to launch for n_work items of each KV head: enough, or as many as the machine holds."""
    return min(n_work * n_kv_heads, N_BLOCKS)
