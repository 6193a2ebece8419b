"""The ops of one step: recorded as they are called, grouped where they are equal, and what the step's time went to.

    with recording(core) as calls:
        core.step.run(batch)
    groups = grouped(ops_of(calls, core, batch))
"""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

from engine import cost
from engine.cost import Cost
from engine.graph import GraphCache
from engine.routes import Routes
from engine.trace import traced
from measure.models import kind_of

# Rows of "where the rest goes" in the order of attribution().
PARTS = {"floor": "weights, K and V alone at the ceilings",
         "extra bytes": "what our kernels move besides, each at its own ceiling: activations, logits, partial sums",
         "below roof": "kernels slower than the ceilings, each with the gap to the next of its kind",
         "gaps": "the step's launches back to back, less each kernel among its kind: unlike neighbours",
         "host": "outside the launches: batch, copies in, launches that no graph replays, reading tokens back"}
# Why one of them is less than nothing.
NEGATIVE = {"extra bytes": "negative: the floor counts what the step leaves out",
            "below roof": "negative: faster than the ceilings, as what finds its data in a cache is",
            "gaps": "negative: in their order the launches take less than each among its kind; what is small is noise",
            "host": "negative: the launches alone took longer than the step with them; other work was in the way"}
AFTER_LAYERS = ("select_rows", "logit_softcap", "apply_edits", "sample", "sample_drafts", "sample_with_drafts",
                "relax_drafts", "accept_drafts", "pick_centroids", "candidate_argmax", "candidate_logits",
                "top_logprobs")
# What differs between local and global layers: ops, and roles of products.
BY_KIND = ("attention", "qk_norm_rope_cache", "qkv", "q", "o")
PRODUCTS = ("linear", "gated_linear", "moe_gated_linear", "moe_linear")
DENSE = ("gate_up", "down")
PLACES = {"gate_per_layer": 2}                      # the argument that says where in an array, and is no size
# Which of the model's matrices a product is by, where its op does not say it.
OF_LAYER = {"qkv": "qkv", "o": "o", "gate_up": "", "down": "down", "router": "router", "experts_gate_up": "",
            "experts_down": "down", "per_layer_gate": "per-layer gate", "per_layer_projection": "per-layer out"}
N_PAGES_DIMS = 4        # of K and V: pages, positions, heads, values
ROWS_IN = {"embed": 1, "select_rows": 1}        # the argument with a row for each row of the output, else the first


@contextmanager
def watched(core, around):
    """Within it every op of the core's steps runs inside around(name, args, kwargs); see engine.trace."""
    step = core.step
    parts = list(filter(None, (step.layers, step.speculation)))
    before = step.ops, [part.ops for part in parts]
    step.ops = traced(step.ops, around)
    for part in parts:
        part.use(step.ops)
    try:
        yield
    finally:
        step.ops = before[0]
        for part, ops in zip(parts, before[1], strict=True):
            part.use(ops)


@contextmanager
def recording(core):
    """Yields a list that gets (name, args, kwargs) of each op of the steps run within; they run eagerly, on the inputs
    that a graph would have. The arrays hold what the step left there until another one is staged; but the Routes that
    products read are copies, for each layer has its own, and the last may have those of few rows."""
    calls, step = [], core.step

    @contextmanager
    def around(name, args, kwargs):
        if name in PRODUCTS:
            args = tuple(Routes(*(array.copy() for array in arg)) if type(arg) is Routes else arg for arg in args)
        calls.append((name, args, kwargs))
        yield

    graphs = step.graphs                                    # the first run of a new one is eager
    step.graphs = GraphCache(core.lane, graphs.sizes[-1], graphs.enabled, core.config.most_drafts)
    try:
        with watched(core, around):
            yield calls
    finally:
        step.graphs = graphs


@dataclass(frozen=True)
class Op:
    """One launch of the op table in a step.

    role    which of the model's: "qkv", "head", "decode", ... or ""; "kept" is of the layers that have dropped the rows
            nobody asked for, "draft" of the draft model
    kind    of attention in its layer, "local", "global" or "chunked"; "" where that makes no difference
    launch  runs it again
    """

    name: str
    role: str
    kind: str
    sizes: tuple
    n_rows: int
    cost: Cost
    launch: object


@dataclass
class Group:
    """Ops of a step that differ in nothing but their arrays. order: place of the first among the step's ops."""

    name: str
    order: int
    ops: list

    @property
    def cost(self):
        return sum((op.cost for op in self.ops), Cost())

    def roof_s(self, ceilings):
        """The least time of the work that any implementation has to do, each launch by itself."""
        return sum(op.cost.time_s(ceilings) for op in self.ops)

    def traffic_s(self, ceilings):
        """The same of all that our kernels move."""
        return sum(Cost(op.cost.traffic_bytes, flops=op.cost.flops).time_s(ceilings) for op in self.ops)


def ops_of(calls, core, batch):
    """[Op] of the recorded calls of one step over `batch`, a Batch. Behind the judging of drafts and the selection of
    the states that drafting begins with, all are the draft model's."""
    names = [name for name, _, _ in calls]
    n_own = names.index("accept_drafts") + 2 if "accept_drafts" in names else len(calls)
    return _ops_of_target(calls[:n_own], core, batch) + _ops_of_draft(calls[n_own:], core)


def _ops_of_target(calls, core, batch):
    layers, drops_at, matrices = core.spec.layers, core.step.layers.drops_at, _matrices(core)
    found, layer, n_attentions, has_dropped = [], 0, 0, False
    for name, args, kwargs in calls:
        role, counted = "", args
        if name in PRODUCTS:
            role, of = matrices[id(args[1])]
            layer = layer if of is None else of
            counted = tuple(Routes(*map(core.lane.to_host, arg)) if type(arg) is Routes else arg for arg in args)
        elif name == "embed" and args[0] is core.weights.per_layer_embed:
            role = "per layer"
        elif name == "qk_norm_rope_cache" and layers[layer].kv_from is not None:
            role = "q"
        elif name == "attention":
            pool, _ = core.kv_cache.layer_slot[n_attentions]
            paged = (batch.kept_pools if has_dropped else batch.pools)[pool]
            role, counted = _phase(paged), (*args[:3], paged)
            n_attentions += 1
        has_kind = name in BY_KIND or role in BY_KIND
        if has_dropped and name not in AFTER_LAYERS and role != "head":
            role = f"{role} kept".strip()
        # The first rows selected are those of the residual, in the layer that drops the others.
        has_dropped |= name == "select_rows" and batch.kept is not None and n_attentions <= drops_at
        found.append(Op(name, role, kind_of(layers[layer].attention) if has_kind else "", _sizes(name, args, kwargs),
                        int(args[ROWS_IN.get(name, 0)].shape[0]), cost.of(name, counted, kwargs),
                        partial(getattr(core.lane.ops, name), *args, **kwargs)))
    wants_any = batch.kept is None or len(batch.kept)
    assert n_attentions == (len(layers) if wants_any else drops_at)
    return found


def _ops_of_draft(calls, core):
    found, to_host, layer = [], core.lane.to_host, 0
    layers, matrices = core.draft.spec.layers if calls else (), _matrices_of_draft(core.draft.weights) if calls else {}
    for name, args, kwargs in calls:
        role, counted = "", args
        if name in PRODUCTS:
            role, of = matrices[id(args[1])]
            layer = layer if of is None else of
        elif name == "attention":
            counted = (*args[:3], SimpleNamespace(cu_seqlens=to_host(args[3].cu_seqlens), last_visible=None,
                                                  context_lens=to_host(args[3].context_lens), first_visible=None))
        kind = kind_of(layers[layer].attention) if name in BY_KIND or role in BY_KIND else ""
        found.append(Op(name, f"draft {role}".strip(), kind, _sizes(name, args, kwargs),
                        int(args[ROWS_IN.get(name, 0)].shape[0]), cost.of(name, counted, kwargs),
                        partial(getattr(core.lane.ops, name), *args, **kwargs)))
    return found


def _matrices_of_draft(weights):
    """{id of a matrix of AssistantWeights: (its role, the number of its layer or None)}."""
    found = {id(getattr(weights, name)): (role, None) for name, role in
             {"pre_embed": "in", "pre_state": "in", "post": "out", "centroids": "centroids", "head": "head"}.items()}
    return found | {id(getattr(w, name)): (role, i) for i, w in enumerate(weights.layers) for name, role in
                    {"qkv": "q", "o": "o", "gate_up": "", "down": "down"}.items()}


def _matrices(core):
    """{id of a matrix of the weights: (its role, the number of its layer or None)}."""
    spec, weights = core.spec, core.weights
    found = {id(weights.head): ("head", None), id(weights.per_layer_model_projection): ("per-layer context", None)}
    for i, (layer, w) in enumerate(zip(spec.layers, weights.layers, strict=True)):
        of_dense = ""                                   # what kind of dense MLP it is, where a model has several
        if layer.moe and layer.moe.routing == "sigmoid":
            of_dense = "shared expert"
        elif layer.kv_from is not None and layer.dense.intermediate > spec.layers[0].dense.intermediate:
            of_dense = "wide"
        for name, role in OF_LAYER.items():
            role = "q" if role == "qkv" and layer.kv_from is not None else role
            role = f"{role} {of_dense}".strip() if name in DENSE else role
            found[id(getattr(w, name))] = role, i
    return found


def _phase(paged):
    """What its rows are: all one token after a context, all whole prompts, or neither."""
    if all(end - begin == 1 < context for begin, end, context in paged.rows):
        return "decode"
    return "prefill" if all(end - begin == context for begin, end, context in paged.rows) else "mixed"


def _sizes(name, args, kwargs):
    """All that tells an op's launches apart but for their arrays' addresses."""
    args = [value for place, value in enumerate(args) if place != PLACES.get(name)]
    return (*(_size(value) for value in args), *((name, _size(value)) for name, value in sorted(kwargs.items())))


def _size(value):
    if hasattr(value, "shape"):
        shape = value.shape[1:] if len(value.shape) == N_PAGES_DIMS else value.shape    # the number of pages is no size
        return (*shape, str(value.dtype))
    return value if isinstance(value, (int, float, str, type(None))) else type(value).__name__


def grouped(ops):
    """[Group] in order of first use, named "op role", with the kind of attention where the kinds differ in size."""
    groups = {}
    for order, op in enumerate(ops):
        groups.setdefault((op.name, op.role, op.sizes), Group("", order, [])).ops.append(op)
    of_role = {}
    for (name, role, _), group in groups.items():
        of_role.setdefault((name, role), []).append(group)
    for (name, role), found in of_role.items():
        for group in found:
            kinds = {op.kind for op in group.ops}
            kind = kinds.pop() if len(found) > 1 and len(kinds) == 1 else ""
            group.name = " ".join(filter(None, (name, role, kind)))
    return list(groups.values())


def attribution(wall_s, launches_s, kernels_s, traffic_s, floor_s):
    """{a name of PARTS: seconds} of a step's wall time, which they add up to. A part may be negative: a kernel may take
    longer alone than among others.

    launches_s  all launches of the step back to back; kernels_s: the sum of what each takes by itself
    traffic_s   all that the kernels move, at the ceilings
    """
    return {"floor": floor_s, "extra bytes": traffic_s - floor_s, "below roof": kernels_s - traffic_s,
            "gaps": launches_s - kernels_s, "host": wall_s - launches_s}
