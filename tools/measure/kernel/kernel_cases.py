"""The ops of a step at the shapes of released models, with inputs to run them on: what is timed, counted and checked.

    with Data(lane, rng) as data:
        prepared = case.prepare(lane, rng, n_sets=3, data=data)
        prepared.check()
        clock.samples(prepared.launches, 30)
"""

from dataclasses import dataclass, field
from functools import partial
from math import gcd
from types import SimpleNamespace

from engine import cost, reference
from engine.models.presets import preset
from engine.workspace import ropes, temperatures
from measure.kernel.kernel_inputs import EXACT, Data, n_unwritten, poison
from measure.kernel.op_attention import Attention, AttentionTemperature, QkNormRopeCache, RopeAngles
from measure.kernel.op_branches import AddNorms, GatePerLayer, MixPerLayer, RouterNorm, ScaleRows
from measure.kernel.op_centroids import CandidateArgmax, CandidateLogits, PickCentroids
from measure.kernel.op_drafts import AcceptDrafts, RelaxDrafts, SampleDrafts, SampleWithDrafts
from measure.kernel.op_logits import ApplyEdits, LogitSoftcap, Sample, TopLogprobs
from measure.kernel.op_moe import MoeCombine, MoeGatedLinear, MoeLinear, MoeRoute
from measure.kernel.op_rows import AddNorm, Embed, GatedLinear, Linear, RmsNorm, SelectRows
from measure.kernel.op_vision import AddBias, AddRows, Clamp, LayerNorm, PlaceRows, PoolRows
from measure.kernel.tower_shapes import tower_shapes
from measure.models import kind_of
from measure.report import BenchError

OPS = {"linear": Linear(), "gated_linear": GatedLinear(), "attention": Attention(),
       "qk_norm_rope_cache": QkNormRopeCache(), "add_norm": AddNorm(), "rms_norm": RmsNorm(),
       "add_norms": AddNorms(), "router_norm": RouterNorm(), "scale_rows": ScaleRows(), "mix_per_layer": MixPerLayer(),
       "gate_per_layer": GatePerLayer(), "attention_temperature": AttentionTemperature(),
       "rope_angles": RopeAngles(), "embed": Embed(), "select_rows": SelectRows(), "logit_softcap": LogitSoftcap(),
       "moe_route": MoeRoute(), "moe_gated_linear": MoeGatedLinear(), "moe_linear": MoeLinear(),
       "moe_combine": MoeCombine(), "apply_edits": ApplyEdits(), "sample": Sample(), "top_logprobs": TopLogprobs(),
       "sample_drafts": SampleDrafts(), "sample_with_drafts": SampleWithDrafts(), "relax_drafts": RelaxDrafts(),
       "accept_drafts": AcceptDrafts(), "pick_centroids": PickCentroids(), "candidate_argmax": CandidateArgmax(),
       "candidate_logits": CandidateLogits(),
       "layer_norm": LayerNorm(), "add_bias": AddBias(), "clamp": Clamp(), "add_rows": AddRows(),
       "pool_rows": PoolRows(), "place_rows": PlaceRows()}
# A launch is cold when so much was touched since its set's last turn: three times the 60 MB of an H200's L2 cache.
COLD_BYTES = 180 << 20
LEAST_SETS, MOST_SETS = 3, 64       # more of small sets would measure how long arrays take to make
LARGE_BYTES = 500 << 20             # of one set: it does not fit a cache by far, and is cold alone
N_DRAFTS = 4                        # of a speculating sequence
DRAFT_HIDDEN, DRAFT_SIZE, DRAFT_CHOSEN = 256, 128, 32       # of the E-series: tokens a centroid, centroids a row
SPARE = 0.8                         # share of the free memory that sets may take


@dataclass(frozen=True)
class KernelCase:
    """One op at one shape.

    op      name in the op table
    label   which of the model's: "qkv local", "head", "decode local", ...
    preset  a name of PRESETS
    sizes   n_tokens, n_in, n_out, ... or rows=[(n_seqs, n_query, context)], n_heads, n_kv_heads, head_dim, window
    """

    op: str
    label: str
    preset: str
    sizes: dict = field(hash=False)

    def __str__(self):
        return f"{self.preset} {self.name} ({', '.join(f'{key}={value}' for key, value in self.shape.items())})"

    @property
    def name(self):
        """As a Row's: "linear qkv local"."""
        return f"{self.op} {self.label}".rstrip()

    @property
    def shape(self):
        """As a Row's: the preset, tokens of the step or rows of logits, and the other sizes in words."""
        sizes = dict(self.sizes)
        if "rows" in sizes:
            sizes["n_tokens"] = sum(n * query for n, query, _ in sizes["rows"])
            sizes["rows"] = ",".join(f"{n}*{query}@{context}" for n, query, context in sizes["rows"])
        words = OPS[self.op].words.format(**sizes).removesuffix(", window None")
        return {"preset": self.preset, "n_tokens": sizes.get("n_rows", sizes.get("n_tokens")), "size": words}

    def prepare(self, lane, rng, n_sets=1, data=None):
        """Prepared, with random inputs on `lane`.

        n_sets  sets of inputs at other addresses; None for so many that a launch finds none of its own in the L2 cache,
                where they fit
        data    a Data of the lane, to share random numbers between cases
        Raises MemoryPlanError where a set has no room.
        """
        if data is None:
            with Data(lane, rng) as own:
                return self.prepare(lane, rng, n_sets, own)
        with lane.running():
            prepared = Prepared(self, lane)
            prepared.add_set(data)
            for _ in range((prepared.n_cold_sets() if n_sets is None else n_sets) - 1):
                prepared.add_set(data)
        return prepared


class Prepared:
    """A KernelCase with inputs.

    sets      dicts name -> array on the lane. linear: x, weight, out; gated_linear: x, weight [2 * intermediate, n_in],
              out; rms_norm: x, weight, out; add_norm: residual, branch, post_weight, next_weight, layer_scalar, out;
              attention: q, k_pages, v_pages, paged, out, and batch, the PagedBatch on the host
    launches  for each set, a function that runs the op on it
    cost      engine.cost.Cost of one launch
    """

    def __init__(self, case, lane):
        self.case, self.lane, self.sets, self.launches, self.cost = case, lane, [], [], None
        self._inputs = OPS[case.op]

    def add_set(self, data):
        """One more set of inputs."""
        first = self.sets[0] if self.sets else None
        self.sets.append(self._inputs.make(data, self.case.sizes, first))
        args, kwargs = self._inputs.call(self.sets[-1], self.case.sizes)
        self.launches.append(partial(getattr(self.lane.ops, self.case.op), *args, **kwargs))
        if first is None:
            args, kwargs = self._inputs.counted(self.sets[0], self.case.sizes)
            self.cost = cost.of(self.case.op, args, kwargs)

    @property
    def set_bytes(self):
        """Of the arrays of one set that no other set has."""
        known = {id(array) for array in self.sets[0].values()} if len(self.sets) > 1 else set()
        return sum(getattr(array, "nbytes", 0) for array in self.sets[-1].values() if id(array) not in known)

    def n_cold_sets(self):
        """How many sets a cold measurement wants, as far as there is memory."""
        if self.cost.bytes >= LARGE_BYTES:
            return 1
        wanted = min(max(LEAST_SETS, -(-COLD_BYTES // max(int(self.cost.bytes), 1))), MOST_SETS)
        free = self.lane.memory_bytes()
        if free is None:
            return wanted
        return min(wanted, 1 + int(SPARE * free) // max(self.set_bytes, 1))

    @property
    def is_cold(self):
        """Whether a launch finds nothing of its set in an L2 cache when all sets take turns."""
        return len(self.sets) * self.cost.bytes >= COLD_BYTES

    def launch(self, i=0):
        """Runs the op on set i % n_sets, on the lane's stream."""
        with self.lane.running():
            self.launches[i % len(self.launches)]()

    def check(self):
        """Runs the op on set 0 and compares with its twin; returns the largest error of a row. On the cpu lane, where
        the op is the twin, it is only run. Raises BenchError with the error."""
        lane, arrays = self.lane, self.sets[0]
        if lane.ops is reference:
            self.launch()
            return 0.0
        worst = 0.0
        with lane.running():
            outputs = [name for name in self._inputs.outputs if arrays[name] is not None]
            for name in outputs:
                poison(lane, arrays[name])
            for found in self._inputs.compare(lane, arrays, self.case.sizes, self.launches[0]):
                if not found.is_good:
                    how = "" if found.limit == EXACT else f", expected at most {found.limit:.2g} of a row's length"
                    raise BenchError(f"{self.case}: {found.name} is off its twin by {found.error:.2g}{how}")
                worst = max(worst, found.error)
            for name in outputs:
                if n := n_unwritten(lane, arrays[name]):
                    raise BenchError(f"{self.case}: {n} values of {name} were never written")
        return worst


def cases_of(presets, n_tokens=(1, 16, 64, 4096), contexts=(1024,), batches=(1, 8, 64), ops=None):
    """[KernelCase] of the presets, each shape of a preset once.

    n_tokens  of a step: products, norms, RoPE, embedding; where it is more than a decode step has, also the length of a
              prompt for attention; the largest bounds the patches of a picture
    contexts  of decode attention
    batches   sequences of a decode step; rows of logits
    ops       names of the op table, None for all. Raises BenchError for a name that is none
    """
    for op in ops or ():
        if op not in OPS:
            raise BenchError(f"no op {op!r}, expected one of {', '.join(OPS)}")
    found = {}
    for name in presets:
        sweep = SimpleNamespace(n_tokens=n_tokens, contexts=contexts, batches=batches)
        for op, label, sizes in _shapes(preset(name), sweep):
            key = name, op, repr(sorted(sizes.items()))
            if ops is None or op in ops:
                label = _common(found[key].label, label) if key in found else label
                found[key] = KernelCase(op, label, name, sizes)
    order = list(OPS)
    return sorted(found.values(), key=lambda case: (presets.index(case.preset), order.index(case.op)))


def some(cases, ops):
    """The cases. Raises BenchError where there are none: no preset asked for runs any of `ops`."""
    if not cases:
        raise BenchError(f"no preset that was asked for runs {' or '.join(ops)}")
    return cases


def _shapes(spec, sweep):
    """(op, label, sizes) of everything that steps of a ModelSpec run."""
    attentions = list(dict.fromkeys(layer.attention for layer in spec.layers))
    mlps = list(dict.fromkeys(layer.dense for layer in spec.layers if layer.dense))
    projections = list(dict.fromkeys((layer.attention, layer.qkv_width) for layer in spec.layers))
    routers = list(dict.fromkeys(layer.moe.n_experts for layer in spec.layers if layer.moe))
    decode_most = max(sweep.batches)
    for n in sweep.n_tokens:
        for a in attentions:
            for width in (width for of, width in projections if of == a):
                yield "linear", f"qkv {kind_of(a)}", {"n_tokens": n, "n_in": spec.hidden, "n_out": width}
            yield "linear", f"o {kind_of(a)}", {"n_tokens": n, "n_in": a.q_width, "n_out": spec.hidden}
            for has_kv in sorted({layer.kv_from is None for layer in spec.layers if layer.attention == a}):
                yield "qk_norm_rope_cache", f"{'' if has_kv else 'q '}{kind_of(a)}", _heads(a, n, has_kv)
            if n > decode_most:
                yield "attention", f"prefill {kind_of(a)}", _attention(a, [(1, n, n)])
        for mlp in mlps:
            yield "gated_linear", "", {"n_tokens": n, "n_in": spec.hidden, "intermediate": mlp.intermediate,
                                       "activation": mlp.activation}
            yield "linear", "down", {"n_tokens": n, "n_in": mlp.intermediate, "n_out": spec.hidden}
        for n_experts in routers:
            yield "linear", "router", {"n_tokens": n, "n_in": spec.hidden, "n_out": n_experts}
        for moe in dict.fromkeys(layer.moe for layer in spec.layers if layer.moe):
            routed = {"n_tokens": n, "n_experts": moe.n_experts, "experts_per_token": moe.experts_per_token,
                      "routing": moe.routing}
            product = {**routed, "in_out": moe.in_out}
            yield "moe_route", "", routed
            yield "moe_gated_linear", "", {**product, "n_in": spec.hidden, "n_out": moe.intermediate,
                                           "by_pair": moe.routing == "sigmoid", "activation": moe.activation}
            yield "moe_linear", "", {**product, "n_in": moe.intermediate, "n_out": spec.hidden}
            yield "moe_combine", "", {**routed, "hidden": spec.hidden}
        if spec.per_layer_input:
            for label, n_in, n_out in (("inputs of all layers", spec.hidden, spec.per_layer_width),
                                       ("input gate", spec.hidden, spec.per_layer_input),
                                       ("input projection", spec.per_layer_input, spec.hidden)):
                yield "linear", label, {"n_tokens": n, "n_in": n_in, "n_out": n_out}
        rows = {"n_tokens": n, "hidden": spec.hidden}
        norm = {**rows, "round_first": True} if spec.norm_rounds_first else rows
        if spec.per_layer_input:
            part = {"n_tokens": n, "n_layers": len(spec.layers), "width": spec.per_layer_input}
            yield "add_norm", "alone", {**norm, "layer_scalar": False, "next": False}
            yield "mix_per_layer", "", {**part, "hidden": spec.hidden}
            yield "gate_per_layer", "", part
        yield "rms_norm", "", norm
        yield "add_norm", "", {**norm, "layer_scalar": any(layer.layer_scalar for layer in spec.layers)}
        for moe in dict.fromkeys(layer.moe for layer in spec.layers if layer.moe):
            if moe.routing == "softmax":
                yield "add_norms", "", rows
                yield "router_norm", "", rows
            else:
                yield "scale_rows", "", {**rows, "k": moe.experts_per_token}
        for temperature in temperatures(spec):
            yield "attention_temperature", "", {"n_tokens": n, "scale": temperature.scale, "floor": temperature.floor}
        yield "embed", "", {"n_tokens": n, "vocab": spec.vocab, "hidden": spec.hidden}
        for rope, head_dim in ropes(spec):
            yield "rope_angles", "", {"n_tokens": n, "n_pairs": rope.n_pairs(head_dim)}
    if spec.media:
        yield from tower_shapes(spec.media.tower, spec.hidden, max(sweep.n_tokens))
    for batch in sweep.batches:
        for context in sweep.contexts:
            for a in attentions:
                yield "attention", f"decode {kind_of(a)}", _attention(a, [(batch, 1, context)])
        logits = {"n_rows": batch, "vocab": spec.vocab}
        yield "linear", "head", {"n_tokens": batch, "n_in": spec.hidden, "n_out": spec.vocab, "out": "float32"}
        yield "select_rows", "", {"n_tokens": max(max(sweep.n_tokens), batch), "n_rows": batch, "width": spec.hidden}
        if spec.logit_softcap is not None:
            yield "logit_softcap", "", {**logits, "cap": spec.logit_softcap}
        yield "apply_edits", "", {**logits, "n_edits": 64}
        yield "sample", "greedy", {**logits, "temperature": 0.0, "top_k": 0, "top_p": 1.0}
        rule = {"temperature": 1.0, "top_k": 64, "top_p": 0.95}
        yield "sample", "top-k and top-p", {**logits, **rule}
        yield "top_logprobs", "", {**logits, "n": 20}
        yield "sample_drafts", "", {**logits, **rule}
        slots = {**logits, "n_rows": batch * (N_DRAFTS + 1)}
        yield "sample_with_drafts", "", {**slots, **rule}
        yield "relax_drafts", "", {**slots, "top_k": 10, "delta": 0.6}
        yield "accept_drafts", "", {"n_rows": slots["n_rows"], "n_drafts": N_DRAFTS}
        if spec.per_layer_input:                # whose drafts' heads have centroids
            size = gcd(spec.vocab // 4, DRAFT_SIZE)
            picked = {"n_rows": batch, "n_centroids": spec.vocab // size,
                      "n_chosen": min(DRAFT_CHOSEN, spec.vocab // size)}
            yield "pick_centroids", "", picked
            for op in ("candidate_argmax", "candidate_logits"):
                yield op, "", {**picked, "size": size, "hidden": DRAFT_HIDDEN}


def _common(label, other):
    """Of "qkv local" and "qkv global" that have one shape, "qkv"."""
    *name, kind = label.split() or [""]
    return " ".join(name) if [*name, kind] != other.split() and name == other.split()[:-1] else label


def _heads(a, n, has_kv):
    return {"n_tokens": n, "n_heads": a.n_heads, "n_kv_heads": a.n_kv_heads, "head_dim": a.head_dim,
            "n_pairs": a.rope and a.rope.n_pairs(a.head_dim), "v_norm": a.v_norm, "v_is_k": a.v_is_k,
            "interleaved": a.rope is not None and a.rope.interleaved, "qk_norm": a.qk_norm,
            "has_temperature": a.temperature is not None, "has_kv": has_kv}


def _attention(a, rows):
    return {"rows": rows, "n_heads": a.n_heads, "n_kv_heads": a.n_kv_heads, "head_dim": a.head_dim, "window": a.window,
            "chunk": a.chunk}
