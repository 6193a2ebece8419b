"""tools/measure/kernel/kernel_cases.py: every op has cases, their inputs run, and an output that is wrong is seen."""

from dataclasses import replace
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from measure.kernel import kernel_cases, kernel_inputs
from measure.kernel.kernel_cases import COLD_BYTES, LARGE_BYTES, OPS, KernelCase, cases_of
from measure.kernel.kernel_inputs import Data
from measure.report import BenchError

from engine import cost, cuda_lane, reference
from engine.backend import open_lane
from engine.cuda_lane import CudaLane
from engine.kernels import ops
from engine.models import describe
from engine.models.presets import PRESETS
from engine.trace import OPS as TABLE
from loaders.config import Config
from tests import tiny

BF16 = np.dtype(ml_dtypes.bfloat16)
MORE = ["gemma3", "unified"]            # tiny presets beside the one with all kinds of layers
PLACE_OF_OUT = {"rms_norm": 4, "embed": 3, "moe_gated_linear": 3, "moe_linear": 3, "add_norms": 6, "router_norm": 4,
                "mix_per_layer": 5, "gate_per_layer": 3, "attention_temperature": 3, "sample_with_drafts": 4,
                "relax_drafts": 5, "pick_centroids": 1, "candidate_argmax": 4, "candidate_logits": 4, "layer_norm": 4,
                "add_rows": 3, "place_rows": 3, "pool_rows": 5}         # else 2
# Of engine/kernels/ops.py, what is no op.
ABOUT_SPECS = {"check", "explain", "scratch_size", "vision_scratch_size"}


@pytest.fixture
def tiny_preset(monkeypatch):
    """Presets of a few numbers: one with layers of several families, all kinds of attention and of experts, a softcap,
    inputs of every layer and a tower with bounds; one with a tower with biases, one whose pictures have no tower."""
    first, *others = (describe(Config(config)) for config in (
        tiny.seeing("gemma4-e", {"use_clipped_linears": True}), tiny.flat("gemma4-moe"), tiny.flat("llama4")))
    specs = {"tiny": replace(first, layers=sum((other.layers for other in others), first.layers)),
             **{name: describe(Config(tiny.seeing(name))) for name in MORE}}
    monkeypatch.setattr(kernel_cases, "preset", specs.get)
    return "tiny"


@pytest.fixture(scope="module")
def lane():
    return open_lane("emulated", "auto")


def tiny_cases(preset, ops=None):
    """Of MORE what the first preset has no case of."""
    def of(names):
        return cases_of(names, n_tokens=[1, 5, 20], contexts=[40], batches=[1, 3], ops=ops)
    first = of([preset])
    known = {case.op for case in first}
    return first + [case for case in of(MORE) if case.op not in known]


# --- which cases

def test_every_op_of_the_table_has_cases():
    names = {case.op for case in cases_of(["gemma-4-26b-a4b", "gemma-4-e2b", "gemma-3-4b", "llama-4-scout"])}
    assert names == set(OPS) == set(TABLE) == set(ops.__all__) - ABOUT_SPECS


@pytest.mark.parametrize("preset", PRESETS)
def test_cases_of_every_preset(preset):
    cases = cases_of([preset])
    assert len({(case.name, str(case.shape)) for case in cases}) == len(cases)
    products = {(case.sizes["n_in"], case.sizes["n_out"]) for case in cases if case.op == "linear"}
    assert len(products) >= 4                               # qkv, o, down, head


def test_one_shape_is_one_case():
    labels = [case.label for case in cases_of(["gemma-3-1b"], [1], [1024], [1], ["linear"])]
    assert labels == ["qkv", "o", "down", "head"]           # local and global layers have the same
    labels = [case.label for case in cases_of(["gemma-4-31b"], [1], [1024], [1], ["linear"])]
    assert [label for label in labels if "tower" not in label] == [
        "qkv local", "o local", "qkv global", "o global", "down", "head"]


def test_shapes_are_the_models():
    """Gemma 4 31B, from its card: hidden 5376, 32 heads, 16 KV heads of 256 or 4 of 512 whose v is k."""
    shapes = {case.name: case.sizes for case in cases_of(["gemma-4-31b"], [1], [1024], [1])
              if "tower" not in case.label}
    products = {name: tuple(sizes.values())[1:] for name, sizes in shapes.items() if "linear" in name}
    assert products == {
        "linear qkv local": (5376, 16384), "linear o local": (8192, 5376), "linear qkv global": (5376, 18432),
        "linear o global": (16384, 5376), "linear down": (21504, 5376), "linear head": (5376, 262144, "float32"),
        "gated_linear": (5376, 21504, "gelu_tanh")}
    assert shapes["embed"] == {"n_tokens": 1, "vocab": 262144, "hidden": 5376}
    assert shapes["attention decode global"]["head_dim"] == 512 and shapes["qk_norm_rope_cache global"]["v_is_k"]


def test_towers_have_the_shapes_of_a_picture():
    """Of 280 soft tokens, each of 3 x 3 patches of 16 x 16 x 3 values: Gemma 4 31B, whose tower has 16 heads of 72."""
    shapes = {case.name: case.sizes for case in cases_of(["gemma-4-31b"], ops=["linear", "attention", "gated_linear",
                                                                              "add_rows", "pool_rows", "place_rows"])}
    products = {name: tuple(sizes.values()) for name, sizes in shapes.items() if "linear tower" in name}
    assert products == {
        "linear tower patch": (2520, 768, 1152), "linear tower qkv": (2520, 1152, 3456),
        "linear tower o": (2520, 1152, 1152), "linear tower down": (2520, 4304, 1152),
        "gated_linear tower": (2520, 1152, 4304, "gelu_tanh"), "linear tower projection": (280, 1152, 5376)}
    assert shapes["attention tower"] == {"rows": [(1, 2520, 2520)], "n_heads": 16, "n_kv_heads": 16, "head_dim": 72,
                                         "window": None, "chunk": None, "sees_all": True}
    assert shapes["add_rows"]["n_places"] == 20480 and shapes["pool_rows"]["k"] == 9
    assert shapes["place_rows"] == {"n_tokens": 280, "width": 5376}


def test_pictures_have_no_more_patches_than_a_step_has_tokens():
    for n_tokens, n_patches in ((1, 9), (64, 63), (4096, 2520)):
        (case,) = (case for case in cases_of(["gemma-4-e2b"], [n_tokens], [1024], [1], ["attention"])
                   if case.label == "tower")
        assert case.sizes["rows"] == [(1, n_patches, n_patches)]


def test_a_patch_sees_later_ones(lane):
    """What a case of a tower is compared with: a token in the middle against all keys."""
    sizes = {"rows": [(1, 50, 50)], "n_heads": 2, "n_kv_heads": 2, "head_dim": 16, "window": None, "chunk": None}
    whole, causal = (KernelCase("attention", "", "tiny", {**sizes, **more}).prepare(lane, np.random.default_rng(3))
                     for more in ({"sees_all": True}, {}))
    assert whole.check() < 0.01 and causal.check() < 0.01
    assert whole.cost.flops == 4 * 2 * 16 * 50 * 50 and causal.cost.flops == 4 * 2 * 16 * 50 * 51 // 2
    args, kwargs = OPS["attention"].call(causal.sets[0], sizes)
    whole.launches[0] = lambda: ops.attention(whole.sets[0]["q"], whole.sets[0]["k_pages"], whole.sets[0]["v_pages"],
                                              args[3], **{**kwargs, "out": whole.sets[0]["out"]})
    with pytest.raises(BenchError, match="is off its twin by"):
        whole.check()


def test_prompts_are_longer_than_decode_steps():
    cases = cases_of(["gemma-3-1b"], [8, 512], [1024, 2048], [1, 8], ["attention"])
    assert [(case.label, case.sizes["rows"]) for case in cases if "local" in case.label] == [
        ("prefill local", [(1, 512, 512)]), *(("decode local", [(n, 1, context)])
                                              for n in (1, 8) for context in (1024, 2048))]
    assert cases[0].shape == {"preset": "gemma-3-1b", "n_tokens": 512,
                              "size": "1*512@512, 4 query and 1 KV heads of 256, window 512"}


def test_an_op_that_is_none():
    with pytest.raises(BenchError, match="no op 'gemm', expected one of linear, "):
        cases_of(["gemma-3-1b"], ops=["gemm"])


# --- inputs

@pytest.mark.parametrize("op", OPS)
def test_ops_pass_their_check(lane, tiny_preset, op):
    cases = tiny_cases(tiny_preset, [op])
    assert cases
    for case in cases:
        prepared = case.prepare(lane, np.random.default_rng(1), 2)
        assert len(prepared.sets) == len(prepared.launches) == 2
        assert 0 <= prepared.check() < 0.01
        prepared.launch(3)                                  # of two sets the second
        assert prepared.cost.bytes > 0 and prepared.set_bytes > 0


def broken(lane, op, how):
    """The lane with one op that is not itself."""
    members = {name: getattr(lane, name) for name in dir(lane) if name[0] != "_"}
    table = {name: getattr(ops, name) for name in OPS} | {op: how}
    return SimpleNamespace(**members | {"ops": SimpleNamespace(**table)})


def written(op, args, kwargs):
    """The arrays that an op writes."""
    if op == "add_norm":
        return [args[0], args[7]]
    if op == "qk_norm_rope_cache":
        return [kwargs["out"]]
    if op == "top_logprobs":
        return list(args[3:6])
    if op in ("logit_softcap", "apply_edits"):
        return [args[0]]
    if op == "moe_route":
        return list(args[3])
    if op == "accept_drafts":
        return list(args[5])
    if op == "sample_drafts":
        return list(args[2:4])
    return [kwargs["out"] if "out" in kwargs else args[PLACE_OF_OUT.get(op, 2)]]


@pytest.mark.parametrize("op", OPS)
def test_one_wrong_value_is_seen(lane, tiny_preset, op):
    """In each array that the op writes."""
    case = tiny_cases(tiny_preset, [op])[-1]
    args, kwargs = OPS[op].call(case.prepare(lane, np.random.default_rng(2)).sets[0], case.sizes)
    for i in range(len(written(op, args, kwargs))):
        def wrong(*args, i=i, **kwargs):
            getattr(ops, op)(*args, **kwargs)
            written(op, args, kwargs)[i].reshape(-1)[-1] += 1
        prepared = case.prepare(broken(lane, op, wrong), np.random.default_rng(2))
        with pytest.raises(BenchError, match="is off its twin by"):
            prepared.check()


@pytest.mark.parametrize("op", OPS)
def test_an_op_that_writes_nothing_is_seen(lane, tiny_preset, op):
    prepared = tiny_cases(tiny_preset, [op])[0].prepare(broken(lane, op, lambda *_, **__: None),
                                                        np.random.default_rng(2))
    with pytest.raises(BenchError, match=r"is off its twin|were never written"):
        prepared.check()


def test_values_that_nobody_wrote_are_seen_where_nobody_looks(lane):
    """A large output is compared in places, but no value of it may be missing."""
    case = KernelCase("rms_norm", "", "tiny", {"n_tokens": 200, "hidden": 32})
    skipped = next(i for i in range(200) if i not in kernel_inputs.spread(200, 64))

    def leaves_one(x, weight, eps, weight_offset, out):
        ops.rms_norm(x[:skipped], weight, eps, weight_offset, out[:skipped])
        ops.rms_norm(x[skipped + 1:], weight, eps, weight_offset, out[skipped + 1:])
    prepared = case.prepare(broken(lane, "rms_norm", leaves_one), np.random.default_rng(3))
    with pytest.raises(BenchError, match=r"tiny rms_norm .*: 32 values of out were never written"):
        prepared.check()


@pytest.mark.parametrize("op", ["add_norm", "logit_softcap", "apply_edits"])
def test_what_is_updated_in_place_stays_a_number_however_often(lane, tiny_preset, op):
    """Timing repeats a launch thousands of times on the same arrays."""
    prepared = tiny_cases(tiny_preset, [op])[0].prepare(lane, np.random.default_rng(5))
    for _ in range(3000):
        prepared.launches[0]()
    array = next(iter(prepared.sets[0].values()))
    assert not np.isnan(array.astype(np.float32)).any()
    if op == "add_norm":
        assert np.abs(array.astype(np.float32)).max() < 1e4     # bfloat16 stops growing where a branch is below its ulp


def test_the_cpu_lane_runs_every_op(tiny_preset):
    lane = open_lane("cpu", "auto")
    for case in tiny_cases(tiny_preset):
        prepared = case.prepare(lane, np.random.default_rng(4))
        assert lane.ops is reference and prepared.check() == 0.0
        assert prepared.cost.bytes > 0


def test_costs_are_of_what_is_launched(lane, tiny_preset):
    prepared = tiny_cases(tiny_preset, ["attention"])[-1].prepare(lane, np.random.default_rng(5))
    s, batch = prepared.case.sizes, prepared.sets[0]["batch"]
    q, k, v = (prepared.sets[0][name] for name in ("q", "k_pages", "v_pages"))
    want = cost.attention(q, k, v, batch, scale=1.0, out=q, window=s["window"])
    assert prepared.cost == want and want.flops == 4 * s["n_heads"] * s["head_dim"] * sum(
        n * min(context, s["window"] or context) for n, _, context in s["rows"])


def test_pages_that_a_window_has_passed_are_gone(lane):
    sizes = {"rows": [(2, 1, 100)], "n_heads": 2, "n_kv_heads": 1, "head_dim": 16, "window": 20, "chunk": None}
    prepared = KernelCase("attention", "decode local", "tiny", sizes).prepare(lane, np.random.default_rng(6))
    assert [(held.first, len(held.pages)) for held in prepared.sets[0]["batch"].lists] == [(5, 2), (5, 2)]
    assert prepared.sets[0]["k_pages"].shape == (4, 16, 1, 16)
    assert prepared.check() < 0.01


def test_sets_for_a_cold_launch(lane):
    def prepared(n_tokens, hidden, n_sets=1):
        case = KernelCase("rms_norm", "", "tiny", {"n_tokens": n_tokens, "hidden": hidden})
        return case.prepare(lane, np.random.default_rng(7), n_sets)
    small = prepared(1, 32)
    assert small.n_cold_sets() == 64 and not small.is_cold
    for n_bytes, n_sets in ((LARGE_BYTES, 1), (LARGE_BYTES - 1, 3), (COLD_BYTES / 10, 10)):
        small.cost = replace(small.cost, bytes=n_bytes)
        assert small.n_cold_sets() == n_sets
    for n_bytes, is_cold in ((LARGE_BYTES, True), (COLD_BYTES, True), (COLD_BYTES - 1, False)):
        small.cost = replace(small.cost, bytes=n_bytes)     # there is one set
        assert small.is_cold == is_cold
    small.cost = replace(small.cost, bytes=COLD_BYTES / 10)
    small.lane = SimpleNamespace(memory_bytes=lambda: 5 * small.set_bytes)
    assert small.n_cold_sets() == 5                         # the one it has, and four in 80 % of what is free
    assert len(prepared(1, 32, None).sets) == 64


def test_large_arrays_are_random_throughout(lane, monkeypatch):
    monkeypatch.setattr(kernel_inputs, "FEW", 100)
    monkeypatch.setattr(kernel_inputs, "POOL", 997)
    with Data(lane, np.random.default_rng(8)) as data:
        x, words = np.asarray(data.normal((70, 64), 0.02)).astype(np.float64), data.words(5000)
    assert len({row.tobytes() for row in x}) == 70
    assert abs(x.mean()) < 0.003 and 0.018 < x.std() < 0.022
    assert len(np.unique(words)) == 997


def test_ops_on_a_gpu(gpu, tiny_preset, monkeypatch):
    """On the stand-in: large arrays pass through pinned memory, nothing runs on the wrong stream."""
    monkeypatch.setattr(cuda_lane, "LOADING_BYTES", 1 << 12)
    monkeypatch.setattr(kernel_inputs, "FEW", 100)
    lane = CudaLane(0, ops, BF16)
    with Data(lane, np.random.default_rng(9)) as data:
        for case in tiny_cases(tiny_preset, ["linear", "attention", "add_norm", "sample", "apply_edits"]):
            assert case.prepare(lane, data.rng, 2, data).check() < 0.01
