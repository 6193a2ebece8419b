"""Rows gathered and placed by number, rows times a number (cuda/embedding.cu)."""

from engine.errors import ShapeError
from engine.kernels.match import match
from engine.kernels.source import BF16, Kernel

EMBED, SELECT_ROWS, SCALE_ROWS, PLACE_ROWS, ADD_ROWS, POOL_ROWS = (
    Kernel("embedding.cu", entry)
    for entry in ("embed", "select_rows", "scale_rows", "place_rows", "add_rows", "pool_rows"))
THREADS = 128
MULTIPLE = 4                    # of every hidden
WORD = 4                        # bytes


def _access_bytes(row_bytes):
    """What a thread moves at once: the most that divides a row."""
    return next(n for n in (16, 8, 4) if row_bytes % n == 0)


def _grid(n_rows, row_bytes):
    return n_rows, -(-row_bytes // (_access_bytes(row_bytes) * THREADS))


def _check_multiple(op, dims):
    if dims.hidden % MULTIPLE or not dims.hidden:
        raise ShapeError(f"{op}: hidden is {dims.hidden}, expected a multiple of {MULTIPLE}")


def _row_bytes(op, x):
    row_bytes = x.shape[1] * x.dtype.itemsize
    if row_bytes % WORD or not row_bytes:
        raise ShapeError(f"{op}: rows of x are {row_bytes} bytes, expected a multiple of {WORD}")
    return row_bytes


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
    _check_multiple("embed", dims)
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
    row_bytes = _row_bytes("select_rows", x)
    SELECT_ROWS(THREADS=THREADS).launch(_grid(dims.n_kept, row_bytes), (THREADS,),
                                        (x, rows, out, dims.n, row_bytes // WORD))
    return out


def place_rows(x, source, rows, out):
    """out[rows[i]] = x[source[i]], bit for bit; other rows of out stay as they are.

    x       [n, width] of any dtype, rows of a multiple of 4 bytes
    source  [n_placed] int32; one outside 0..n - 1 places a row of bytes 0xFF, NaN in any float type
    rows    [n_placed] int32, all different; one outside out places nothing
    out     [n_out, width], of x's dtype, another array
    Raises ShapeError.
    """
    dims = match("place_rows", x=(x, "n width", None), source=(source, "n_placed", "int32"),
                 rows=(rows, "n_placed", "int32"), out=(out, "n_out width", x.dtype))
    row_bytes = _row_bytes("place_rows", x)
    PLACE_ROWS(THREADS=THREADS).launch(_grid(dims.n_placed, row_bytes), (THREADS,),
                                       (x, source, rows, out, dims.n, dims.n_out, row_bytes // WORD))


def add_rows(x, table, rows, out):
    """out[i] = x[i] + (table[rows[i, 0]] + table[rows[i, 1]]), the sum in brackets rounded, then the other one.

    x      [n, hidden] bf16; hidden a multiple of 4
    table  [n_places, hidden] bf16
    rows   [n, 2] int32, or [n, 1]: nothing is added to the first; a row with a number outside the table is NaN
    out    like x, may be x
    Raises ShapeError. Source: HF modeling_gemma4, Gemma4VisionPatchEmbedder; one number: HF modeling_siglip.
    """
    dims = match("add_rows", x=(x, "n hidden", BF16), table=(table, "n_places hidden", BF16),
                 rows=(rows, "n n_axes", "int32"), out=(out, "n hidden", BF16))
    _check_multiple("add_rows", dims)
    if dims.n_axes not in (1, 2):
        raise ShapeError(f"add_rows: rows has {dims.n_axes} columns, expected 1 or 2")
    ADD_ROWS(THREADS=THREADS).launch(_grid(dims.n, 2 * dims.hidden), (THREADS,),
                                     (x, table, rows, out, dims.n_places, dims.n_axes, dims.hidden))


def pool_rows(x, groups, factor, bias, scale, out):
    """out[b] = (mean of the rows x[groups[b]] * factor - bias) * scale: the mean is summed in float32 and rounded, what
    follows is in float32 and rounded at the end.

    x            [n, hidden] bf16; hidden a multiple of 4
    groups       [n_out, k] int32, k at least 1; a group with a number outside 0..n - 1 gives a row of NaN
    factor       float32
    bias, scale  [hidden] bf16, or None
    out          [n_out, hidden] bf16, another array
    Raises ShapeError. Source: HF modeling_gemma4, Gemma4VisionPooler.
    """
    dims = match("pool_rows", x=(x, "n hidden", BF16), groups=(groups, "n_out k", "int32"), bias=(bias, "hidden", BF16),
                 scale=(scale, "hidden", BF16), out=(out, "n_out hidden", BF16))
    _check_multiple("pool_rows", dims)
    if not dims.k:
        raise ShapeError("pool_rows: groups are of no rows, expected at least 1")
    POOL_ROWS(THREADS=THREADS).launch(_grid(dims.n_out, 2 * dims.hidden), (THREADS,),
                                      (x, groups, bias, scale, out, dims.n, dims.k, dims.hidden, factor))


def scale_rows(x, weights, out):
    """out[t * k + s] = x[t] * weights[t, s], the weight rounded to bf16, then the product.

    x        [n_tokens, hidden] bf16; hidden a multiple of 4
    weights  [n_tokens, k] float32
    out      [n_tokens * k, hidden] bf16, another array
    Raises ShapeError. Source: HF modeling_llama4, Llama4TextMoe.
    """
    dims = match("scale_rows", x=(x, "n_tokens hidden", BF16), weights=(weights, "n_tokens k", "float32"))
    match("scale_rows", dims={"pairs": dims.n_tokens * dims.k, "hidden": dims.hidden}, out=(out, "pairs hidden", BF16))
    _check_multiple("scale_rows", dims)
    SCALE_ROWS(THREADS=THREADS).launch(_grid(dims.n_tokens, 2 * dims.hidden), (THREADS,),
                                       (x, weights, out, dims.k, dims.hidden))


def variants(spec, max_tokens):
    """(Build, threads of a block, dynamic shared memory) of all that a ModelSpec launches."""
    yield EMBED(THREADS=THREADS), THREADS, 0
    yield SELECT_ROWS(THREADS=THREADS), THREADS, 0
    if any(layer.moe and layer.moe.routing == "sigmoid" for layer in spec.layers):
        yield SCALE_ROWS(THREADS=THREADS), THREADS, 0
    if spec.media:
        for kernel in (PLACE_ROWS, ADD_ROWS, POOL_ROWS):
            yield kernel(THREADS=THREADS), THREADS, 0
