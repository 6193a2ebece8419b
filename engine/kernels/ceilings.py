"""Kernels that show what a GPU reaches at best, for percentages: no op of a model (cuda/ceilings.cu)."""

from engine.kernels.match import match
from engine.kernels.source import Kernel

READ_SUM, COPY, NOTHING = (Kernel("ceilings.cu", entry) for entry in ("read_sum", "copy", "nothing"))
THREADS, UNROLL = 256, 4
CONSTANTS = {"THREADS": THREADS, "UNROLL": UNROLL}
STRETCH_WORDS = 4 * THREADS * UNROLL    # what a block reads at once: 16 KB
N_BLOCKS = 132 * 8                      # fill an H200 with 2048 threads on each multiprocessor


def n_blocks(n_words, most=N_BLOCKS):
    """Blocks of a launch over n_words."""
    return max(1, min(-(-n_words // STRETCH_WORDS), most))


def read_sum(x, out):
    """Reads x once; out's sum, modulo 2^32, is that of x.

    x    [n_words] uint32
    out  [n_blocks] uint32: so many blocks are launched, n_blocks(n_words) is enough
    Raises ShapeError.
    """
    dims = match("read_sum", x=(x, "n_words", "uint32"), out=(out, "n_blocks", "uint32"))
    READ_SUM(**CONSTANTS).launch((dims.n_blocks,), (THREADS,), (x, out, dims.n_words))


def copy(x, out, most_blocks=N_BLOCKS):
    """out = x. Both [n_words] uint32. Raises ShapeError."""
    dims = match("copy", x=(x, "n_words", "uint32"), out=(out, "n_words", "uint32"))
    if dims.n_words:
        COPY(**CONSTANTS).launch((n_blocks(dims.n_words, most_blocks),), (THREADS,), (x, out, dims.n_words))


def nothing(x):
    """Launches one block that does nothing, on the GPU that x is on."""
    NOTHING(**CONSTANTS).launch((1,), (THREADS,), (x,))


def variants(spec, max_tokens):
    """(Build, threads of a block, dynamic shared memory) of each kernel; whatever the ModelSpec."""
    for kernel in (READ_SUM, COPY, NOTHING):
        yield kernel(**CONSTANTS), THREADS, 0
