"""Kernels of other libraries that do what one op does, on the same arrays. What runs is in PEERS, a row each."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from measure.kernel.kernel_inputs import EPS, WEIGHT_OFFSET, spread
from measure.peer import peer_attention, peer_experts
from measure.peer.torch_arrays import as_numpy, as_torch, compiled

# Of a row, ||theirs - ours|| / ||ours||. In bfloat16 both sides round the result, and a peer of several steps rounds
# what goes between them: four roundings in all, each of which moves a value by up to 2^-8 of itself on one side and the
# other together. float32: sums in another order.
BFLOAT16_BOUND, FLOAT32_BOUND = 2.0**-6, 1e-5
MOST_ROWS = 256             # that are compared, spread over all: a prompt's whole output takes seconds in float64


def row_error(prepared, theirs):
    """(largest distance of a row from ours, bound). Runs the op once."""
    lane, out = prepared.lane, prepared.sets[0]["out"]
    prepared.launch(0)
    rows = spread(len(out), MOST_ROWS)
    ours = np.asarray(lane.to_host(out)).reshape(len(out), -1)[rows].astype(np.float64)
    theirs = theirs.reshape(len(out), -1)[rows].astype(np.float64)
    size = np.maximum(np.linalg.norm(ours, axis=1), np.finfo(np.float32).tiny)
    error = float(np.max(np.linalg.norm(theirs - ours, axis=1) / size))
    return error, FLOAT32_BOUND if lane.dtype == np.float32 else BFLOAT16_BOUND


def greedy_error(prepared, theirs):
    """(share of rows with another token than ours, 0)."""
    prepared.launch(0)
    return float(np.mean(np.asarray(prepared.lane.to_host(prepared.sets[0]["out"])) != theirs.reshape(-1))), 0.0


def drawn_error(prepared, theirs):
    """(share of rows whose token top-k and top-p together leave out, 0): draws differ, what is drawn from does not."""
    s, lane = prepared.case.sizes, prepared.lane
    logits = np.asarray(lane.to_host(prepared.sets[0]["logits"])).astype(np.float64) / s["temperature"]
    outside = 0
    for row, token in zip(logits, theirs.reshape(-1), strict=True):
        kept = np.sort(row)[::-1][:s["top_k"] or None]
        mass = np.cumsum(np.exp(kept - kept[0]) / np.sum(np.exp(kept - kept[0])))
        outside += row[token] < kept[min(np.searchsorted(mass, s["top_p"]), len(kept) - 1)]
    return outside / len(logits), 0.0


@dataclass(frozen=True)
class Peer:
    """One op by another library.

    name      as --peer names it
    op        of the op table
    what      what runs, for people
    build     build(prepared) -> [a function for each set that runs it and returns the output as a tensor]
    requires  packages
    lanes     where it runs
    refuses   refuses(case) -> why a shape is not served, or None
    error     error(prepared, output of set 0) -> (error, bound)
    updates   names of arrays that both sides change in place
    notes     notes(case): what is not alike in the two sides
    """

    name: str
    op: str
    what: str
    build: Callable
    requires: tuple = ("torch",)
    lanes: tuple = ("cpu", "emulated", "cuda")
    refuses: Callable = lambda case: None
    error: Callable = row_error
    updates: tuple = ()
    notes: Callable = lambda case: ()

    def __str__(self):
        return f"{self.name}: {self.what}"

    def available(self, lane):
        """Why it cannot run on the lane, or None."""
        missing = [name for name in self.requires if importlib.util.find_spec(name) is None]
        if missing:
            return f"{' and '.join(missing)} not installed"
        return None if lane.name in self.lanes else f"it does not run on the {lane.name} lane"

    def prepare(self, prepared):
        """[a function for each set]; called inside torch_running."""
        return self.build(prepared)

    def compare(self, prepared, launch):
        """(error, bound) of what launch() makes of set 0, against the op's own output; called inside torch_running."""
        arrays = prepared.sets[0]
        before = {name: as_torch(arrays[name]).clone() for name in self.updates}
        theirs = as_numpy(launch())
        for name, saved in before.items():
            as_torch(arrays[name]).copy_(saved)
        return self.error(prepared, theirs)


def on_sets(function, *names):
    """A build that calls function(*arrays) with these arrays of each set, as tensors."""
    def build(prepared):
        def bind(arrays):
            tensors = [as_torch(arrays[name]) for name in names]
            return lambda: function(*tensors)
        return [bind(arrays) for arrays in prepared.sets]
    return build


def compiled_on_sets(function, *names):
    """The same with the function compiled once."""
    def build(prepared):
        return on_sets(compiled(function, prepared.lane), *names)(prepared)
    return build


def linear(x, weight):
    import torch.nn.functional as F
    return F.linear(x, weight)


def gated(is_compiled=False):
    """A build of gated_linear, with the activation of the case."""
    def build(prepared):
        activation = prepared.case.sizes.get("activation", "gelu_tanh")

        def run(x, weight):
            return peer_experts.gate(linear(x, weight), activation)
        return (compiled_on_sets if is_compiled else on_sets)(run, "x", "weight")(prepared)
    return build


def written_norm(x, weight):
    """As a compiler fuses it: in float32, rounded once."""
    import torch
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + EPS) * (weight.float() + WEIGHT_OFFSET)).to(x.dtype)


def library_norm(prepared):
    """F.rms_norm has no offset: the weights get theirs beforehand."""
    import torch.nn.functional as F

    def bind(arrays):
        x, weight = as_torch(arrays["x"]), as_torch(arrays["weight"]) + WEIGHT_OFFSET
        return lambda: F.rms_norm(x, weight.shape, weight, EPS)
    return [bind(arrays) for arrays in prepared.sets]


def compiled_add_norm(prepared):
    """The residual is updated in place, as ours is."""
    import torch

    def step(residual, branch, post_weight, next_weight, layer_scalar):
        def norm(x, weight):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * (weight.float() + WEIGHT_OFFSET)
        new = residual.float() + norm(branch.float(), post_weight)
        new = (new if layer_scalar is None else new * layer_scalar.float()).to(residual.dtype)
        residual.copy_(new)
        return norm(new.float(), next_weight).to(residual.dtype)
    run = compiled(step, prepared.lane)

    def bind(arrays):
        names = ("residual", "branch", "post_weight", "next_weight", "layer_scalar")
        tensors = [None if arrays[name] is None else as_torch(arrays[name]) for name in names]
        return lambda: run(*tensors)
    return [bind(arrays) for arrays in prepared.sets]


def draw(prepared):
    """top-k, then top-p among what is left, then one draw without a wait for the host, as gpt-fast has it."""
    import torch
    s = prepared.case.sizes

    def sample(logits):
        values, ids = torch.topk(logits / s["temperature"], s["top_k"])
        probs = values.softmax(-1)
        before = probs.cumsum(-1) - probs
        probs = torch.where(before < s["top_p"], probs, 0.0)
        noise = torch.empty_like(probs).exponential_(1)
        return ids.gather(-1, (probs / noise).argmax(-1, keepdim=True))
    return on_sets(sample, "logits")(prepared)


def greedy(logits):
    return logits.argmax(-1)


def flashinfer_draw(prepared):
    import flashinfer
    s = prepared.case.sizes

    def sample(logits):
        return flashinfer.sampling.top_k_top_p_sampling_from_logits(
            logits / s["temperature"], s["top_k"], s["top_p"], filter_apply_order="top_k_first")
    return on_sets(sample, "logits")(prepared)


def triton_experts(prepared):
    from measure.peer import triton_experts as peer
    return peer.experts(prepared)


def is_greedy(case):
    return None if case.sizes["temperature"] == 0 else "it draws"


def is_drawn(case):
    return None if case.sizes["temperature"] > 0 and case.sizes["top_k"] else "it draws from the top k only"


def narrow_logits(case):
    is_head = case.sizes.get("out") == "float32"
    return ("theirs writes logits in the weights' dtype, ours in float32",) if is_head else ()


GPU = {"lanes": ("cuda",)}
PEERS = (
    Peer("torch", "linear", "F.linear", on_sets(linear, "x", "weight"),
         notes=narrow_logits),
    Peer("compiled", "linear", "F.linear", compiled_on_sets(linear, "x", "weight"), notes=narrow_logits),
    Peer("torch", "gated_linear", "F.linear, gate", gated()),
    Peer("compiled", "gated_linear", "F.linear, gate", gated(is_compiled=True)),
    *(Peer(name, op, what, peer_experts.experts(product, name == "compiled"), lanes=lanes, notes=peer_experts.notes)
      for op in ("moe_gated_linear", "moe_linear") for name, what, product, lanes in peer_experts.WAYS),
    *(Peer("triton", op, "fused experts, tuned", triton_experts, ("torch", "triton"), **GPU)
      for op in ("moe_gated_linear", "moe_linear")),
    Peer("torch", "rms_norm", "F.rms_norm", library_norm),
    Peer("compiled", "rms_norm", "written out", compiled_on_sets(written_norm, "x", "weight")),
    Peer("compiled", "add_norm", "written out", compiled_add_norm,
         updates=("residual",)),
    Peer("torch", "sample", "argmax", on_sets(greedy, "logits"), refuses=is_greedy, error=greedy_error),
    Peer("torch", "sample", "topk, softmax", draw, refuses=is_drawn, error=drawn_error),
    Peer("flashinfer", "sample", "top_k_top_p_sampling_from_logits", flashinfer_draw, ("torch", "flashinfer"),
         refuses=is_drawn, error=drawn_error, **GPU),
    Peer("sdpa", "attention", "contiguous K and V", peer_attention.sdpa,
         refuses=peer_attention.why_not),
    *(Peer("sdpa", "attention", f"{name}, contiguous K and V", partial(peer_attention.sdpa, backend=backend),
           refuses=peer_attention.why_not, **GPU)
      for name, backend in (("cuDNN", "CUDNN_ATTENTION"), ("FlashAttention", "FLASH_ATTENTION"))),
    Peer("flex", "attention", "flex_attention, contiguous K and V", peer_attention.flex,
         refuses=peer_attention.why_not),
    Peer("flashinfer", "attention", "paged, on our pages", peer_attention.flashinfer, ("torch", "flashinfer"),
         refuses=peer_attention.why_not, **GPU),
)


def kernel_peers(names, ops, lane, report):
    """The peers asked for that compute one of the ops on the lane; the others are skipped with the reason."""
    found, peers = [], [peer for peer in PEERS if peer.op in ops]
    for name in names:
        if not any(peer.name == name for peer in peers):
            report.skip(f"kernels: {name}", "it has none of these ops")
    for peer in peers:
        if peer.name in names:
            reason = peer.available(lane)
            if reason:
                report.skip(f"{peer.op}: {peer}", reason)
            else:
                found.append(peer)
    return found
