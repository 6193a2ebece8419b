"""Whole steps of a model: time to first token, tokens per second, and where a step's time goes.

    bench.py engine --preset gemma-3-1b --case 'prefill=8192' --case 'decode={1,8,64}*1@1024'
    bench.py engine --preset gemma-4-31b --layers 12 --case 'verify=16*5@4096' --case 'mix=2048,16*1@4096'

A case is N sequences with QUERY new tokens each, which then stand at CONTEXT positions. What lies before counts as
computed (random K and V), so decoding at 32 k needs no prefill. The label verify wants a token after each new one; with
a draft model those after the first are drafts, which are checked, and as many are drafted anew.

    bench.py engine --model DIR --draft DIR --n-draft-tokens 2,4,8 --case 'decode={1,8}*1@256'
    bench.py engine --preset gemma-4-31b --n-draft-tokens 2,4,8 --acceptance 0.6,1 --case 'decode=1*1@1024'

"drafts" is decoding with drafts beside decoding without, in turns on the same sequences, whose prompts are computed,
and which must say the same text. --acceptance makes each drafted token one that holds, with that chance: the draft
model drafts all the same, so a step takes what it takes. step is one step of the loop; a check judges the drafts of a
sequence and gives at least one token. speed-up is the ratio of the medians of rate. break-even is the number of tokens
a check that makes up for the longer step, and the chance, the same for each drafted token whose predecessors hold, that
gives as many: by the floors, and measured.

"step" is that step, repeated. wall is from building the batch to having the tokens; gpu (on a CPU: ops) is its launches
alone, back to back; host_gap is the share of the wall time in which the GPU has nothing to do. "decode" lets the
engine's loop go on from there for --steps tokens a sequence: tpot is (last token's time - first's) / (n - 1), itl the
time between two tokens of a sequence. "prefill" is whole prompts, all submitted at once, through the loop in chunks of
--max-batch-tokens: ttft is from there to a prompt's first token. rate is tokens of all sequences per second, in
"prefill" those of the prompts (pp and tg of llama-bench). floor is what weights, K and V alone take at the ceilings.

The table "step" has the step's ops, equal ones together, each group timed by itself. percent_of_roof is the time that
the bytes and operations of any implementation take at the ceilings, over the measured time. Its last rows add up to the
wall time. On the emulated lane nothing is timed: bytes, operations and steps are counted.
"""

import gc
from argparse import BooleanOptionalAction
from contextlib import nullcontext
from dataclasses import replace

from engine.backend import open_lane
from engine.draft_length import MOST_DRAFTS
from engine.errors import MemoryPlanError
from engine.tensors import n_weights
from measure.cases import parse_cases, whole
from measure.ceilings import ceilings_of
from measure.drafts import add_draft_arguments, chances, draft_of, most_of
from measure.models import add_model_arguments, add_ple, models_of
from measure.report import BenchError
from measure.step.drafted_case import DraftedCase, tokens_at_most
from measure.step.engine_case import EMULATED_STEPS, EngineCase
from measure.step.ranges import marked
from measure.step.seats import VERIFY, WARMUPS, Needs, open_core

GPU_CASES = ("prefill=8192", "decode={1,8,64}*1@1024", "decode=8*1@32768", "verify=16*5@4096", "mix=2048,16*1@4096")
CPU_CASES = ("prefill=512", "decode={1,8}*1@512", "mix=128,4*1@512")
LARGE_CPU_CASES = ("prefill=64", "decode=1*1@128")
EMULATED_CASES = ("prefill=16", "decode=2*1@32")
LARGE = 1e9             # weights: a step of so many takes a CPU the better part of a second


def add_arguments(parser):
    add_model_arguments(parser)
    parser.add_argument("--case", type=parse_cases, action="extend", metavar="CASE",
                        help="LABEL=[N*]QUERY[@CONTEXT],...; braces make several; repeatable (default on a GPU: "
                        + " ".join(GPU_CASES).replace("%", "%%") + ")")
    parser.add_argument("--steps", type=whole(2), default=32, metavar="N", help="decode steps of a sample")
    parser.add_argument("--max-batch-tokens", type=whole(1), default=8192, metavar="N", help="tokens of a step at most")
    parser.add_argument("--page-size", type=whole(1), default=16, metavar="N", help="tokens of one KV page")
    parser.add_argument("--graphs", action=BooleanOptionalAction, default=True,
                        help="replay decode steps as CUDA graphs")
    add_draft_arguments(parser)
    parser.add_argument("--acceptance", type=chances, metavar="LIST", help="chances that a drafted token holds where "
                        "those before it do (default: what is drafted is checked as it is)")
    add_ple(parser)
    parser.add_argument("--gemm", choices=["own", "cublas"], default="own", help="matrix products on cuda")
    parser.add_argument("--ops", action=BooleanOptionalAction, default=True, help="the table of a step's ops")
    parser.add_argument("--nvtx", action="store_true", help="mark steps, layers and ops for a profiler; no graphs then")


def run(args, report):
    """Rows of every model and case; 0."""
    lane = open_lane(args.lane, "auto", args.gemm)
    models = models_of(args, ["gemma-3-1b" if lane.name == "cuda" else "gemma-3-270m"])
    ceilings = ceilings_of(args, lane, report)
    for model in models:
        try:
            measure_model(model, lane, ceilings, args, report)
        except MemoryPlanError as error:
            report.skip(model.name, error)
        gc.collect()                        # the next model needs the memory
    if not any(row.section == "engine" for row in report.rows):
        raise BenchError(f"engine: everything was skipped: {report.why_skipped()}")
    return 0


def default_cases(lane_name, spec):
    """[Case] that say most of a model of that size in a minute or two."""
    texts = GPU_CASES
    if lane_name != "cuda":
        texts = EMULATED_CASES if lane_name == "emulated" else CPU_CASES if n_weights(spec) < LARGE else LARGE_CPU_CASES
    return [case for text in texts for case in parse_cases(text)]


def measure_model(model, lane, ceilings, args, report):
    """Opens the model with room for all cases that can run, and measures each."""
    n_steps = EMULATED_STEPS if lane.name == "emulated" else WARMUPS + args.steps
    cases, draft, needs = args.case or default_cases(lane.name, model.spec), draft_of(args, model, report), []
    n_drafts = None
    if draft:
        checked = [part.n_query - 1 for case in cases if case.label == VERIFY for part in case.parts]
        n_drafts = max([most_of(args.n_draft_tokens), *(n for n in checked if n <= MOST_DRAFTS)])
    for case in cases:
        need = Needs(case, n_steps, model.spec.max_positions, args.max_batch_tokens, n_drafts)
        if draft and case.is_decode:
            need = _going_on(need, model, lane, args, report)
        why_not = _why_not(need)
        if why_not:
            report.skip(f"{model.name}: {case}", why_not)
        else:
            needs.append(need)
    if not needs:
        return
    options = {"page_size": args.page_size, "gemm": args.gemm, "ple": args.ple,
               "graphs": args.graphs and not args.nvtx}
    if draft:
        options |= {"draft": str(draft.path or "random weights"), "n_draft_tokens": n_drafts}
    with model.checkpoint(args.seed) as checkpoint, draft.checkpoint(args.seed) if draft else nullcontext() as other:
        core, needs = open_core(model.name, model.spec, needs, lane, checkpoint, report, options, args.seed,
                                draft and (draft.spec, other))
    with marked(core) if args.nvtx else nullcontext():
        for need in report.bar(needs, f"{model.name}: cases"):
            try:
                EngineCase(core, model, need, ceilings, args, report).measure()
                if need.n_beyond:
                    DraftedCase(core, model, need, ceilings, args, report).measure_drafts()
            except BenchError as error:
                report.skip(f"{model.name}: {need.case}", error)


def _going_on(need, model, lane, args, report):
    """The need, with the tokens that its sequences go on for where drafts are measured; as it is where those do not
    fit, which is told."""
    more = replace(need, n_beyond=tokens_at_most(need, lane, args))
    why_not = ""
    if more.longest_wanted > more.max_positions:
        why_not = (f"they take {more.n_beyond} tokens beyond the context, the model's max_position_embeddings is "
                   f"{more.max_positions}; lower --repeats or --steps")
    elif need.case.n_seqs * (1 + need.n_drafts) > need.max_batch_tokens:
        why_not = f"a step of {need.case.n_seqs * (1 + need.n_drafts)} tokens, --max-batch-tokens is " \
                  f"{need.max_batch_tokens}"
    if why_not:
        report.skip(f"{model.name}: {need.case}, drafts", why_not)
    return need if why_not else more


def _why_not(need):
    """Why a case cannot run at all, or ""."""
    case = need.case
    if case.max_context > need.max_positions:
        return f"the model's max_position_embeddings is {need.max_positions}"
    if not need.is_one_step and not case.is_prompt:
        return f"a step of {case.n_tokens} tokens, --max-batch-tokens is {need.max_batch_tokens}"
    if need.n_drafts is not None and case.label == VERIFY:
        n_checked = max(part.n_query for part in case.parts) - 1
        if n_checked > MOST_DRAFTS:
            return f"{n_checked} drafted tokens of a sequence, at most {MOST_DRAFTS} are"
    if case.is_decode and need.n_steps > need.max_positions - 1:
        return f"{need.n_steps} decode steps do not fit the {need.max_positions} positions of the model"
    return ""
