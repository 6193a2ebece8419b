"""How fast a kernel is meant to be, at the shapes where that is known: for a GPU.

A share of the roof holds on any GPU; a time or a rate is for an H200, which reads 4.3 TB/s and multiplies bfloat16 at
770 to 800 TFLOP/s, and is asked of nothing slower.
"""

from measure.report import Goal

H200_BYTES_PER_S = 4.0e12       # a read-only stream from here on: an H200 or more
LARGE_WEIGHT_BYTES = 88e6       # from here on a weight fills all multiprocessors


def _weight_bytes(s):
    return 2 * s["n_in"] * (2 * s["intermediate"] if "intermediate" in s else s["n_out"])


def _decode(head_dim, window, batch, context):
    return lambda s: (s["head_dim"], s["window"], s["rows"]) == (head_dim, window, [(batch, 1, context)])


def _prefill(head_dim, window, *lengths):
    return lambda s: (s["head_dim"], s["window"]) == (head_dim, window) and s["rows"] in [[(1, n, n)] for n in lengths]


def _roof(percent):
    return Goal("percent_of_roof", at_least=percent)


PRODUCTS = ("linear", "gated_linear")
# (ops, what sizes it is for, the goal, whether it is for an H200 alone)
GOALS = [
    (("attention",), _decode(256, 1024, 64, 1024), _roof(90), False),
    (("attention",), _decode(512, None, 8, 32768), _roof(88), False),
    (("attention",), _decode(512, None, 1, 32768), Goal("time", at_most=55e-6), True),   # reads K once where v is k
    (("attention",), _prefill(512, None, 8192, 32768), Goal("flops_per_s", at_least=450e12), True),
    (("attention",), _prefill(256, 1024, 8192), Goal("flops_per_s", at_least=450e12), True),
    (("attention",), _prefill(256, None, 8192), Goal("flops_per_s", at_least=600e12), True),
    (("attention",), _prefill(128, None, 8192), Goal("flops_per_s", at_least=600e12), True),
    (PRODUCTS, lambda s: s["n_tokens"] <= 16 and _weight_bytes(s) >= LARGE_WEIGHT_BYTES, _roof(93), False),
    (PRODUCTS, lambda s: s["n_tokens"] == 64 and _weight_bytes(s) >= LARGE_WEIGHT_BYTES, _roof(90), False),
    # 90 % of a copy, which is some 5 % slower than the read-only stream that the roof is of.
    (("add_norm",), lambda s: s["n_tokens"] >= 8192 and s["hidden"] == 5376, _roof(85), False),
    (("sample",), lambda s: s["top_k"] and s["n_rows"] == 1 and s["vocab"] > 2**17, Goal("time", at_most=20e-6), True),
    (("sample",), lambda s: s["top_k"] and s["n_rows"] == 64 and s["vocab"] > 2**17, Goal("time", at_most=80e-6), True),
]


def goal_of(case, ceilings):
    """The Goal of a KernelCase on a GPU with these Ceilings, or None."""
    for ops, is_for, goal, is_h200 in GOALS:
        if case.op in ops and is_for(case.sizes) and (not is_h200 or ceilings.bytes_per_s >= H200_BYTES_PER_S):
            return goal
    return None
