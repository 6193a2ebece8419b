"""The least a step can take, by count of bytes and operations alone; no device, no run.

    bench.py floors --preset gemma-3-1b,gemma-4-31b --case 'decode={1,8,64}*1@{1024,32768}' \\
        --case 'prefill={2048,8192}' --bandwidth 4.3e12 --flops 790e12 --memory-bytes 150e9

time is the larger of what the memory and the arithmetic take; "of memory" and "of compute" are their shares of it, and
the one at 100 % bounds. resident is weights and KV cache, all that must be there at once but for the workspace.
Every layer counts for every token, as in published tables; "if dropped" is the time of a prompt whose tokens, but for
those that logits are wanted of, are left out once no layer needs them, as our steps do: gemma-4-e2b after 15 of 35.

    bench.py floors --preset gemma-4-31b,gemma-4-26b-a4b --n-draft-tokens 1,2,4,8 --bandwidth 4.3e12 --flops 790e12

--n-draft-tokens adds what drafting does to decode steps, where a draft was released for the preset: plain is a step
without, check one that checks so many drafted tokens of each sequence, draft the drafting of as many by a model whose
weights stay at 16 bits. Their sum over plain is the break-even, in tokens a check, and as the chance that a drafted
token holds where those before it do; gain is tokens a second over those without drafts where that chance is so much.
"""

from dataclasses import asdict

from measure.cases import parse_cases, positive
from measure.drafts import AUTO, add_counts, break_even_stats, chances, losing_note, times_by_count
from measure.models import text_of
from measure.report import BenchError, Goal, Row, Stat, load_document

DEFAULT_CASES = ("decode={1,8,64}*1@{1024,32768}", "prefill={2048,8192,32768}")
DEFAULT_PRESETS = ("gemma-3-1b", "gemma-4-31b")
CHANCES = (0.6, 0.8, 1.0)       # that a drafted token holds: Gemma 4's drafts reach 0.6 to 0.8
DRAFT_BYTES = 2                 # of a draft's weight, whatever the target's have


def add_arguments(parser):
    parser.add_argument("--case", type=parse_cases, action="extend", metavar="CASE",
                        help="LABEL=[N*]QUERY[@CONTEXT],...; braces make several; repeatable "
                        f"(default: {' '.join(DEFAULT_CASES)})")
    parser.add_argument("--weight-bits", type=int, choices=[32, 16, 8, 4], default=16, help="of a weight")
    parser.add_argument("--kv-bits", type=int, choices=[32, 16, 8], default=16, help="of a cached value")
    add_counts(parser, "1 to 16: where a draft was released for the preset")
    parser.add_argument("--acceptance", type=chances, metavar="LIST", help="chances that a drafted token holds where "
                        f"those before it do (default: {','.join(f'{chance:g}' for chance in CHANCES)})")
    parser.add_argument("--launch-gap", type=positive, default=None, metavar="S",
                        help="seconds that each launch adds to a step that drafts, or does not")
    parser.add_argument("--memory-bytes", type=positive, metavar="BYTES", help="say what does not fit")


def run(args, report):
    """A row for each preset and case; 0."""
    ceilings = given_ceilings(args)
    report.facts["ceilings"] = asdict(ceilings)
    cases = args.case or [case for text in DEFAULT_CASES for case in parse_cases(text)]
    for name in args.preset or DEFAULT_PRESETS:
        _, spec = text_of(name)
        for case in cases:
            if case.max_context > spec.max_positions:
                report.skip(f"{name}: {case}", f"the model's max_position_embeddings is {spec.max_positions}")
                continue
            report.add(floor_row(name, spec, case, ceilings, args.weight_bits, args.kv_bits, args.memory_bytes))
    if args.n_draft_tokens:
        add_drafts(args, report, cases, ceilings)
    return 0


def add_drafts(args, report, cases, ceilings):
    """A row for each preset that a draft was released for, decode case and number of drafted tokens."""
    from engine.models.presets import DRAFTS, draft_preset
    if AUTO in args.n_draft_tokens:
        raise BenchError(f"floors: --n-draft-tokens {AUTO} depends on acceptance, expected numbers")
    cases = [case for case in cases if case.is_decode]
    if not cases:
        report.skip("drafts", "no decode case: tokens are drafted where each sequence has one new one")
    for name in args.preset or DEFAULT_PRESETS:
        _, spec = text_of(name)
        if name not in DRAFTS:
            report.skip(f"{name}: drafts", f"no draft model of it is known, only of {', '.join(DRAFTS)}")
            continue
        draft = draft_preset(name, spec)
        for case in (case for case in cases if case.max_context <= spec.max_positions):
            for n in args.n_draft_tokens:
                report.add(draft_row(name, spec, draft, case, n, ceilings, args))


def draft_row(name, spec, draft, case, n_drafts, ceilings, args):
    """The Row of n_drafts drafted tokens in a decode step of one model."""
    sizes = args.weight_bits / 8, args.kv_bits / 8, DRAFT_BYTES
    times = times_by_count(spec, draft, case.rows, n_drafts, ceilings, sizes, args.launch_gap or 0.0)
    stats = {"plain": Stat("s", times.plain_s, "lower"), "check": Stat("s", times.check_s, "lower"),
             "draft": Stat("s", times.draft_s, "lower"), **break_even_stats(n_drafts, times.slowdown),
             **{f"gain at {chance:g}": Stat("x", times.gain(chance), "higher")
                for chance in args.acceptance or CHANCES}}
    shape = {"case": str(case), "n_draft_tokens": n_drafts, "weight_bits": args.weight_bits, "kv_bits": args.kv_bits,
             "launch_gap_us": args.launch_gap and 1e6 * args.launch_gap}
    return Row("floors", name, shape, stats, losing_note(n_drafts, times.slowdown))


def given_ceilings(args):
    """engine.cost.Ceilings from --bandwidth and --flops, or from the document of --ceilings."""
    from engine.cost import Ceilings
    if args.bandwidth is not None:
        return Ceilings(args.bandwidth, args.flops, "given")
    if args.ceilings is None:
        raise BenchError("floors: nothing is measured here; give --bandwidth BYTES_PER_S and --flops FLOP_PER_S, or "
                         "--ceilings FILE.json of an earlier run")
    facts = load_document(args.ceilings)["facts"].get("ceilings")
    if not isinstance(facts, dict) or not {"bytes_per_s", "flops_per_s"} <= set(facts):
        raise BenchError(f"{args.ceilings}: facts has no ceilings; bench.py ceilings --json FILE writes them")
    return Ceilings(facts["bytes_per_s"], facts["flops_per_s"], f"{facts.get('source', 'given')}, {args.ceilings}")


def floor_row(name, spec, case, ceilings, weight_bits=16, kv_bits=16, memory_bytes=None):
    """The Row of one step of one model."""
    from engine.cost import floor
    cost, dropped = (floor(spec, case.rows, weight_bits / 8, kv_bits / 8, drops=drops) for drops in (False, True))
    time_s = cost.time_s(ceilings)
    resident = resident_bytes(spec, case, weight_bits / 8, kv_bits / 8)
    stats = {"bytes": Stat("bytes", cost.bytes, "lower"), "flops": Stat("flop", cost.flops, "lower"),
             "time": Stat("s", time_s, "lower"), "rate": Stat("tokens/s", case.n_tokens / time_s, "higher"),
             "of memory": Stat("%", 100 * cost.bytes / ceilings.bytes_per_s / time_s),
             "of compute": Stat("%", 100 * cost.flops / ceilings.flops_per_s / time_s),
             "resident": Stat("bytes", resident, "lower")}
    if dropped != cost:
        stats["if dropped"] = Stat("s", dropped.time_s(ceilings), "lower")
    goal = Goal("resident", at_most=memory_bytes) if memory_bytes else None
    shape = {"case": str(case), "weight_bits": weight_bits, "kv_bits": kv_bits}
    return Row("floors", name, shape, stats, goal=goal)


def resident_bytes(spec, case, weight_bytes, kv_bytes):
    """Every weight, and K and V of every position a layer can still see."""
    from engine.floor import visible
    from engine.kv_cache import pool_specs
    from engine.tensors import n_weights
    kv = sum(part.n_seqs * pool.token_bytes(kv_bytes) * visible(1, part.context, pool.window, pool.chunk)[0]
             for part in case.parts for pool in pool_specs(spec))
    return n_weights(spec) * weight_bytes + kv
