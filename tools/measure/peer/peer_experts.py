"""Products by expert in torch, on our routes: one launch for all experts, or a loop over them.

Theirs reads which rows an expert takes from our Routes, as ours does: routing and sorting cost neither side.
"""

from measure.peer.torch_arrays import as_torch, compiled
from measure.report import BenchError


def gate(gate_up, activation):
    """[n, width] of [n, 2 * width]."""
    import torch.nn.functional as F
    gates, ups = gate_up.chunk(2, -1)
    return (F.silu(gates) if activation == "silu" else F.gelu(gates, approximate="tanh")) * ups


def grouped_product(x, weight, ends):
    """x [n_pairs, n_in] by expert, weight [n_experts, n_in, n_out], ends [n_experts] int32 where the lane has it."""
    import torch.nn.functional as F
    return F.grouped_mm(x, weight, offs=ends)


def looped_product(x, weight, ends):
    """The same, a product for each expert in use; ends: a list."""
    import torch
    bounds = enumerate(zip([0, *ends[:-1]], ends, strict=True))
    return torch.cat([x[begin:end] @ weight[expert] for expert, (begin, end) in bounds if end > begin])


# (peer as --peer names it, what runs, product, lanes: compiled it takes bfloat16 alone)
WAYS = (("torch", "F.grouped_mm", grouped_product, ("cpu", "emulated", "cuda")),
        ("torch", "a loop, its bounds known to the host", looped_product, ("cpu", "emulated", "cuda")),
        ("compiled", "F.grouped_mm", grouped_product, ("emulated", "cuda")))


def experts(product, is_compiled):
    """A build of moe_gated_linear and moe_linear."""
    def build(prepared):
        import torch
        s, is_gated = prepared.case.sizes, prepared.case.op == "moe_gated_linear"
        if product is grouped_product and not hasattr(torch.nn.functional, "grouped_mm"):
            raise BenchError(f"torch {torch.__version__} has no F.grouped_mm")

        def run(x, weight, ends, pairs, rows):
            if is_gated:
                return gate(product(x[rows], weight, ends), s["activation"])
            y = product(x, weight, ends).float()
            return torch.empty_like(y).index_copy_(0, pairs, y)
        step = compiled(run, prepared.lane) if is_compiled else run

        def bind(arrays):
            x, weight, routes = as_torch(arrays["x"]), as_torch(arrays["weight"]), arrays["routes"]
            weight = weight if s["in_out"] else weight.mT
            ends = as_torch(routes.begins)[1:]
            if product is looped_product:
                ends = arrays["host_routes"].begins[1:].tolist()
            pairs = as_torch(routes.order).to(torch.int64)
            rows = pairs if s.get("by_pair", True) else pairs // s["experts_per_token"]
            return lambda: step(x, weight, ends, pairs, rows)
        return [bind(arrays) for arrays in prepared.sets]
    return build


def notes(case):
    if case.op == "moe_gated_linear":
        return ()
    return ("theirs rounds what experts give to the weights' dtype, ours leaves it float32",)
