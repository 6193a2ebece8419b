"""The draft model beside what a command measures, how many tokens it drafts, and what that must bring to gain anything.

A step that checks K drafted tokens of each sequence and drafts K anew takes longer than a plain one by some factor.
It gains where it gives more tokens than that: the break-even. It is told as tokens a check, and as the chance, the same
for each drafted token whose predecessors hold, that gives so many.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from measure.report import BenchError, Stat

AUTO = "auto"


@dataclass(frozen=True)
class Draft:
    """A draft model for a Model. path: the checkpoint directory, None for random weights."""

    spec: object
    path: Path | None = None

    def checkpoint(self, seed):
        """The context of what Core.open takes."""
        from loaders.safetensors import Checkpoint
        from measure.random_weights import RandomDraft
        return nullcontext(RandomDraft(self.spec, seed)) if self.path is None else Checkpoint.open(self.path)


def add_draft_arguments(parser):
    parser.add_argument("--draft", type=Path, metavar="DIR", help="a draft model's checkpoint, for --model DIR; with "
                        "--n-draft-tokens presets have random weights in the shape of the draft released for them")
    add_counts(parser)


def add_counts(parser, words="1 to 16 or auto: each beside no drafts (with --draft: 4)"):
    parser.add_argument("--n-draft-tokens", type=draft_counts, metavar="LIST",
                        help=f"tokens to draft in a step, {words}")


def draft_counts(text):
    """'2,4,auto' -> [2, 4, "auto"], an argparse type."""
    from engine.draft_length import MOST_DRAFTS
    counts = [int(item) if item.isdecimal() else item for item in text.split(",")]
    for count, item in zip(counts, text.split(","), strict=True):
        if count != AUTO and not (isinstance(count, int) and 1 <= count <= MOST_DRAFTS):
            raise BenchError(f"{item!r} drafted tokens, expected 1 to {MOST_DRAFTS}, or {AUTO}")
    return counts


def chances(text):
    """'0.6,1' -> [0.6, 1.0], an argparse type."""
    values = []
    for item in text.split(","):
        try:
            values.append(float(item))
        except ValueError:
            values.append(-1.0)
        if not 0 <= values[-1] <= 1:
            raise BenchError(f"{item!r} is no chance, expected a number from 0 to 1")
    return values


def most_of(counts):
    """The most tokens that one of `counts` drafts."""
    from engine.draft_length import AUTO_DRAFTS
    return max((AUTO_DRAFTS if count == AUTO else count for count in counts), default=0)


def draft_of(args, model, report):
    """The Draft that the arguments of add_draft_arguments ask for beside a Model; args.n_draft_tokens then is a list.
    None where they ask for none, or there is none, which is told. Raises BenchError, ConfigError, CheckpointError."""
    from engine.draft_checkpoint import describe_draft
    from engine.models.presets import DRAFTS, draft_preset
    if args.draft is None and not args.n_draft_tokens:
        if getattr(args, "acceptance", None):
            raise BenchError("--acceptance is of drafted tokens: it goes with --n-draft-tokens")
        return None
    args.n_draft_tokens = args.n_draft_tokens or [4]
    if (args.draft is None) != (model.path is None):
        raise BenchError("--draft DIR goes with --model DIR, which it was made for" if args.draft else
                         "--n-draft-tokens with --model DIR needs its draft model, --draft DIR")
    if args.draft is not None:
        return Draft(describe_draft(args.draft, model.spec), args.draft)
    if model.name in DRAFTS:
        return Draft(draft_preset(model.name, model.spec))
    report.skip(f"{model.name}: drafts", f"no draft model of it is known, only of {', '.join(DRAFTS)}")
    return None


@dataclass(frozen=True)
class DraftTimes:
    """Seconds of a plain step, of one that checks so many drafted tokens of each sequence, and of drafting as many."""

    plain_s: float
    check_s: float
    draft_s: float
    n_drafts: int

    @property
    def slowdown(self):
        return (self.check_s + self.draft_s) / self.plain_s

    def gain(self, chance):
        """How many times as many tokens a second as without drafts, where each holds with this chance."""
        return sum(chance ** i for i in range(self.n_drafts + 1)) / self.slowdown


def drafting_cost(spec, rows, n_rounds, weight_bytes=2, kv_bytes=2):
    """The least that drafting n_rounds tokens each costs for rows [(n_seqs, context)]. spec: an AssistantSpec."""
    from engine.cost import Cost, draft_step
    if not n_rounds:
        return Cost()
    total = draft_step(spec, sum(n for n, _ in rows), 1, weight_bytes, kv_bytes)
    for n, context in rows:                             # all but the first key that each sees
        seen, first = (draft_step(spec, n, at, weight_bytes, kv_bytes) for at in (context, 1))
        total += Cost(seen.bytes - first.bytes, flops=seen.flops - first.flops)
    return Cost(n_rounds * total.bytes, flops=n_rounds * total.flops)


def times_by_count(spec, draft, rows, n_drafts, ceilings, sizes=(2, 2, 2), gap_s=0.0):
    """DraftTimes of a decode step of rows [(n_seqs, 1, context)], by the floors.

    sizes  bytes of a weight of the model, of one element of K or V, of a weight of the draft
    gap_s  what a launch adds to the time that its bytes and operations take
    """
    from engine.cost import floor
    from engine.draft_length import LAUNCHES
    weight_bytes, kv_bytes, draft_bytes = sizes
    plain, check = (floor(spec, [(n, 1 + k, context + k, 1 + k) for n, _, context in rows], weight_bytes, kv_bytes)
                    for k in (0, n_drafts))
    one = drafting_cost(draft, [(n, context) for n, _, context in rows], 1, draft_bytes, kv_bytes)
    gaps_s, draft_gaps_s = (LAUNCHES * (len(of.layers) + 1) * gap_s for of in (spec, draft))
    return DraftTimes(plain.time_s(ceilings) + gaps_s, check.time_s(ceilings) + gaps_s,
                     n_drafts * (one.time_s(ceilings) + draft_gaps_s), n_drafts)


def break_even_stats(n_drafts, slowdown, by=""):
    """{name: Stat}. by: what the slowdown comes from, in the names."""
    from engine.cost import break_even
    chance = break_even(n_drafts, slowdown)
    stats = {f"break-even tokens{by}": Stat("1", slowdown, "lower")}
    return stats if chance is None else {**stats, f"break-even{by}": Stat("%", 100 * chance, "lower")}


def losing_note(n_drafts, slowdown, by=""):
    """[a note] where no acceptance pays."""
    return [f"{by}drafting {n_drafts} tokens loses even if all of them hold"] if slowdown > n_drafts + 1 else []


def draft_stats(counts):
    """({name: Stat}, notes) of DraftHealth.stats(); nothing where no draft was checked."""
    if not counts["checks"]:
        return {}, []
    rates = " ".join(f"{100 * rate:.0f}" for rate in counts["acceptance"])
    return {"tokens a check": Stat("1", counts["tokens_per_check"], "higher"),
            "accepted": Stat("%", 100 * counts["accepted"] / counts["drafted"], "higher")}, \
           [f"acceptance by place: {rates} %"]
