"""Rows gathered by number, rows times a number (cuda/embedding.cu)."""

from engine.errors import ShapeError
from engine.kernels.match import match
from engine.kernels.source import BF16, Kernel

EMBED, SELECT_ROWS, SCALE_ROWS = (Kernel("embedding.cu", entry) for entry in ("embed", "select_rows", "scale_rows"))
THREADS = 128
MULTIPLE = 4                    # of every hidden
WORD = 4                        # bytes


def _access_bytes(row_bytes):
    """What a thread moves at once: the most that divides a row."""
    return next(n for n in (16, 8, 4) if row_bytes % n == 0)


def _grid(n_rows, row_bytes):
    return n_rows, -(-row_bytes // (_access_bytes(row_bytes) * THREADS))


def embed(table, token_ids, scale, out):
    """out[t] = table[token_ids[t]] * scale, rounded once.

    table      [vocab, hidden] bf16; hidden a multiple of 4
    token_ids  [n_tokens] int32; one outside 0..vocab - 1 gives a row of NaN, as nobody can raise from a kernel
    scale      float32; where the model rounds it to bfloat16 the caller has
    out        [n_tokens, hidden] bf16
    Raises ShapeError. Source: HF modeling_gemma3, Gemma3TextScaledWordEmbedding.
    """
    dims = match("embed", table=(table, "vocab hidden", BF16), token_ids=(token_ids, "n_tokens", "int32"),
                 out=(out, "n_tokens hidden", BF16))
    if dims.hidden % MULTIPLE or not dims.hidden:
        raise ShapeError(f"embed: hidden is {dims.hidden}, expected a multiple of {MULTIPLE}")
    EMBED(THREADS=THREADS).launch(_grid(dims.n_tokens, 2 * dims.hidden), (THREADS,),
                                  (table, token_ids, out, dims.vocab, dims.hidden, scale))


def select_rows(x, rows, out):
    """out[i] = x[rows[i]], bit for bit; returns out.

    x     [n, width] of any dtype, rows of a multiple of 4 bytes
    rows  [n_kept] int32; one outside 0..n - 1 gives a row of bytes 0xFF, NaN in any float type
    out   [n_kept, width], of x's dtype
    Raises ShapeError.
    """
    dims = match("select_rows", x=(x, "n width", None), rows=(rows, "n_kept", "int32"),
                 out=(out, "n_kept width", x.dtype))
    row_bytes = dims.width * x.dtype.itemsize
    if row_bytes % WORD or not row_bytes:
        raise ShapeError(f"select_rows: rows of x are {row_bytes} bytes, expected a multiple of {WORD}")
    SELECT_ROWS(THREADS=THREADS).launch(_grid(dims.n_kept, row_bytes), (THREADS,),
                                        (x, rows, out, dims.n, row_bytes // WORD))
    return out


def scale_rows(x, weights, out):
    """out[t * k + s] = x[t] * weights[t, s], the weight rounded to bf16, then the product.

    x        [n_tokens, hidden] bf16; hidden a multiple of 4
    weights  [n_tokens, k] float32
    out      [n_tokens * k, hidden] bf16, another array
    Raises ShapeError. Source: HF modeling_llama4, Llama4TextMoe.
    """
    dims = match("scale_rows", x=(x, "n_tokens hidden", BF16), weights=(weights, "n_tokens k", "float32"))
    match("scale_rows", dims={"pairs": dims.n_tokens * dims.k, "hidden": dims.hidden}, out=(out, "pairs hidden", BF16))
    if dims.hidden % MULTIPLE or not dims.hidden:
        raise ShapeError(f"scale_rows: hidden is {dims.hidden}, expected a multiple of {MULTIPLE}")
    SCALE_ROWS(THREADS=THREADS).launch(_grid(dims.n_tokens, 2 * dims.hidden), (THREADS,),
                                       (x, weights, out, dims.k, dims.hidden))


def variants(spec, max_tokens):
    """(Build, threads of a block, dynamic shared memory) of all that a ModelSpec launches."""
    yield EMBED(THREADS=THREADS), THREADS, 0
    yield SELECT_ROWS(THREADS=THREADS), THREADS, 0
    if any(layer.moe and layer.moe.routing == "sigmoid" for layer in spec.layers):
        yield SCALE_ROWS(THREADS=THREADS), THREADS, 0
