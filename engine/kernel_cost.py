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


def scale_rows_cost(n_tokens, k, hidden, itemsize=2):
    return Cost(itemsize * n_tokens * (1 + k) * hidden + 4 * n_tokens * k)


def gate_per_layer_cost(n_rows, width, itemsize=2):
    return Cost(3 * itemsize * n_rows * width)


def place_rows_cost(n_placed, n_distinct, row_words):
    return Cost(8 * n_placed + 4 * (n_distinct + n_placed) * row_words)


def add_rows_cost(n, n_axes, hidden, n_distinct, itemsize=2):
    """n_distinct: rows of the table that are added to some row."""
    return Cost(4 * n * n_axes + itemsize * (2 * n + n_distinct) * hidden)


def pool_rows_cost(n_out, k, n_distinct, hidden, has_bias=False, has_scale=False, itemsize=2):
    return Cost(4 * n_out * k + itemsize * (n_distinct + n_out + has_bias + has_scale) * hidden)


def clamp_cost(n_rows, width, itemsize=2):
    return Cost(itemsize * (2 * n_rows * width + 2))


def add_bias_cost(n_rows, width, has_residual=False, itemsize=2):
    return Cost(itemsize * ((2 + has_residual) * n_rows + 1) * width)


def layer_norm_cost(n_rows, hidden, itemsize=2):
    return Cost(itemsize * (2 * n_rows + 2) * hidden)


def mix_per_layer_cost(n_rows, width, itemsize=2):
    return Cost(itemsize * (3 * n_rows + 1) * width)


def rms_norm_cost(n_rows, hidden, has_weight=True, itemsize=2):
    return Cost(itemsize * (2 * n_rows + has_weight) * hidden)


def add_norm_cost(n_rows, hidden, has_post_weight=True, has_layer_scalar=False, itemsize=2):
    return Cost(itemsize * ((4 * n_rows + 1 + has_post_weight) * hidden + has_layer_scalar))


def add_residual_cost(n_rows, hidden, has_post_weight=True, has_layer_scalar=False, itemsize=2):
    return Cost(itemsize * ((3 * n_rows + has_post_weight) * hidden + has_layer_scalar))


def add_norms_cost(n_rows, hidden, itemsize=2):
    return Cost(itemsize * (3 * n_rows + 2) * hidden)


def router_norm_cost(n_rows, hidden, itemsize=2):
    return Cost(itemsize * (2 * n_rows + 1) * hidden)


def rope_angles_cost(n_tokens, n_pairs, n_axes=1):
    return Cost(4 * n_tokens * n_axes + 4 * n_pairs + 8 * n_tokens * n_pairs)


def attention_temperature_cost(n_tokens):
    return Cost(8 * n_tokens)


def qk_norm_rope_cache_cost(n_tokens, n_in, n_heads, n_kv_heads, head_dim, n_pairs, itemsize=2, n_weights=2,
                            has_slots=True, has_temperature=False):
    """n_in: heads of qkv, which v shares with k where it has no projection of its own; n_weights: of q_norm and k_norm,
    how many there are."""
    return Cost(itemsize * head_dim * (n_tokens * (n_in + n_heads + 2 * n_kv_heads) + n_weights)
                + 4 * n_tokens * (2 * n_pairs + has_slots + has_temperature))


def gemm_cost(n_tokens, n_in, n_rows, n_out, out_bytes=2, residual_bytes=0, n_partials=0, n_counters=0, itemsize=2):
    """n_rows: of the weight, twice n_out where it is gated; out_bytes and residual_bytes: of one element."""
    return Cost(itemsize * n_in * (n_rows + n_tokens) + (out_bytes + residual_bytes) * n_tokens * n_out,
                8 * (n_partials + n_counters), 2 * n_tokens * n_in * n_rows)


def moe_pick_cost(n_tokens, n_experts, n_chosen, n_scales=0, itemsize=2):
    """n_scales: experts whose scale is read."""
    return Cost(itemsize * (n_tokens * n_experts + n_scales) + 8 * n_tokens * n_chosen)


def moe_order_cost(n_pairs, n_experts):
    return Cost(8 * n_pairs + 4 * (n_experts + 1))


def moe_gemm_cost(n_in, n_active, n_rows, n_x_rows, n_out, n_pairs, n_experts, out_bytes, itemsize=2):
    """n_active: experts with pairs; n_rows: of one expert's weight, twice n_out where it is gated."""
    return Cost(itemsize * n_in * (n_active * n_rows + n_x_rows) + out_bytes * n_pairs * n_out,
                4 * (n_pairs + n_experts + 1), 2 * n_pairs * n_in * n_rows)


moe_gemm_in_out_cost = moe_gemm_cost


def moe_combine_cost(n_tokens, n_chosen, hidden, has_weights=True, itemsize=2):
    return Cost(n_tokens * (4 * n_chosen * hidden + 4 * has_weights * n_chosen + itemsize * hidden))


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
    """Of one row, as all below it that take logits."""
    return Cost(4 * vocab, 12 * (N_BINS + n_bins) + 45)


def draw_cost(vocab, n_listed):
    return Cost(4 * vocab, 12 * N_BINS + 16 * n_listed + 97)


def find_kept_cost(vocab, n_listed):
    return Cost(4 * vocab, 12 * N_BINS + 16 * n_listed + 93)


def draw_draft_cost(vocab):
    return Cost(8 * vocab, 65)


def draw_with_draft_cost(vocab, n_read):
    """n_read: of the draft's probabilities."""
    return Cost(4 * (vocab + n_read), 69)


def relax_drafts_cost(vocab):
    return Cost(4 * vocab, 61)


def accept_drafts_cost(n_tokens, n_drafts, n_seqs):
    """n_tokens, n_drafts: that are compared."""
    return Cost(4 * (n_tokens + n_drafts) + 32 * n_seqs + 4)


def pick_centroids_cost(n_rows, n_centroids, n_chosen):
    return Cost(4 * n_rows * (n_centroids + n_chosen))


def candidate_argmax_cost(n_rows, n_chosen, n_distinct, hidden, n_logits=0, itemsize=2):
    """n_distinct: candidates of all rows, each once; n_logits: of each row, summed over rows."""
    return Cost(n_rows * (itemsize * hidden + 4 * n_chosen + 4) + n_distinct * (itemsize * hidden + 4), 24 * n_rows,
                2 * n_logits * hidden)


def no_logits_cost(n):
    return Cost(4 * n)


def candidate_logits_cost(n_rows, n_chosen, n_distinct, n_logits, hidden, itemsize=2):
    """As candidate_argmax_cost."""
    return Cost(n_rows * (itemsize * hidden + 4 * n_chosen) + n_distinct * (itemsize * hidden + 4) + 4 * n_logits,
                flops=2 * n_logits * hidden)


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
