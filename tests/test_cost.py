"""engine/cost.py: it says what the headers of cuda/*.cu say, and answers for every op from shapes alone. What the
checker counts is held against it in tests/kernels; whole steps in tests/test_floors.py."""

import ast
import inspect
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import cost, kernel_cost, reference
from engine.backend import HostLane
from engine.batch import PagedBatch
from engine.config import EngineConfig
from engine.core import Core
from engine.cost import Ceilings, Cost, floor_parts, visible
from engine.kernels import ops, paged
from engine.kernels.sampling import N_BINS
from engine.kernels.source import BF16, Source, folder
from engine.kv_cache import PageList
from engine.models import describe
from engine.sampler import LogitEdits, SamplingBatch
from engine.sampling_params import SamplingParams
from engine.tasks import Probe
from engine.text_edits import TextEdits
from engine.trace import OPS, traced
from loaders.config import Config
from loaders.safetensors import Checkpoint
from tests.kernels.declared import traffic_line

ENTRIES = [(path.name, entry) for path in sorted(folder().glob("*.cu")) for entry in Source.load(path.name).entries]


def shaped(*shape, dtype=BF16):
    """What has a shape and a dtype, and no memory to speak of."""
    return np.broadcast_to(np.zeros((), dtype), shape)


# --- kernels

@pytest.mark.parametrize("file, entry", ENTRIES)
def test_the_header_and_the_function_agree(file, entry):
    line = traffic_line(file, entry)
    names = {node.id for node in ast.walk(ast.parse(line)) if isinstance(node, ast.Name)} - {"N_BINS"}
    function = getattr(kernel_cost, f"{entry}_cost", None)
    assert function, f"engine/kernel_cost.py has no {entry}_cost"
    rng = np.random.default_rng(len(line))
    for _ in range(5):
        sizes = {name: int(rng.integers(2)) if name.startswith("has_") else int(rng.integers(1, 300_000))
                 for name in sorted(names)}
        got = function(**sizes)
        assert got.traffic_bytes == eval(line, {"N_BINS": N_BINS}, sizes)
        assert got.bytes >= 0 and got.extra_bytes >= 0 and got.flops >= 0


# --- ops

def test_every_op_has_a_cost_that_takes_its_arguments():
    assert set(cost.OPS) == set(OPS)
    for name, function in cost.OPS.items():
        op = inspect.signature(getattr(ops, name)).parameters.values()
        assert [(p.name, p.kind) for p in inspect.signature(function).parameters.values()] == \
            [(p.name, p.kind) for p in op], name


def test_of_an_op_by_name():
    x, weight = shaped(3, 16), shaped(16)
    assert cost.of("rms_norm", (x, weight), {"eps": 1e-6, "weight_offset": 0.0, "out": x}) == Cost(2 * 7 * 16)
    with pytest.raises(ValueError, match=r"no cost of an op 'attend', expected one of accept_drafts, "):
        cost.of("attend", ())


def test_a_product_counts_two_operations_a_weight_and_token():
    got = cost.linear(shaped(5, 256), shaped(96, 256), shaped(5, 96), None, residual=shaped(5, 96))
    assert got == Cost(2 * (96 * 256 + 5 * 256 + 2 * 5 * 96), 0, 2 * 5 * 256 * 96)
    gated = cost.gated_linear(shaped(5, 256), shaped(96, 256), shaped(5, 48), None)
    assert gated.flops == got.flops and gated.bytes == 2 * (96 * 256 + 5 * 256 + 5 * 48)
    assert cost.linear(shaped(0, 256), shaped(96, 256), shaped(0, 96), None) == Cost()
    split = cost.linear(shaped(1, 21504), shaped(5376, 21504), shaped(1, 5376), None)
    assert 0 < split.extra_bytes < 0.05 * split.bytes


def test_float32_arrays_count_in_full_and_leave_no_partial_sums():
    half, full = (cost.linear(shaped(1, 21504, dtype=dtype), shaped(5376, 21504, dtype=dtype),
                              shaped(1, 5376, dtype=dtype), None) for dtype in (BF16, np.float32))
    assert full.bytes == 2 * half.bytes and full.extra_bytes == 0 < half.extra_bytes and full.flops == half.flops
    half, full = (cost.add_norm(*4 * [shaped(3, 16, dtype=dtype)], 1e-6, 0.0, None, None)
                  for dtype in (BF16, np.float32))
    assert full.bytes == 2 * half.bytes


class Routes:
    """Of so many tokens and choices, as far as their cost needs them."""

    def __init__(self, n_tokens, n_chosen, begins=None):
        self.experts, self.begins = shaped(n_tokens, n_chosen, dtype=np.int32), begins


TABLE, ROWS, WEIGHT, ROUTES = shaped(100, 16), shaped(3, 16), shaped(16), Routes(3, 2)


@pytest.mark.parametrize("got, n_bytes", [
    (cost.embed(TABLE, shaped(5, dtype=np.int32), 1.0, None), 4 * 5 + 2 * (5 + 5) * 16),
    (cost.embed(ROWS, shaped(5, dtype=np.int32), 1.0, None), 4 * 5 + 2 * (3 + 5) * 16),        # a table of three rows
    (cost.select_rows(TABLE, shaped(4, dtype=np.int32), None), 4 * 4 + 2 * (4 + 4) * 16),
    (cost.select_rows(ROWS, shaped(4, dtype=np.int32), None), 4 * 4 + 2 * (3 + 4) * 16),
    (cost.select_rows(shaped(9, 16, dtype=np.float32), shaped(4, dtype=np.int32), None), 4 * 4 + 4 * (4 + 4) * 16),
    (cost.rms_norm(ROWS, None, 1e-6, 0.0, None), 2 * 2 * 3 * 16),
    (cost.add_norm(ROWS, ROWS, None, WEIGHT, 1e-6, 0.0, None, ROWS), 2 * (4 * 3 + 1) * 16),
    (cost.add_norm(ROWS, ROWS, WEIGHT, WEIGHT, 1e-6, 0.0, shaped(1), ROWS), 2 * ((4 * 3 + 2) * 16 + 1)),
    (cost.rope_angles(shaped(5, dtype=np.int32), shaped(8, dtype=np.float32), None), 4 * 5 + 4 * 8 + 2 * 4 * 5 * 8),
    (cost.logit_softcap(shaped(3, 50, dtype=np.float32), 30.0), 2 * 4 * 3 * 50),
    (cost.rope_angles(shaped(5, 2, dtype=np.int32), shaped(8, dtype=np.float32), None),
     2 * 4 * 5 + 4 * 8 + 2 * 4 * 5 * 8),
    (cost.place_rows(ROWS, *2 * [shaped(3, dtype=np.int32)], TABLE), 2 * 4 * 3 + 2 * (3 + 3) * 16),
    (cost.place_rows(ROWS, *2 * [shaped(5, dtype=np.int32)], TABLE), 2 * 4 * 5 + 2 * (3 + 5) * 16),   # some twice
    (cost.add_rows(ROWS, TABLE, shaped(3, 1, dtype=np.int32), ROWS), 4 * 3 + 2 * (3 + 3 + 3) * 16),
    (cost.add_rows(TABLE, TABLE, shaped(100, 2, dtype=np.int32), TABLE), 4 * 200 + 2 * (100 + 100 + 20) * 16),  # 10²
    (cost.pool_rows(TABLE, shaped(11, 9, dtype=np.int32), 1.0, WEIGHT, WEIGHT, None),
     4 * 99 + 2 * (99 + 11 + 2) * 16),
    (cost.pool_rows(TABLE, shaped(6, 16, dtype=np.int32), 1.0, None, None, None), 4 * 96 + 2 * (96 + 6) * 16),
    (cost.clamp(ROWS, shaped(2), TABLE, 0), 2 * (2 * 3 * 16 + 2)),
    (cost.add_bias(ROWS, WEIGHT, ROWS, "gelu_tanh"), 2 * (2 * 3 + 1) * 16),
    (cost.add_bias(ROWS, WEIGHT, ROWS, None, ROWS), 2 * (3 * 3 + 1) * 16),
    (cost.layer_norm(ROWS, WEIGHT, WEIGHT, 1e-6, ROWS), 2 * (2 * 3 + 2) * 16),
    (cost.linear(ROWS, shaped(32, 16), shaped(3, 32, dtype=np.float32)), 2 * 16 * (32 + 3) + 4 * 3 * 32),
    (cost.scale_rows(ROWS, shaped(3, 2, dtype=np.float32), shaped(6, 16)), 2 * (3 + 6) * 16 + 4 * 6),
    (cost.gate_per_layer(shaped(4, 8), shaped(4, 40), 2, shaped(4, 8)), 2 * 3 * 4 * 8),        # 8 of 40 inputs a token
    (cost.mix_per_layer(*2 * [shaped(3, 40)], shaped(8), 0.7, 1e-6, shaped(3, 40)), 2 * (3 * 3 * 40 + 8)),
    (cost.add_norms(ROWS, WEIGHT, ROWS, WEIGHT, 1e-6, 0.0, ROWS), 2 * (3 * 3 + 2) * 16),
    (cost.router_norm(ROWS, WEIGHT, 0.02, 1e-6, ROWS), 2 * (2 * 3 + 1) * 16),
    (cost.attention_temperature(shaped(5, dtype=np.int32), 0.1, 8192, None), 2 * 4 * 5),
    (cost.moe_route(shaped(3, 8), WEIGHT[:8], "softmax", ROUTES), 2 * 3 * 8 + 2 * 6 + 8 * 6 + 8 * 6 + 4 * 9),
    (cost.moe_route(shaped(3, 8), None, "sigmoid", ROUTES), 2 * 3 * 8 + 8 * 6 + 8 * 6 + 4 * 9),
    (cost.moe_route(shaped(9, 8), WEIGHT[:8], "softmax", Routes(9, 2)), 2 * 9 * 8 + 2 * 8 + 16 * 18 + 4 * 9),
    (cost.moe_combine(shaped(6, 16, dtype=np.float32), shaped(3, 2, dtype=np.float32), ROWS),
     4 * 6 * 16 + 4 * 6 + 2 * 3 * 16),
    (cost.moe_combine(shaped(2, 16, dtype=np.float32), None, ROWS[:1]), 4 * 2 * 16 + 2 * 16),
    (cost.moe_combine(shaped(0, 16, dtype=np.float32), None, ROWS[:0]), 0),
    (cost.pick_centroids(shaped(3, 64, dtype=np.float32), shaped(3, 5, dtype=np.int32)), 4 * 3 * (64 + 5)),
    (cost.accept_drafts(*[shaped(20, dtype=np.int32)] * 2, None, None, shaped(4, dtype=np.int32), None),
     4 * (20 + 16) + 32 * 4 + 4),
])
def test_bytes_by_hand(got, n_bytes):
    assert (got.bytes, got.extra_bytes) == (n_bytes, 0)


class OnDevice(np.ndarray):
    """An array that is not read."""


@pytest.mark.parametrize("on_device, n_active", [(False, 4), (True, 5)])       # 5.47 are expected: 8 (1 - (6/8)^4)
def test_products_by_expert_read_the_experts_in_use(on_device, n_active):
    """4 tokens of 16 values, 2 of 8 experts each, 4 of them in use, 12 wide."""
    begins = np.array([0, 0, 3, 3, 5, 5, 6, 8, 8], np.int32)
    routes = Routes(4, 2, begins.view(OnDevice) if on_device else begins)
    x, lists = shaped(4, 16), 4 * (8 + 9)
    up = cost.moe_gated_linear(x, shaped(8, 24, 16), routes, shaped(8, 12), False, "silu", False)
    assert up == Cost(2 * 16 * (24 * n_active + 4) + 2 * 8 * 12, lists, 2 * 8 * 16 * 24)
    down = cost.moe_linear(shaped(8, 12), shaped(8, 16, 12), routes, shaped(8, 16, dtype=np.float32), False)
    assert down == Cost(2 * 12 * (16 * n_active + 8) + 4 * 8 * 16, lists, 2 * 8 * 12 * 16)


@pytest.mark.parametrize("dtype, itemsize", [(BF16, 2), (np.float32, 4)])
@pytest.mark.parametrize("n_rows, n_distinct", [(3, 24), (60, 64)])             # of a vocabulary of 64 tokens
def test_candidates_are_a_product_with_rows_of_the_head(n_rows, n_distinct, dtype, itemsize):
    """Of 16 centroids of 4 tokens each row takes 2; a row of the head has 32 values."""
    arrays = (shaped(n_rows, 32, dtype=dtype), shaped(64, 32, dtype=dtype), shaped(16, 4, dtype=np.int32),
              shaped(n_rows, 2, dtype=np.int32))
    n_bytes = n_rows * (itemsize * 32 + 4 * 2) + n_distinct * (itemsize * 32 + 4)
    flops = 2 * n_rows * 8 * 32
    assert cost.candidate_argmax(*arrays, None) == Cost(n_bytes + 4 * n_rows, 24 * n_rows * (dtype == BF16), flops)
    logits = shaped(n_rows, 64, dtype=np.float32)
    assert cost.candidate_logits(*arrays, logits) == Cost(n_bytes + 4 * 64 * n_rows, 4 * 8 * n_rows, flops)


@pytest.mark.parametrize("v_is_k, n_in", [(False, 4 + 2 + 2), (True, 4 + 2)])
def test_rotation_reads_the_heads_that_there_are(v_is_k, n_in):
    """3 tokens, 4 and 2 heads of 16, 4 pairs of each turned: qkv, q out, K and V, two norms, angles, slots."""
    pages = shaped(7, 8, 2, 16)
    got = cost.qk_norm_rope_cache(shaped(3, n_in * 16), WEIGHT, WEIGHT, shaped(3, 2, 4, dtype=np.float32),
                                  shaped(3, dtype=np.int32), pages, pages, n_heads=4, v_norm=False, v_is_k=v_is_k,
                                  eps=1e-6, weight_offset=0.0, out=shaped(3, 64))
    assert got == Cost(2 * 16 * (3 * (n_in + 4 + 2 * 2) + 2) + 3 * 2 * 4 * 4 + 4 * 3)


def test_queries_alone_read_and_write_themselves():
    """3 tokens of 4 heads, without rotation: q in and out, one norm."""
    got = cost.qk_norm_rope_cache(shaped(3, 64), WEIGHT, *5 * [None], n_heads=4, v_norm=False, v_is_k=False, eps=1e-6,
                                  weight_offset=0.0, out=shaped(3, 64))
    assert got == Cost(2 * 16 * (3 * (4 + 4) + 1))


@given(n_query=st.integers(0, 40), before=st.integers(0, 60), window=st.none() | st.integers(1, 30),
       chunk=st.none() | st.integers(1, 30))
@settings(max_examples=200, deadline=None)
def test_what_tokens_see(n_query, before, window, chunk):
    context = before + n_query
    seen = [{j for j in range(i + 1) if i - j < (window or 999) and (chunk is None or j // chunk == i // chunk)}
            for i in range(before, context)]
    assert visible(n_query, context, window, chunk) == (len(set().union(*seen)), sum(map(len, seen)))


@pytest.mark.parametrize("see", [{}, {"window": 50}, {"chunk": 64}, {"window": 30, "chunk": 48}])
@pytest.mark.parametrize("rows", [[(0, 1, 1)], [(0, 1, 900), (1, 2, 70)], [(0, 200, 500), (200, 201, 3000)]])
def test_attention(rows, see):
    n_heads, n_kv_heads, head_dim, n_tokens = 8, 2, 64, rows[-1][1]
    q, pages = shaped(n_tokens, n_heads * head_dim), shaped(400, 16, n_kv_heads, head_dim)
    batch = PagedBatch([PageList([])] * len(rows), None, rows, 16)
    got = cost.attention(q, pages, pages, batch, scale=1.0, out=q, scratch=None, **see)
    seen = [visible(end - begin, context, see.get("window"), see.get("chunk")) for begin, end, context in rows]
    n_keys, n_pairs = (sum(column) for column in zip(*seen, strict=True))
    assert got.bytes == 2 * 2 * head_dim * (n_tokens * n_heads + n_keys * n_kv_heads)
    assert got.flops == 4 * n_heads * head_dim * n_pairs
    work = paged.plan(rows, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, **see)
    is_in_parts = any((items[:, 5] > 1).any() for items in work)
    n_lists = 4 * (sum(items.size for items in work))
    assert (got.extra_bytes - n_lists > 2 * 4 * n_heads * head_dim) == is_in_parts
    full = cost.attention(q.astype(np.float32), pages, pages, batch, scale=1.0, out=q, scratch=None, **see)
    assert full == Cost(2 * got.bytes, 0, got.flops)


@pytest.mark.parametrize("see, n_keys, n_pages", [({}, 40, 3), ({"window": 10}, 10, 2), ({"window": 8}, 8, 1),
                                                  ({"chunk": 32}, 8, 1)])
@pytest.mark.parametrize("is_image", [False, True])
def test_attention_reads_its_lists(see, n_keys, n_pages, is_image):
    """One token, the last of 40: an item of work and the number of items, the pages that it sees, where they begin,
    where the sequence and its queries end; of an image the last position it sees, as far as that is there."""
    rows, last_visible = [(0, 1, 40)], np.array([60], np.int32) if is_image else None
    q, pages = shaped(1, 8 * 64), shaped(4, 16, 2, 64)
    batch = PagedBatch([PageList([])], None, rows, 16, last_visible)
    work = paged.plan(rows, n_heads=8, n_kv_heads=2, head_dim=64, last_visible=last_visible, **see)
    (items,) = [items for items in work if len(items)]
    assert len(items) == 1 and items[0, 5] == 1
    got = cost.attention(q, pages, pages, batch, scale=1.0, out=q, **see)
    assert got.extra_bytes == 4 * (items.size + 1 + n_pages + 1 + 1 + 2 + is_image)
    assert got.flops == 4 * 8 * 64 * n_keys


@pytest.mark.parametrize("context, n_pages", [(16, 1), (17, 2), (32, 2), (33, 3)])
def test_attention_reads_no_page_behind_the_last_position(context, n_pages):
    q, pages, rows = shaped(1, 8 * 64), shaped(4, 16, 2, 64), [(0, 1, context)]
    n_items = paged.plan(rows, n_heads=8, n_kv_heads=2, head_dim=64).decode.size
    got = cost.attention(q, pages, pages, PagedBatch([PageList([])], None, rows, 16), scale=1.0, out=q)
    assert got.extra_bytes == 4 * (n_items + 1 + n_pages + 1 + 1 + 2)


def test_attention_in_parts_writes_them_and_counts_them():
    """A sum, a largest and a total of each head and part, written and read, and a counter of each KV head."""
    rows, q, pages = [(0, 1, 3000)], shaped(1, 8 * 64), shaped(4, 16, 2, 64)
    items = paged.plan(rows, n_heads=8, n_kv_heads=2, head_dim=64).decode
    assert items[0, 5] == len(items) > 1
    got = cost.attention(q, pages, pages, PagedBatch([PageList([])], None, rows, 16), scale=1.0, out=q)
    n_lists = items.size + 1 + -(-3000 // 16) + 1 + 1 + 2
    assert got.extra_bytes == 2 * 4 * len(items) * 8 * (64 + 2) + 4 * (n_lists + 2 * 2)


@pytest.mark.parametrize(("see", "is_whole", "n_pairs"), [
    ({}, False, 1 + 2 + 3 + 4 + 6 * 10), ({"window": 3}, False, 1 + 2 + 3 + 3 + 8 + 7 + 6 + 5 + 4 + 3),
    ({"window": 3}, True, 1 + 2 + 3 + 3 + 8 + 7 + 4 * 6)])
def test_attention_to_all_of_an_image_counts_it(see, is_whole, n_pairs):
    """An image of 6 tokens after 4 others: each sees the later ones, and the earlier ones unless a window cuts them."""
    q, pages = shaped(10, 4 * 64), shaped(400, 16, 2, 64)
    last, first = (np.array([0, 1, 2, 3, *6 * [of_image]], np.int32) for of_image in (9, 4))
    batch = PagedBatch([PageList([])], None, [(0, 10, 10)], 16, last, first if is_whole else None)
    got = cost.attention(q, pages, pages, batch, scale=1.0, out=q, **see)
    assert got.flops == 4 * 4 * 64 * n_pairs


def test_attention_counts_images_of_each_sequence():
    """Positions 3 and 4 of one sequence, 6 to 9 of another, whose last three are of an image that goes on to 12."""
    q, pages = shaped(6, 4 * 64), shaped(400, 16, 2, 64)
    last = np.array([3, 4, 6, *3 * [12]], np.int32)
    batch = PagedBatch([PageList([])] * 2, None, [(0, 2, 5), (2, 6, 10)], 16, last)
    assert cost.attention(q, pages, pages, batch, scale=1.0, out=q).flops == 4 * 4 * 64 * (4 + 5 + 7 + 3 * 10)


def test_sampling_reads_the_logits_once_and_again():
    logits, rows = shaped(2, 50_000, dtype=np.float32), [(SamplingParams(top_k=5), 0, 0)] * 2
    batch = SamplingBatch.build(rows)
    got = cost.sample(logits, batch, shaped(2, dtype=np.int32), None)
    assert got.bytes == logits.nbytes + 2 * 4 + sum(column.nbytes for column in vars(batch).values())
    assert 3 * logits.nbytes < got.traffic_bytes < 3.5 * logits.nbytes
    tops = [cost.top_logprobs(logits, None, n, None, None, None, None) for n in (0, 20)]
    assert [round(top.traffic_bytes / logits.nbytes) for top in tops] == [2, 3]
    assert [top.bytes - logits.nbytes for top in tops] == [2 * 8, 2 * (8 + 20 * 8)]       # of the chosen, of each of 20
    drafts = cost.sample_drafts(logits, batch, None, logits)
    tokens = cost.sample_with_drafts(logits, batch, *3 * [None])
    assert drafts.bytes == got.bytes + logits.nbytes == tokens.bytes - 2 * 4         # a draft each
    assert [round(op.traffic_bytes / logits.nbytes) for op in (drafts, tokens)] == [5, 5]
    places = cost.sample_drafts(logits, batch, None, logits, positions=1), cost.sample_with_drafts(
        logits, batch, *3 * [None], prob_rows=1)
    assert [more.bytes - op.bytes for more, op in zip(places, (drafts, tokens), strict=True)] == 2 * [2 * 4]
    relaxed = cost.relax_drafts(logits, None, None, 10, 0.6, None)
    assert relaxed.bytes == logits.nbytes + 2 * 9 and 2 * logits.nbytes < relaxed.traffic_bytes < 2.5 * logits.nbytes
    edits = LogitEdits.build(TextEdits(SamplingParams(repetition_penalty=1.1), prompt=[1, 2, 3]).rows() * 2)
    assert cost.apply_edits(logits, edits) == Cost(4 + 6 * 26 + 2 * 12)


# --- a step, op by op

@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_the_ops_of_a_step_do_the_work_of_its_floor(checkpoints, family):
    """The last of a prompt's tokens, computed alone: its products and its attention are the floor's, to the operation.
    Bytes are more by what ops hand to each other, and by norms."""
    path, total, products = checkpoints[family], {}, ("linear", "gated_linear", "attention")

    @contextmanager
    def around(name, args, kwargs):
        total[name] = total.get(name, Cost()) + cost.of(name, args, kwargs)
        yield

    spec, lane = describe(Config.load(path)), HostLane("cpu", traced(reference, around), np.float32)
    with Checkpoint.open(path) as checkpoint:
        core = Core.open(spec, EngineConfig(max_seq_len=64, max_seqs=2, max_batch_tokens=32), lane, checkpoint)
    probe = Probe(33, 0, spec, False)
    core.loop.submit(list(range(8, 41)), probe)
    core.loop.step()
    total.clear()
    core.loop.step()
    assert probe.is_finished
    least = floor_parts(spec, [(1, 1, 33)], weight_bytes=4, kv_bytes=4)
    flops = sum(part.flops for part in least.values())
    assert sum(total[name].flops for name in products) == sum(op.flops for op in total.values()) == flops
    q_and_out = sum(2 * 4 * layer.attention.q_width for layer in spec.layers)
    assert total["attention"].bytes - q_and_out == least["attention"].bytes
    n_bytes = sum(part.bytes for part in least.values())
    assert n_bytes < sum(op.bytes for op in total.values()) < 1.5 * n_bytes


def test_explain_says_the_least_work(llm):
    length = llm.max_seq_len
    least = [sum(floor_parts(llm.spec, [row], weight_bytes=4, kv_bytes=4, drops=True).values(), Cost())
             for row in ((1, 1, length), (1, length, length))]
    for what, part in zip((f"a token after {length - 1}", f"a prompt of {length} tokens"), least, strict=True):
        assert f"least work, {what}: {part.bytes / 1e9:.3g} GB and {part.flops / 1e9:.3g} GFLOP" in llm.explain()


# --- roofline

def test_costs_add_up():
    assert Cost(1, 2, 3) + Cost(10, 20, 30) == Cost(11, 22, 33)
    assert Cost(1, 2, 3).traffic_bytes == 3
    assert Cost(2, 100, 8).intensity == 4
    assert Cost().intensity == float("inf")


@pytest.mark.parametrize("flops, time_s, bound", [(0, 2, "memory"), (50, 2, "memory"), (99, 3.96, "compute")])
def test_the_higher_of_two_times_bounds(flops, time_s, bound):
    ceilings, work = Ceilings(100, 25, "given"), Cost(200, 1000, flops)
    assert work.time_s(ceilings) == time_s and work.bound(ceilings) == bound
