"""What each kernel of cuda/*.cu costs, as a function of the names in the `traffic` line of its header.

One function an entry, <entry>_cost. traffic_bytes is that line's value; which part of it is extra is said here.
itemsize is that of activations, weights, K and V: 2 for the kernels, 4 for the same work on the `cpu` lane.
"""

from engine.kernels.sampling import N_BINS
from engine.roofline import Cost


def logit_softcap_cost(n):
    return Cost(8 * n)


def embed_cost(n_tokens, n_distinct, hidden, itemsize=2):
    return Cost(4 * n_tokens + itemsize * (n_distinct + n_tokens) * hidden)


def select_rows_cost(n_kept, n_distinct, row_words):
    return Cost(4 * n_kept + 4 * (n_distinct + n_kept) * row_words)


def rms_norm_cost(n_rows, hidden, has_weight=True, itemsize=2):
    return Cost(itemsize * (2 * n_rows + has_weight) * hidden)


def add_norm_cost(n_rows, hidden, has_post_weight=True, has_layer_scalar=False, itemsize=2):
    return Cost(itemsize * ((4 * n_rows + 1 + has_post_weight) * hidden + has_layer_scalar))


def rope_angles_cost(n_tokens, n_pairs):
    return Cost(4 * n_tokens + 4 * n_pairs + 8 * n_tokens * n_pairs)


def qk_norm_rope_cache_cost(n_tokens, n_in, n_heads, n_kv_heads, head_dim, n_pairs, itemsize=2):
    """n_in: heads of qkv, which v shares with k where it has no projection of its own."""
    return Cost(itemsize * head_dim * (n_tokens * (n_in + n_heads + 2 * n_kv_heads) + 2)
                + 8 * n_tokens * n_pairs + 4 * n_tokens)


def gemm_cost(n_tokens, n_in, n_rows, n_out, out_bytes=2, residual_bytes=0, n_partials=0, n_counters=0, itemsize=2):
    """n_rows: of the weight, twice n_out where it is gated; out_bytes and residual_bytes: of one element."""
    return Cost(itemsize * n_in * (n_rows + n_tokens) + (out_bytes + residual_bytes) * n_tokens * n_out,
                8 * (n_partials + n_counters), 2 * n_tokens * n_in * n_rows)


def gated_activation_cost(n_tokens, n_out):
    return Cost(10 * n_tokens * n_out)


def attention_cost(n_keys, n_tokens, n_heads, n_kv_heads, head_dim, n_part_rows=0, n_index_bytes=0, n_pairs=0,
                   itemsize=2):
    """n_keys: positions that somebody sees, whose K and V are read once; n_pairs: (token, position it sees)."""
    return Cost(2 * itemsize * (n_keys * n_kv_heads + n_tokens * n_heads) * head_dim,
                8 * n_part_rows * (head_dim + 2) + n_index_bytes, 4 * n_heads * head_dim * n_pairs)


def apply_edits_cost(n_edits, n_edited_rows):
    return Cost(4 + 26 * n_edits + 12 * n_edited_rows)


def largest_logit_cost(n_rows, vocab, has_out=True):
    return Cost(n_rows * (4 * vocab + 4 * has_out), n_rows * (12 * N_BINS + 48))


def count_weights_cost(vocab, n_bins):
    """Of one row, as the next three."""
    return Cost(4 * vocab, 12 * (N_BINS + n_bins) + 45)


def draw_cost(vocab, n_listed):
    return Cost(4 * vocab, 12 * N_BINS + 16 * n_listed + 97)


def sum_weights_cost(vocab, n_bins):
    return Cost(4 * vocab, 4 * (N_BINS + n_bins) + 48)


def list_likeliest_cost(vocab, n_listed, n):
    return Cost(4 * vocab + 8 * n, 16 * n_listed + 40)


def read_sum_cost(n_words, n_blocks):
    return Cost(4 * n_words, 4 * n_blocks)


def copy_cost(n_words):
    return Cost(8 * n_words)


def nothing_cost():
    return Cost()
