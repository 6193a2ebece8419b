"""engine/cost.py against tables of floors that were worked out apart from it, from the dimensions on the model cards.

Ceilings: one H200 that copies 4.3 TB/s and multiplies random bf16 matrices of 8192 at 790 TFLOP/s. A figure agrees if
it is within half of its last printed digit, and SLACK of itself: two were rounded twice. The tables leave out embedding
rows, and half of what a token does to itself while its window fills: so do the tests that hold steps against them. What
floors of steps have to do with each other is in tests/test_floor_steps.py.
"""

from math import prod

import numpy as np
import pytest

from engine import cost
from engine.cost import (
    Ceilings,
    Cost,
    draft_step,
    experts,
    floor,
    floor_parts,
    launch_share,
    n_matrix_weights,
    speculation_ceiling,
)
from engine.kernels.gemm import layer_shapes
from engine.kernels.source import BF16
from engine.kv_cache import pool_specs
from engine.models.presets import PRESETS, draft_preset, preset
from engine.tensors import n_weights, targets

H200 = Ceilings(4.3e12, 790e12, "given")
FP8 = {"llama-4-scout": 1}                  # bytes of a weight where they are not 2


SLACK = 2e-5


def agrees(value, printed):
    printed = printed.replace(" ", "")
    decimals = len(printed.partition(".")[2])
    return abs(value - float(printed)) <= 0.5 * 10**-decimals + SLACK * abs(value)


def embedded(spec, n_tokens, weight_bytes=2):
    """The Cost of their rows of the embedding tables."""
    return Cost(weight_bytes * n_tokens * (spec.hidden + spec.per_layer_width))


def less(step, part):
    return Cost(step.bytes - part.bytes, flops=step.flops - part.flops)


def assert_agree(values, printed):
    printed = printed.split(" · ")
    assert len(values) == len(printed)
    for value, text in zip(values, printed, strict=True):
        assert agrees(value, text), f"{value} is not {text}"


# --- decode steps: GB, ms, tokens/s of so many sequences at contexts of 1k and 32k

DECODE = {
    "gemma-3-27b": ("54.0", "54.5 · 12.68 · 79", "58.2 · 13.53 · 591", "87.3 · 20.30 · 3 152",
                    "57.1 · 13.29 · 75", "79.0 · 18.37 · 436", "253.7 · 59.0"),
    "gemma-3-1b": ("2.0", "2.02 · 0.47 · 2 134", "2.13 · 0.49 · 16 186", "3.01 · 0.70 · 91 546",
                   "2.15 · 0.50 · 2 004", "3.17 · 0.74 · 10 867", "11.3 · 2.63 · 24 295"),
    "gemma-4-31b": ("61.4", "62.3 · 14.49 · 69", "68.8 · 15.99 · 500", "120.5 · 28.01 · 2 285",
                    "64.9 · 15.10 · 66", "89.6 · 20.83 · 384", "286.9 · 66.7"),
    "gemma-4-26b-a4b": ("50.5", "7.87 · 1.83 · 546", "25.1 · 5.83 · 1 373", "64.5 · 15.00 · 4 267",
                        "8.52 · 1.98 · 504", "30.3 · 7.04 · 1 137", "106.1 · 24.67 · 2 594"),
    "gemma-4-e4b": ("14.9", "9.35 · 2.18 · 460", "9.82 · 2.28 · 3 504", "13.5 · 3.14 · 20 362",
                    "10.3 · 2.39 · 419", "17.1 · 3.98 · 2 012", "71.8 · 16.69 · 3 835"),
    "gemma-4-e2b": ("9.3", "4.59 · 1.07 · 937", "4.79 · 1.11 · 7 176", "6.44 · 1.50 · 42 746",
                    "5.04 · 1.17 · 853", "8.43 · 1.96 · 4 078", "35.6 · 8.27 · 7 738"),
    "llama-4-scout": ("107.8", "16.3 · 3.80 · 263", "50.7 · 11.79 · 679", "118.1 · 27.46 · 2 331",
                      "19.0 · 4.41 · 227", "71.6 · 16.66 · 480", "285.6 · 66.4"),
}


@pytest.mark.parametrize("name, printed", [
    ("gemma-3-27b", "27.01"), ("gemma-3-1b", "1.00"), ("gemma-4-31b", "30.70"), ("gemma-4-26b-a4b", "25.23"),
    ("gemma-4-e4b", "7.46"), ("gemma-4-e2b", "4.63"), ("llama-4-scout", "107.77")])
def test_weights_of_text_in_billions(name, printed):
    assert_agree([n_weights(preset(name).text_only()) / 1e9], printed)


def test_weights_that_a_token_takes_in_billions():
    step = floor(preset("gemma-4-26b-a4b"), [(1, 1, 1)])
    assert_agree([step.flops / 2 / 1e9], "3.8")


@pytest.mark.parametrize("name", DECODE)
def test_decode(name):
    spec, weight_bytes = preset(name), FP8.get(name, 2)
    weights, *cells = DECODE[name]
    tables = spec.vocab * (spec.hidden * (1 if spec.tied else 2) + len(spec.layers) * spec.per_layer_input)
    assert agrees(weight_bytes * (n_matrix_weights(spec) + tables) / 1e9, weights)
    steps = [(n_seqs, context) for context in (1024, 32768) for n_seqs in (1, 8, 64)]
    for (n_seqs, context), cell in zip(steps, cells, strict=True):
        step = less(floor(spec, [(n_seqs, 1, context)], weight_bytes), embedded(spec, n_seqs, weight_bytes))
        assert step.bound(H200) == "memory"
        ms = step.time_s(H200) * 1e3
        assert_agree((step.bytes / 1e9, ms, n_seqs / ms * 1e3)[:cell.count("·") + 1], cell)


@pytest.mark.parametrize("name, n_seqs, context, printed", [
    ("gemma-4-31b", 8, 32768, "20.83 · 18.96"), ("gemma-4-31b", 1, 131072, "16.97 · 16.03"),
    ("gemma-4-26b-a4b", 64, 32768, "24.67 · 20.93")])
def test_decode_where_k_and_v_are_one(name, n_seqs, context, printed):
    spec = preset(name)
    assert_agree([less(floor(spec, [(n_seqs, 1, context)], latent=latent), embedded(spec, n_seqs)).time_s(H200) * 1e3
                  for latent in (False, True)], printed)


# --- kernels of Gemma 4 31B, and the routed experts of a 26B-A4B layer: microseconds

def shaped(*shape, dtype=BF16):
    """What has a shape and a dtype, and no memory to speak of."""
    return np.broadcast_to(np.zeros((), dtype), shape)


@pytest.mark.parametrize("n_in, n_out, printed", [
    (5376, 16384, "41.0"), (8192, 5376, "20.5"), (21504, 5376, "53.8"),         # local qkv, o; down
    (5376, 18432, "46.1"), (16384, 5376, "41.0"), (5376, 262144, "655")])       # global qkv, o; head
def test_linear_of_one_token(n_in, n_out, printed):
    one = cost.linear(shaped(1, n_in), shaped(n_out, n_in), shaped(1, n_out), None)
    assert_agree([less(one, Cost(2 * (n_in + n_out))).time_s(H200) * 1e6], printed)     # the table leaves x and out out


def test_gated_linear_of_one_token():
    one = cost.gated_linear(shaped(1, 5376), shaped(43008, 5376), shaped(1, 21504), None)
    assert_agree([less(one, Cost(2 * (5376 + 21504))).time_s(H200) * 1e6], "107.5")


class Decoding:
    """PagedInputs of n sequences that decode a token each, as far as their cost needs them."""

    last_visible = first_visible = None

    def __init__(self, n_seqs, context):
        self.cu_seqlens = np.arange(n_seqs + 1, dtype=np.int32)
        self.context_lens = np.full(n_seqs, context, np.int32)


@pytest.mark.parametrize("n_seqs, context, n_kv_heads, head_dim, window, printed", [
    (1, 1024, 16, 256, 1024, "3.9"), (64, 1024, 16, 256, 1024, "250"), (64, 32768, 16, 256, 1024, "250"),
    (1, 32768, 4, 512, None, "62.4"), (8, 32768, 4, 512, None, "499")])
def test_attention_of_decoded_tokens(n_seqs, context, n_kv_heads, head_dim, window, printed):
    q, pages = shaped(n_seqs, 32 * head_dim), shaped(4096, 16, n_kv_heads, head_dim)
    one = cost.attention(q, pages, pages, Decoding(n_seqs, context), scale=1.0, out=q, scratch=None, window=window)
    assert_agree([less(one, Cost(4 * n_seqs * 32 * head_dim)).time_s(H200) * 1e6], printed)     # not q and out
    assert 0 < one.extra_bytes < 0.1 * one.bytes


@pytest.mark.parametrize("n_tokens, printed", [
    (1, "22.1"), (8, "142.8"), (64, "348"), (128, "354"), (512, "354"), (4096, "493")])
def test_experts(n_tokens, printed):
    assert_agree([experts(preset("gemma-4-26b-a4b").layers[0].mlp, 2816, n_tokens).time_s(H200) * 1e6], printed)


# --- a prompt of 2k, 8k, 32k: TFLOP of the matrices and of attention, ms, tokens/s

PREFILL = {
    "gemma-3-27b": ("104.9 · 1.7 · 134.9 · 15 186", "419.4 · 12.2 · 546.3 · 14 994",
                    "1 677.6 · 116.1 · 2 270 · 14 432"),
    "gemma-3-1b": ("2.9 · 0.1 · 3.8 · 543 715", "11.4 · 0.9 · 15.6 · 524 081", "45.7 · 10.3 · 70.9 · 462 055"),
    "gemma-4-31b": ("120.0 · 4.0 · 156.9 · 13 057", "479.8 · 34.9 · 651.5 · 12 573",
                    "1 919.3 · 406.0 · 2 943 · 11 133"),
    "gemma-4-26b-a4b": ("12.6 · 1.0 · 17.2 · 118 791", "50.5 · 8.7 · 75.0 · 109 240", "202.1 · 101.5 · 384.3 · 85 271"),
    "gemma-4-e4b": ("16.3 · 0.5 · 21.2 · 96 434", "65.1 · 5.0 · 88.7 · 92 314", "260.4 · 66.3 · 413.6 · 79 235"),
    "gemma-4-e2b": ("7.7 · 0.5 · 10.3 · 198 780", "30.8 · 4.8 · 45.0 · 182 142", "123.0 · 65.4 · 238.5 · 137 410"),
    "llama-4-scout": ("61.9 · 2.1 · 80.9 · 25 309", "247.5 · 33.0 · 355.0 · 23 077", "989.8 · 230.9 · 1 545 · 21 206"),
}


@pytest.mark.parametrize("name", PREFILL)
def test_prefill(name):
    for n_tokens, cell in zip((2048, 8192, 32768), PREFILL[name], strict=True):
        parts = floor_parts(preset(name), [(1, n_tokens, n_tokens)], FP8.get(name, 2))
        half_pairs = sum(2 * layer.attention.q_width * min(n_tokens, layer.attention.window or n_tokens)
                         for layer in preset(name).layers)
        of_attention = parts["attention"].flops - half_pairs
        step = less(sum(parts.values(), Cost()), Cost(flops=half_pairs))
        assert step.bound(H200) == "compute"
        assert_agree(((step.flops - of_attention) / 1e12, of_attention / 1e12, step.time_s(H200) * 1e3,
                      n_tokens / step.time_s(H200)), cell)


def test_all_experts_of_a_prompt_bound_it_by_memory():
    """A chunk of 512 tokens of 26B-A4B reads nearly every expert: 45.7 GB, 10.6 ms."""
    parts = floor_parts(preset("gemma-4-26b-a4b"), [(1, 512, 512)])
    assert_agree([parts["experts"].bytes / 1e9, parts["experts"].time_s(H200) * 1e3], "45.7 · 10.6")
    assert sum(parts.values(), Cost()).bound(H200) == "memory"


# --- what launches leave of it: percent at 5, 8, 14 kernels a layer with gaps of 2.5 us, 5 and 14 with 0.7 us; every
# cell agrees with 6 kernels besides (embedding, angles, a norm, the head, its softcap, a draw)

LAUNCHES = {"gemma-4-31b": (95, 92, 87, 99, 96), "gemma-4-26b-a4b": (82, 75, 63, 94, 86),
            "gemma-4-e4b": (80, 72, 59, 94, 84), "gemma-4-e2b": (70, 60, 46, 89, 75),
            "gemma-3-1b": (58, 47, 34, 83, 64), "llama-4-scout": (86, 80, 69, 96, 89)}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches(name):
    spec = preset(name)
    step_s = floor(spec, [(1, 1, 1024)], FP8.get(name, 2)).time_s(H200)
    for (n_kernels, gap_us), percent in zip([(5, 2.5), (8, 2.5), (14, 2.5), (5, 0.7), (14, 0.7)], LAUNCHES[name],
                                            strict=True):
        n_launches = n_kernels * len(spec.layers) + 6
        assert agrees(100 * launch_share(step_s, n_launches, gap_us * 1e-6), str(percent))


# --- and what drafts gain: their acceptance by position, as published for 26B-A4B

ACCEPTANCE = (0.844, 0.599, 0.385, 0.271)


@pytest.mark.parametrize("name, n_draft_weights, printed", [
    ("gemma-4-31b", 0.47e9, "1.82 · 2.37 · 2.71 · 2.92"), ("gemma-4-26b-a4b", 0.42e9, "1.27 · 1.31 · 1.24 · 1.16")])
def test_speculation(name, n_draft_weights, printed):
    step_s, *verify_s = [floor(preset(name), [(1, n, 1024, n)]).time_s(H200) for n in range(1, 6)]
    draft_s = 2 * n_draft_weights / H200.bytes_per_s
    assert_agree([speculation_ceiling(ACCEPTANCE[:k], step_s, verify_s[k - 1], draft_s) for k in (1, 2, 3, 4)], printed)
    if name == "gemma-4-26b-a4b":                   # five tokens hit 35 of 128 experts
        assert_agree([verify_s[-1] / step_s], "2.24")
    else:
        assert_agree([4 * draft_s / step_s * 100], "6")


@pytest.mark.parametrize("name", ["gemma-4-e4b", "gemma-4-e2b"])
def test_speculation_with_a_head_of_centroids(name):
    """One row of the table for both, its last digits cut off. The draft's bytes are those of its spec."""
    spec, draft = preset(name), draft_preset(name)
    step_s, *verify_s = [floor(spec, [(1, n, 1024, n)]).time_s(H200) for n in range(1, 6)]
    draft_s = draft_step(draft, 1, 1024).time_s(H200)
    gains = [speculation_ceiling(ACCEPTANCE[:k], step_s, verify_s[k - 1], draft_s) for k in (1, 2, 3, 4)]
    cut_off = [int(gain * unit) / unit for gain, unit in zip(gains, (100, 10, 10, 10), strict=True)]
    assert cut_off == [1.83, 2.4, 2.7, 3.0]
    head = 2 * draft.hidden * draft.vocab * draft.centroids_per_token / draft.n_centroids
    assert head == 2 * 256 * 4096                                               # of 262144 rows


# --- one source: what the floor counts is what the engine loads, multiplies by and caches

@pytest.mark.parametrize("name", PRESETS)
def test_the_floor_counts_the_weights_that_are_loaded(name):
    spec = preset(name).text_only()                 # a step of text reads no vision weights
    n_vectors = sum(target.shape[0] for target in targets(spec) if len(target.shape) == 1)
    n_matrices = n_matrix_weights(spec)
    n_of_experts = sum(prod(target.shape) for target in targets(spec) if len(target.shape) == 3)
    assert n_matrices == sum(n_rows * n_in for n_rows, n_in in layer_shapes(spec)) + n_of_experts
    n_of_tables = spec.vocab * spec.hidden * (1 if spec.tied else 2) + spec.per_layer_vocab * spec.per_layer_width
    assert n_matrices + n_of_tables + n_vectors == n_weights(spec)
    assert n_vectors < 0.001 * n_matrices or name == "gemma-3-270m"             # what the floor leaves out


@pytest.mark.parametrize("name, n_embedded", [("gemma-3-1b", 1152), ("gemma-4-e4b", 2560 + 42 * 256)])
def test_the_floor_counts_a_row_of_each_embedding_table(name, n_embedded):
    one, seven = (floor_parts(preset(name), [(1, n, 7)])["linear"].bytes for n in (1, 7))
    assert one == 2 * (n_matrix_weights(preset(name)) + n_embedded) and seven - one == 2 * 6 * n_embedded


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("kv_bytes", [1, 2])
def test_the_floor_counts_the_keys_and_values_that_are_cached(name, kv_bytes):
    spec = preset(name)
    for context in (1, 700, 5000, 8192, 8193):
        n_bytes = 0
        for pool in pool_specs(spec):
            n_keys = (context - 1) % pool.chunk + 1 if pool.chunk else min(context, pool.window or context)
            n_readers = len(pool.layers) + len(pool.shared)                     # of one layer's K and V each
            n_bytes += n_keys * pool.token_bytes(kv_bytes) // len(pool.layers) * n_readers
        assert floor_parts(spec, [(3, 1, context)], kv_bytes=kv_bytes)["attention"].bytes == 3 * n_bytes


def test_quantised_weights_cost_less():
    whole, half, quarter = (floor_parts(preset("gemma-3-1b"), [(1, 1, 1)], n_bytes) for n_bytes in (2, 1, 0.5))
    for part in ("linear", "head"):
        assert whole[part].bytes == 2 * half[part].bytes == 4 * quarter[part].bytes > 0
    assert whole["attention"] == quarter["attention"]


def test_rows_add_up():
    spec = preset("gemma-3-1b")
    mixed = floor_parts(spec, [(1, 2048, 2048), (16, 1, 4096)])
    prompt, decode = floor_parts(spec, [(1, 2048, 2048)]), floor_parts(spec, [(16, 1, 4096)])
    assert mixed["attention"] == prompt["attention"] + decode["attention"]
    assert mixed["head"].flops == prompt["head"].flops + decode["head"].flops == 17 * prompt["head"].flops
    assert mixed["head"].bytes == prompt["head"].bytes                          # the weights are read once
    assert floor_parts(spec, [(1, 2048, 2048, 0)])["head"] == Cost()


@pytest.mark.parametrize("row", [(0, 1, 1), (1, 0, 5), (1, 6, 5), (1, 2, 5, 3), (1, 2, 5, -1)])
def test_rows_that_cannot_be_are_refused(row):
    with pytest.raises(ValueError, match=r"a row is .* expected at least 1 sequence"):
        floor(preset("gemma-3-1b"), [row])
