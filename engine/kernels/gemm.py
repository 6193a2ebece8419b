"""Dense matrix products: bfloat16 in, float32 sums, added in one order for every number of tokens (cuda/gemm.cu)."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from engine.errors import ShapeError
from engine.kernels.match import match
from engine.kernels.source import BF16, Kernel
from engine.models.vision_spec import BlockEmbedderSpec

GEMM = Kernel("gemm.cu", "gemm")
GATED_ACTIVATION = Kernel("gemm.cu", "gated_activation")
ACTIVATIONS = {"gelu_tanh": 1, "silu": 2}           # as gemm.cu counts them
# What the tiles are made for, an H200: 132 multiprocessors with two blocks each. Other GPUs run the same bits.
N_RESIDENT = 2 * 132
SPLIT_ROWS = 64                                     # weight rows that one block of a split is thought to have
MIN_SPLIT = 1024                                    # k of a split: twice what the deepest ring holds in flight
MOST_PARTIALS = 2**23                               # floats that splits of more than 64 tokens may leave: 32 MiB


class Tile(NamedTuple):
    """How a block is laid out; the constants of gemm.cu.

    rows, tokens            of weight and of x
    warp_rows, warp_tokens  the share of one warp
    depth, stages           k of one stage of the ring, and how many stages it has
    """

    rows: int
    tokens: int
    warp_rows: int
    warp_tokens: int
    depth: int
    stages: int

    @property
    def n_threads(self):
        return 32 * (self.rows // self.warp_rows) * (self.tokens // self.warp_tokens)

    @property
    def smem_bytes(self):
        return max(2 * self.stages * (self.rows + self.tokens) * self.depth, 4 * self.rows * self.tokens)

    def build(self, kernel=GEMM):
        return kernel(**{name.upper(): value for name, value in self._asdict().items()})


# Few tokens: 56 KB of weights in flight a block, two or three blocks on a multiprocessor (4.3 TB/s * 0.8 us is 26 KB on
# each). From 32 tokens on 128 rows, or x would cost the L2 cache as much as the weights.
NARROW = tuple(Tile(*tile) for tile in ((64, 8, 16, 8, 64, 8), (64, 16, 16, 16, 64, 8), (128, 32, 32, 32, 64, 5),
                                        (128, 64, 32, 32, 64, 4)))
# Many tokens: 64 x 64 a warp takes 128 bytes of shared memory for each m16n8k16; two blocks fit on a multiprocessor.
WIDE = Tile(128, 128, 64, 64, 32, 4)


class Plan(NamedTuple):
    """One launch: parts = n_splits gives each split a block of its own, parts = 1 lets a block walk all of them."""

    tile: Tile
    n_splits: int
    split_length: int
    parts: int
    n_tiles: int

    @property
    def n_blocks(self):
        n_blocks = self.n_tiles * self.parts
        return min(n_blocks, N_RESIDENT) if self.parts < self.n_splits else n_blocks

    @property
    def scratch_size(self):
        """(floats, counters) that the launch uses."""
        if self.n_splits == 1:
            return 0, 0
        return self.n_blocks * self.tile.rows * self.tile.tokens, self.n_tiles if self.parts > 1 else 0


def splits(n_rows, n_in):
    """(n_splits, split_length) of k, from the weight's shape alone: about N_RESIDENT blocks of SPLIT_ROWS rows, no
    split under MIN_SPLIT but the last. Split s is k in s * split_length .. (s + 1) * split_length, a multiple of 64."""
    wanted = max(1, min(round(N_RESIDENT / -(-n_rows // SPLIT_ROWS)), n_in // MIN_SPLIT))
    length = -(-n_in // (64 * wanted)) * 64
    return -(-n_in // length), length


def plan_with(tile, parts, n_rows, n_in, n_tokens):
    """The Plan of a tile; parts is "split" or "walk"."""
    n_splits, split_length = splits(n_rows, n_in)
    n_tiles = -(-n_rows // tile.rows) * -(-n_tokens // tile.tokens)
    return Plan(tile, n_splits, split_length, n_splits if parts == "split" else 1, n_tiles)


@lru_cache(maxsize=4096)
def plan(n_rows, n_in, n_tokens):
    """The Plan for weights [n_rows, n_in] and n_tokens >= 1: the narrowest tile that holds the tokens; above 64 tokens
    WIDE, unless it would leave multiprocessors idle and the splits' sums fit MOST_PARTIALS."""
    for tile in NARROW:
        if n_tokens <= tile.tokens:
            return plan_with(tile, "split", n_rows, n_in, n_tokens)
    wide = plan_with(WIDE, "walk", n_rows, n_in, n_tokens)
    split = plan_with(NARROW[-1], "split", n_rows, n_in, n_tokens)
    is_small = wide.n_tiles < N_RESIDENT // 2 and split.scratch_size[0] <= MOST_PARTIALS
    return split if is_small else wide


@lru_cache(maxsize=1024)
def scratch_size(n_rows, n_in, max_tokens):
    """(n_floats, n_counters) of Scratch for weights [n_rows, n_in] (gated: 2 * intermediate rows) and any number of
    tokens up to max_tokens."""
    sizes = [plan(n_rows, n_in, n).scratch_size for n in _token_counts(max_tokens)]
    return max(floats for floats, _ in sizes), max(counters for _, counters in sizes)


def _token_counts(max_tokens):
    """Numbers of tokens up to max_tokens among which every tile has its largest launch."""
    most = min(max_tokens, WIDE.tokens * N_RESIDENT)        # beyond, every weight has WIDE tiles for the whole machine
    return sorted({*(min(tile.tokens, max_tokens) for tile in NARROW), *range(64, most, 64), max_tokens})


def linear(x, weight, out, scratch, residual=None):
    """out = x @ weight.T (+ residual), float32 sums, rounded once.

    x         [n_tokens, n_in] bf16, n_in and n_out multiples of 4
    weight    [n_out, n_in] bf16
    out       [n_tokens, n_out] bf16 or float32
    scratch   Scratch of at least scratch_size(n_out, n_in, n_tokens)
    residual  [n_tokens, n_out] bf16, may be out; only where out is bf16
    Raises ShapeError. A row's bits depend on that row of x, on weight and on residual, on nothing else.
    """
    dims = check_linear(x, weight, out, residual)
    if dims.n_tokens and dims.n_out:
        launch(plan(dims.n_out, dims.n_in, dims.n_tokens), x, weight, out, scratch, residual=residual)


def gated_linear(x, weight, out, scratch, activation="gelu_tanh"):
    """out = act(x @ gate.T) * (x @ up.T), all in float32, rounded once (transformers rounds both products first).

    x           [n_tokens, n_in] bf16, n_in and intermediate multiples of 4
    weight      [2 * intermediate, n_in] bf16: the rows of gate, then those of up
    out         [n_tokens, intermediate] bf16
    scratch     Scratch of at least scratch_size(2 * intermediate, n_in, n_tokens)
    activation  "gelu_tanh" or "silu"
    Raises ShapeError.
    """
    dims = check_gated(x, weight, out, activation)
    if dims.n_tokens and dims.n_out:
        launch(plan(2 * dims.n_out, dims.n_in, dims.n_tokens), x, weight, out, scratch,
               activation=ACTIVATIONS[activation])


def check_linear(x, weight, out, residual):
    """The sizes of linear()'s arguments: n_tokens, n_in, n_out. Raises ShapeError."""
    out_dtype = np.float32 if out.dtype == np.float32 and residual is None else BF16
    dims = match("linear", x=(x, "n_tokens n_in", BF16), weight=(weight, "n_out n_in", BF16),
                 residual=(residual, "n_tokens n_out", BF16), out=(out, "n_tokens n_out", out_dtype))
    _check_multiples("linear", dims)
    return dims


def check_gated(x, weight, out, activation):
    """The sizes of gated_linear()'s arguments: n_tokens, n_in, n_out. Raises ShapeError."""
    if activation not in ACTIVATIONS:
        raise ShapeError(f"gated_linear: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    dims = match("gated_linear", x=(x, "n_tokens n_in", BF16), out=(out, "n_tokens n_out", BF16))
    known = {"two_n_out": 2 * dims.n_out, "n_in": dims.n_in}
    match("gated_linear", dims=known, weight=(weight, "two_n_out n_in", BF16))
    _check_multiples("gated_linear", dims)
    return dims


def _check_multiples(op, dims):
    if dims.n_in % 4 or dims.n_out % 4 or not dims.n_in:
        raise ShapeError(f"{op}: {dims.n_in} inputs and {dims.n_out} outputs, expected multiples of 4: rows are copied "
                         "8 bytes at a time")


def launch(how, x, weight, out, scratch, residual=None, activation=0):
    """Runs a Plan. Raises ShapeError if scratch is too small."""
    floats, counters = how.scratch_size
    if floats and (scratch is None or scratch.floats.size < floats or scratch.counters.size < counters):
        has = None if scratch is None else (scratch.floats.size, scratch.counters.size)
        raise ShapeError(f"gemm: scratch is {has}, expected at least {floats} floats and {counters} counters: see "
                         "scratch_size()")
    is_f32 = out.dtype == np.float32
    how.tile.build().launch(
        grid=(how.n_blocks,), block=(how.tile.n_threads,), smem=how.tile.smem_bytes,
        args=(x, weight, residual, None if is_f32 else out, out if is_f32 else None,
              scratch.floats if floats else None, scratch.counters if counters else None, len(x), out.shape[1],
              x.shape[1], how.n_splits, how.split_length, how.parts, activation))


def shapes(spec):
    """(n_rows, n_in) of every weight that a ModelSpec multiplies by."""
    yield from layer_shapes(spec)
    yield spec.vocab, spec.hidden


def layer_shapes(spec):
    """The same without the head, whose product is taken of the rows whose logits are wanted only, and without experts,
    which have kernels of their own."""
    hidden, per_layer = spec.hidden, spec.per_layer_input
    yield from spec.projections
    if per_layer:
        yield spec.per_layer_width, hidden
    for layer in spec.layers:
        yield layer.qkv_width, hidden
        yield hidden, layer.attention.q_width
        if layer.dense:
            yield 2 * layer.dense.intermediate, hidden
            yield hidden, layer.dense.intermediate
        if layer.moe:
            yield layer.moe.n_experts, hidden
        if per_layer:
            yield per_layer, hidden
            yield hidden, per_layer


def tower_shapes(tower, hidden):
    """The same of a vision tower, whose soft tokens go to rows of a decoder's `hidden`: q, k and v as one product, gate
    and up too, and each alone, as a tower with bounds has them."""
    yield tower.hidden, tower.patch_width
    yield hidden, tower.hidden
    if isinstance(tower, BlockEmbedderSpec):
        return
    width, intermediate = tower.q_width, tower.intermediate
    for n_rows in (3 * width, width, 2 * intermediate, intermediate):
        yield n_rows, tower.hidden
    yield tower.hidden, width
    yield tower.hidden, intermediate


def variants(spec, max_tokens):
    """(Build, n_threads, smem_bytes) of everything that a ModelSpec launches with up to max_tokens in a step."""
    tiles = {plan(*shape, n).tile for shape in set(shapes(spec)) for n in _token_counts(max_tokens)}
    if spec.media:
        tower = spec.media.tower
        tiles |= {plan(*shape, n).tile for shape in set(tower_shapes(tower, spec.hidden))
                  for n in _token_counts(max(max_tokens, tower.most_patches))}
    for tile in sorted(tiles):
        yield tile.build(), tile.n_threads, tile.smem_bytes
