"""The paged KV cache: one pool per kind of attention layer, pages handed to sequences and taken back.

A pool holds K and V of all layers that see the same positions and share a head geometry; a page is `page_size`
consecutive positions of one sequence in every one of those layers. Local pools take pages back as soon as the window
has passed them, or the chunk they lie in has ended. Layers that read another's K and V own no pages.
"""

from array import array
from bisect import bisect_left
from dataclasses import dataclass
from math import gcd

from engine.models.spec import attention_kind


@dataclass(frozen=True)
class PoolSpec:
    """What one pool stores. Without window and chunk it is global.

    layers       numbers of the model's layers whose K and V it holds, in order
    shared       (layer, owner) of layers that read the K and V of one of these
    sees_blocks  a soft token of a picture also sees the later ones of its picture; sees_whole_blocks: all of them,
                 however long ago the window passed
    """

    window: int | None
    n_kv_heads: int
    head_dim: int
    layers: tuple
    chunk: int | None = None
    shared: tuple = ()
    sees_blocks: bool = False
    sees_whole_blocks: bool = False

    @property
    def kind(self):
        return attention_kind(self.window, self.chunk)

    @property
    def is_local(self):
        """Whether a sequence gives pages back while it grows."""
        return self.window is not None or self.chunk is not None

    def token_bytes(self, itemsize):
        """Bytes of K and V of one position in all of the pool's layers."""
        return 2 * len(self.layers) * self.n_kv_heads * self.head_dim * itemsize

    def pages_needed(self, n_tokens, page_size, longest_run=1):
        """Most pages that a sequence of `n_tokens` holds at once, computed one token at a time but for runs of up to
        `longest_run` that are not split."""
        n_pages = -(-n_tokens // page_size)
        if self.window is not None:
            return min(n_pages, self.live_pages(longest_run, page_size))
        if self.chunk is None or n_tokens <= self.chunk:
            return n_pages
        # A chunk is held until the first position of the next is there. Where chunks begin in a page repeats.
        starts = range(0, n_tokens, self.chunk)[:page_size // gcd(self.chunk, page_size)]
        return max(min(start + self.chunk, n_tokens - 1) // page_size - start // page_size + 1 for start in starts)

    def live_pages(self, n_new, page_size):
        """Most pages of a local pool that hold the positions kept, `window + 1` or a chunk, plus `n_new` being
        computed."""
        if self.window is not None:
            return (self.window + 1 + n_new + page_size - 2) // page_size + 1
        latest_start = page_size - gcd(self.chunk, page_size)       # in its page
        return (latest_start + self.chunk + n_new - 1) // page_size + 1

    def first_live(self, n_cached):
        """The oldest position still needed, P being the last committed one.

        A page is freed only when it lies wholly below P - window, because rejected drafts move the window back (and a
        draft model reads P - window too), or wholly below the chunk of P, for the same reason: not yet below the next.
        """
        last = max(0, n_cached - 1)
        if self.window is not None:
            return max(0, last - self.window)
        return 0 if self.chunk is None else last - last % self.chunk


def pool_specs(spec):
    """The pools a ModelSpec needs, in the order of the first layer that uses each."""
    layers, shared = {}, {}
    for i, layer in enumerate(spec.layers):
        attention = layer.attention
        key = (attention.window, attention.chunk, attention.sees_blocks, attention.sees_whole_blocks,
               attention.n_kv_heads, attention.head_dim)
        if layer.kv_from is None:
            layers.setdefault(key, []).append(i)
        else:
            shared.setdefault(key, []).append((i, layer.kv_from))
    return tuple(PoolSpec(window, n_kv_heads, head_dim, tuple(ids), chunk, tuple(shared.get(key, ())), *sees)
                 for key, ids in layers.items() for window, chunk, *sees, n_kv_heads, head_dim in (key,))


class PageAllocator:
    """Which pages are free, as sorted extents [start, end), so that a sequence's pages lie side by side when they can.

    A kernel does not care, but a matrix product on the CPU reads a run of neighbouring pages as one block. So a
    sequence that grows takes the page after its last, and a new one starts in the middle of the largest free extent.
    """

    def __init__(self, n_pages):
        self.n_pages = self.n_free = n_pages
        self._extents = [(0, n_pages)] if n_pages else []

    def allocate(self, n, after=None):
        """n pages (the caller has checked n_free), the first next to page `after` when that is free."""
        assert n <= self.n_free
        pages = []
        while len(pages) < n:
            start = self._find(pages[-1] if pages else after, n - len(pages))
            i = bisect_left(self._extents, (start + 1,)) - 1
            lo, hi = self._extents[i]
            end = min(hi, start + n - len(pages))
            self._extents[i:i + 1] = [extent for extent in ((lo, start), (end, hi)) if extent[0] < extent[1]]
            pages.extend(range(start, end))
        self.n_free -= n
        return pages

    def _find(self, after, n):
        """The page to go on from: the one after `after`, or in the largest extent with n behind it where they fit."""
        i = bisect_left(self._extents, (after + 1,)) if after is not None else len(self._extents)
        if i < len(self._extents) and self._extents[i][0] == after + 1:
            return after + 1
        lo, hi = max(self._extents, key=lambda extent: extent[1] - extent[0])
        return lo if hi - lo == self.n_pages else max(lo, min((lo + hi) // 2, hi - n))

    def free(self, pages):
        for page in pages:
            i = bisect_left(self._extents, (page,))
            lo, hi = page, page + 1
            assert i == len(self._extents) or hi <= self._extents[i][0], f"page {page} freed twice"
            if i < len(self._extents) and self._extents[i][0] == hi:
                hi = self._extents.pop(i)[1]
            if i and self._extents[i - 1][1] >= lo:
                assert self._extents[i - 1][1] == lo, f"page {page} freed twice"
                i -= 1
                lo = self._extents.pop(i)[0]
            self._extents.insert(i, (lo, hi))
        self.n_free += len(pages)


@dataclass
class PageList:
    """The pages of one sequence in one pool: `pages[j]` holds positions from (first + j) * page_size on. An array of
    int32, as every step copies it."""

    pages: array
    first: int = 0

    def __post_init__(self):
        self.pages = array("i", self.pages)         # a copy

    def copy(self):
        return PageList(self.pages, self.first)


class KVCache:
    """The pools of one engine and the pages each sequence holds in them.

    `k[p][j]` and `v[p][j]` are [n_pages, page_size, n_kv_heads, head_dim] for pool p and the j-th
    of its layers; `layer_slot[i]` is the (p, j) of model layer i, or of the layer whose K and V it reads. Memory is not
    touched until a page is written.
    """

    def __init__(self, specs, n_pages, page_size, lane):
        self.specs, self.page_size = specs, page_size
        self.allocators = [PageAllocator(n) for n in n_pages]
        shapes = [(len(s.layers), n, page_size, s.n_kv_heads, s.head_dim) for s, n in zip(specs, n_pages, strict=True)]
        self.k = [lane.empty(shape) for shape in shapes]
        self.v = [lane.empty(shape) for shape in shapes]
        self.layer_slot = {i: (p, j) for p, spec in enumerate(specs) for j, i in enumerate(spec.layers)}
        self.layer_slot |= {i: self.layer_slot[owner] for spec in specs for i, owner in spec.shared}

    def new_page_lists(self):
        """Empty holdings for a new sequence, one PageList a pool."""
        return [PageList([]) for _ in self.specs]

    def room(self, sequence):
        """How many more positions of `sequence` find pages, its own and free ones."""
        return min((held.first + len(held.pages) + allocator.n_free) * self.page_size - sequence.n_cached
                   for held, allocator in zip(sequence.page_lists, self.allocators, strict=True))

    def reserve(self, sequence, n_new):
        """Gives `sequence` pages for up to `n_new` more positions; returns for how many there was room, maybe 0."""
        n_new = min(n_new, self.room(sequence))
        if n_new <= 0:
            return 0
        n_logical = -(-(sequence.n_cached + n_new) // self.page_size)
        for held, allocator in zip(sequence.page_lists, self.allocators, strict=True):
            missing = n_logical - held.first - len(held.pages)
            if missing > 0:
                held.pages.extend(allocator.allocate(missing, after=held.pages[-1] if held.pages else None))
        return n_new

    def could_hold(self, n_tokens, longest_run=1):
        """Whether a sequence of n_tokens, nothing of it cached yet, would find its pages free now; runs of up to
        `longest_run` are not split."""
        return all(allocator.n_free >= spec.pages_needed(n_tokens, self.page_size, longest_run)
                   for spec, allocator in zip(self.specs, self.allocators, strict=True))

    def trim(self, sequence):
        """Takes back the pages that lie wholly before the sequence's window or chunk, and those wholly behind what is
        cached: rejected drafts lie there."""
        n_logical = -(-sequence.n_cached // self.page_size)
        for spec, held, allocator in zip(self.specs, sequence.page_lists, self.allocators, strict=True):
            if (end := max(0, n_logical - held.first)) < len(held.pages):
                allocator.free(held.pages[end:])
                del held.pages[end:]
            n_stale = min(spec.first_live(sequence.n_cached) // self.page_size - held.first, len(held.pages))
            if n_stale > 0:
                allocator.free(held.pages[:n_stale])
                del held.pages[:n_stale]
                held.first += n_stale

    def release(self, sequence):
        """Takes back everything the sequence holds."""
        for held, allocator in zip(sequence.page_lists, self.allocators, strict=True):
            allocator.free(held.pages)
            held.pages, held.first = array("i"), 0

    def clear(self):
        """Makes every page free, whoever held it."""
        self.allocators = [PageAllocator(allocator.n_pages) for allocator in self.allocators]
