"""The torch peers of bench.py against, where torch is installed: they compute what ours computes, on our memory."""

from argparse import Namespace
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from measure.cases import parse_case
from measure.kernel.kernel_cases import KernelCase
from measure.models import Model
from measure.peer import against_model, peer_attention, torch_arrays, turns
from measure.peer.peer_models import MODELS, TorchPeer
from measure.peer.peers import PEERS
from measure.random_weights import RandomCheckpoint
from measure.report import Report

from engine.backend import open_lane
from engine.models import describe
from loaders.config import Config
from loaders.safetensors import Checkpoint
from tests import tiny

torch = pytest.importorskip("torch")
torch_model = pytest.importorskip("measure.peer.torch_model")
CPU = open_lane("cpu", "auto")


# --- arrays

@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int32])
def test_a_tensor_is_the_arrays_own_memory(dtype):
    array = np.arange(6).astype(dtype).reshape(2, 3)
    tensor = torch_arrays.as_torch(array)
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
    tensor[0, 0] = 7
    assert array[0, 0] == 7
    assert torch_arrays.as_numpy(tensor).tolist() == [[7, 1, 2], [3, 4, 5]]


def test_an_error_is_one_line():
    assert torch_arrays.why(RuntimeError("first\nsecond")) == "RuntimeError: first"
    assert len(torch_arrays.why(ValueError("long " * 1000))) < 300


# --- kernels

def attention(rows, head_dim=32, window=None, **sizes):
    return KernelCase("attention", "", "none", {"rows": rows, "n_heads": 4, "n_kv_heads": 2, "head_dim": head_dim,
                                                "window": window, "chunk": None, **sizes})


def experts(op, **sizes):
    return KernelCase(op, "", "none", {"n_tokens": 5, "n_experts": 6, "experts_per_token": 2, "n_in": 64, "n_out": 48,
                                       "in_out": False, **sizes})


def sample(**sizes):
    return KernelCase("sample", "", "none", {"n_rows": 4, "vocab": 512, **sizes})


CASES = [
    KernelCase("linear", "", "none", {"n_tokens": 3, "n_in": 64, "n_out": 48}),
    KernelCase("gated_linear", "", "none", {"n_tokens": 3, "n_in": 64, "intermediate": 40}),
    KernelCase("gated_linear", "", "none", {"n_tokens": 3, "n_in": 64, "intermediate": 40, "activation": "silu"}),
    experts("moe_gated_linear", by_pair=False, activation="gelu_tanh"),
    experts("moe_gated_linear", by_pair=True, activation="silu", in_out=True, experts_per_token=1),
    experts("moe_linear"), experts("moe_linear", in_out=True),
    KernelCase("rms_norm", "", "none", {"n_tokens": 3, "hidden": 64}),
    KernelCase("add_norm", "", "none", {"n_tokens": 3, "hidden": 64, "layer_scalar": True}),
    KernelCase("add_norm", "", "none", {"n_tokens": 3, "hidden": 64, "layer_scalar": False}),
    attention([(3, 1, 40)]), attention([(3, 1, 40)], window=20), attention([(2, 40, 40)]),
    attention([(1, 70, 70)], window=20), attention([(1, 12, 12)], window=20), attention([(1, 20, 20)], head_dim=512),
    attention([(2, 40, 40)], head_dim=72, sees_all=True),
    sample(temperature=0.0, top_k=0, top_p=1.0), sample(temperature=0.7, top_k=8, top_p=0.9),
]


@pytest.fixture
def uncompiled(monkeypatch):
    """torch.compile passes functions through: what they compute is the same."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_peers_compute_what_the_op_does(case, uncompiled):
    served = [peer for peer in PEERS if peer.op == case.op and not peer.refuses(case) and not peer.available(CPU)]
    assert served
    prepared = case.prepare(CPU, np.random.default_rng(0), 2)
    with torch_arrays.torch_running(CPU):
        for peer in served:
            launches = peer.prepare(prepared)
            error, bound = peer.compare(prepared, launches[0])
            assert len(launches) == 2 and error <= bound, peer
            damaged, bound = peer.compare(prepared, lambda launch=launches[0]: damage(launch()))
            assert damaged > bound, peer


def test_sdpa_by_a_backend_that_is_named():
    case = attention([(1, 70, 70)], window=20)
    prepared = case.prepare(CPU, np.random.default_rng(0), 1)
    sdpa = next(peer for peer in PEERS if peer.name == "sdpa")
    with torch_arrays.torch_running(CPU):
        launch, = peer_attention.sdpa(prepared, "MATH")
        error, bound = sdpa.compare(prepared, launch)
        assert error <= bound
        launch, = peer_attention.sdpa(prepared, "CUDNN_ATTENTION")
        with pytest.raises(RuntimeError):
            launch()


def damage(output):
    """The output with one wrong row."""
    output = output.clone()
    output[0] = output[0].roll(1) if output.is_floating_point() and output.dim() > 1 else 511 - output[0]
    return output


def test_the_sets_of_a_case_are_launched_each(uncompiled):
    case = KernelCase("linear", "", "none", {"n_tokens": 2, "n_in": 32, "n_out": 16})
    prepared = case.prepare(CPU, np.random.default_rng(0), 3)
    linear = next(peer for peer in PEERS if (peer.name, peer.op) == ("torch", "linear"))
    with torch_arrays.torch_running(CPU):
        outputs = [torch_arrays.as_numpy(launch()) for launch in linear.prepare(prepared)]
    for arrays, output in zip(prepared.sets, outputs, strict=True):
        np.testing.assert_allclose(output, arrays["x"] @ arrays["weight"].T, rtol=1e-4, atol=1e-6)


# --- models

FAMILIES = {"gemma3": tiny.flat("gemma3"), "gemma4": tiny.flat("gemma4"),
            "gemma3 softcap": tiny.flat("gemma3", final_logit_softcapping=2.0, rope_scaling=None),
            "gemma4 untied": tiny.flat("gemma4", tie_word_embeddings=False, attention_k_eq_v=False,
                                       num_global_key_value_heads=2)}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name, attend", [*((name, "sdpa") for name in FAMILIES), ("gemma3", "matmul"),
                                          ("gemma3", "flex"), ("gemma4", "matmul"), ("gemma4", "flex")])
def test_logits_of_prompt_and_decode_are_ours(name, attend, tmp_path):
    """Whole prompts and decode steps over several windows, of two sequences: within 2e-4 of max |logit|."""
    config = FAMILIES[name]
    spec = describe(Config(config))
    case = parse_case("decode=2*1@48")
    with Checkpoint.open(tiny.write_checkpoint(tmp_path / "checkpoint", config)) as checkpoint:
        core, _ = against_model.open_core("tiny", spec, CPU, checkpoint, [case], 16, Report(), 0)
    peer = TorchPeer(core, case, 64, attend)
    error = against_model.error_of(peer, core, case, np.random.default_rng(0))
    assert error <= 2e-4 == against_model.bound_of(CPU, spec)


def test_the_model_reads_our_weights_where_they_are():
    spec = describe(Config(FAMILIES["gemma4"]))
    case = parse_case("decode=1*1@40")
    core, _ = against_model.open_core("tiny", spec, CPU, RandomCheckpoint(spec), [case], 16, Report(), 0)
    peer = TorchPeer(core, case, 64)
    assert peer.model.layers[2].qkv.data_ptr() == core.weights.layers[2].qkv.ctypes.data
    core.weights.layers[2].down *= 1.5                             # now both are another model, the same
    assert against_model.error_of(peer, core, case, np.random.default_rng(0)) <= 2e-4
    peer.model.layers[2].down = peer.model.layers[2].down.roll(1, 0)
    assert against_model.error_of(peer, core, case, np.random.default_rng(0)) > 2e-4


@pytest.mark.parametrize("text", ["decode=2*1@40", "prefill=2*24"])
def test_a_case_is_measured_end_to_end(text, monkeypatch):
    monkeypatch.setattr(turns, "SETTLE_S", 0)
    spec, case, args = describe(Config(FAMILIES["gemma3"])), parse_case(text), Namespace(repeats=2, seed=0, tokens=3)
    report = Report()
    core, _ = against_model.open_core("tiny", spec, CPU, RandomCheckpoint(spec), [case], against_model.steps_of(args),
                                      report, 0)
    assert against_model.measure_case(core, Model("tiny", spec, None, {}), case, MODELS["torch"], args, report)
    row, = report.rows
    assert not report.skipped and row.stats["error"].median <= 2e-4
    assert all(len(row.stats[side].samples) == 2 for side in ("ours", "theirs"))


def test_every_sample_of_torch_decodes_at_the_same_contexts():
    spec, case = describe(Config(FAMILIES["gemma3"])), parse_case("decode=2*1@40")
    core, _ = against_model.open_core("tiny", spec, CPU, RandomCheckpoint(spec), [case], 3, Report(), 0)
    peer, contexts = TorchPeer(core, case, 64), []
    decode = peer.model.decode

    def noted(ids, position):
        contexts.append(position.item() + 1)
        return decode(ids, position)
    peer.model.decode = noted
    peer.ready(3)
    contexts.clear()
    peer.samples(3)
    assert contexts == 3 * [40, 41, 42]


@pytest.mark.parametrize("family, words", [
    ("gemma3", None), ("gemma4", None), ("gemma4-moe", "experts (layer 0)"),
    ("gemma4-e", "per-layer inputs, K and V of another layer (layer 3)"),
    ("llama4", "norms that round before the weight, no norms on outputs (layer 0), chunked attention (layer 0), "
               "interleaved RoPE (layer 0), QK norm without weights (layer 0), a SiLU gate (layer 0), "
               "experts (layer 1), attention without RoPE (layer 3), a temperature (layer 3), no QK norm (layer 3)")])
def test_a_model_that_torch_has_no_branch_for_is_refused_by_name(family, words):
    spec = describe(Config(tiny.flat(family)))
    assert torch_model.why_not(spec) == words
    first, *rest = spec.layers
    unknown = replace(spec, layers=(replace(first, mlp=object()), *rest)) if words is None else spec
    assert torch_model.why_not(unknown)


def test_what_torch_has_no_branch_for_is_skipped():
    spec, case = describe(Config(tiny.flat("gemma4-moe"))), parse_case("decode=1*1@20")
    args, report = Namespace(repeats=2, seed=0, tokens=3), Report()
    core, _ = against_model.open_core("tiny", spec, CPU, RandomCheckpoint(spec), [case], 16, report, 0)
    against_model.measure_case(core, Model("tiny", spec, None, {}), case, MODELS["torch"], args, report)
    assert [skipped["why"] for skipped in report.skipped] == ["the torch model has no branch: experts (layer 0)"]
