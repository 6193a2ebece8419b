"""What a run of a vision encoder reads besides weights: pixels, places and pages, one copy to the lane."""

from dataclasses import dataclass

import numpy as np

from engine.batch import PagedBatch
from engine.kernels.paged import ITEM, PagedInputs, blocks, plan, work_capacity
from engine.kv_cache import PageList
from engine.step_inputs import ALIGNED, Packed
from engine.vision.patches import cut, grid, positions, windows
from engine.vision.runs import PAGE

MOST_FIELDS = 24            # of a run, each of which may leave ALIGNED bytes unused


@dataclass
class VisionInputs:
    """One run, flat over the patches of its pictures; arrays on the lane.

    patches   [n_patches, patch_width] in the lane's dtype, as the tower wants their values
    positions [n_patches, 2] int32: column and row in the picture
    places    [n_patches, 1 or 2] int32: rows of the tower's table of positions
    groups    [n_soft, pool_side²] int32: the patches of each soft token
    source, rows  [n_soft] int32: soft token source[i] goes to row rows[i] of where they are wanted
    paged     PagedBatch or PagedInputs of the patches as queries; None where the tower does not attend
    """

    patches: object
    positions: object
    places: object
    groups: object
    source: object
    rows: object
    paged: object


class VisionStager:
    """Brings runs of pictures to the lane of one encoder, through one buffer of its own.

    kind         the class of the tower, which says of its input `levels`, `channels_first`, `attends` and `places`
    max_patches  of a run, where each picture counts in whole pages
    """

    def __init__(self, kind, tower, max_patches, lane):
        self._kind, self._tower, self._lane = kind, tower, lane
        self._levels = kind.levels.astype(lane.dtype)
        self._buffer = None
        if lane.stages:
            self._buffer = lane.step_buffer(self.n_bytes(kind, tower, max_patches, lane.dtype.itemsize))

    @staticmethod
    def n_bytes(kind, tower, max_patches, itemsize):
        """Bytes of the buffer: the most that a run needs."""
        n_soft, n_pages = max_patches // tower.pool_side**2, max_patches // PAGE
        n_ints = 5 * max_patches + 2 * n_soft
        if kind.attends:                                    # a picture has no more tiles of queries than pages
            n_items = work_capacity(n_pages, tower.most_patches, tower.n_heads, tower.head_dim)
            n_ints += 2 * max_patches + 4 * n_pages + 3 + 2 * ITEM * n_items
        return itemsize * max_patches * tower.patch_width + 4 * n_ints + ALIGNED * MOST_FIELDS

    def __call__(self, pictures, rows):
        """The VisionInputs of a run, good until the next one. rows: an int32 array of where each picture's soft tokens
        go."""
        arrays, paged = self._arrays(pictures, rows)
        if not self._lane.stages:
            return VisionInputs(**arrays, paged=paged)
        of_pages, n_blocks = ({}, {}) if paged is None else self._work(paged)
        everything = arrays | of_pages
        packed = Packed(self._buffer, {name: (array.dtype, array.shape) for name, array in everything.items()})
        packed.send(everything)
        arrays, of_pages = ({name: packed.device[name] for name in part} for part in (arrays, of_pages))
        if paged is not None:
            paged = PagedInputs(page_size=PAGE, **of_pages, **n_blocks)
        return VisionInputs(**arrays, paged=paged)

    def _arrays(self, pictures, rows):
        """({name: host array} of a VisionInputs, its PagedBatch)."""
        tower, kind, side = self._tower, self._kind, self._tower.patch_side
        grids = [grid(picture.pixels, side) for picture in pictures]
        begins = np.cumsum([0, *(n_rows * n_columns for n_rows, n_columns in grids)]).tolist()
        at = np.concatenate([positions(*shape) for shape in grids])
        groups = np.concatenate([begin + windows(*shape, tower.pool_side)
                                 for begin, shape in zip(begins, grids, strict=False)])
        arrays = {"positions": at, "places": kind.places(tower, at), "groups": groups,
                  "source": np.arange(len(groups), dtype=np.int32), "rows": np.concatenate(rows).astype(np.int32),
                  "patches": self._levels[np.concatenate([cut(picture.pixels, side, kind.channels_first)
                                                          for picture in pictures])]}
        assert len(arrays["rows"]) == len(groups), "as many rows as soft tokens"
        return arrays, pages(begins) if kind.attends else None

    def _work(self, paged):
        """({name: host array}, {name: number}) of a PagedInputs."""
        n_heads = self._tower.n_heads
        work = plan(paged.rows, n_heads=n_heads, n_kv_heads=n_heads, head_dim=self._tower.head_dim,
                    last_visible=paged.last_visible)
        arrays = {name: getattr(paged, name) for name in ("slots", "page_table", "page_begin", "context_lens",
                                                          "cu_seqlens", "last_visible")}
        n_blocks = {}
        for name, items in work._asdict().items():
            arrays |= {f"{name}_work": items, f"n_{name}_work": np.array([len(items)], np.int32)}
            n_blocks[f"n_{name}_blocks"] = blocks(len(items), n_heads)
        return arrays, n_blocks


def pages(begins):
    """The PagedBatch of pictures whose patches are begins[i]..begins[i + 1]: each sees all of itself, on pages of its
    own, one behind the other."""
    sizes = np.diff(begins)
    n_pages = -(-sizes // PAGE)
    first = np.cumsum(n_pages) - n_pages
    within = np.arange(begins[-1]) - np.repeat(begins[:-1], sizes)
    return PagedBatch(lists=[PageList(list(range(begin, begin + n)), 0)
                             for begin, n in zip(first.tolist(), n_pages.tolist(), strict=True)],
                      slots=(np.repeat(first * PAGE, sizes) + within).astype(np.int32),
                      rows=[(begin, begin + n, n) for begin, n in zip(begins, sizes.tolist(), strict=False)],
                      page_size=PAGE, last_visible=np.repeat(sizes - 1, sizes).astype(np.int32))
