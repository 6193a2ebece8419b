"""A stream of requests in real time: latencies, rates and goodput at each rate of arrival.

    bench.py serve --preset gemma-3-1b --rate 4,16,inf --requests 64 --input 512 --output 128
    bench.py serve --preset gemma-3-270m --lane cpu --rate inf --max-concurrency 4 --shared-prefix 256
    bench.py serve --model DIR --draft DIR --n-draft-tokens 2,4,auto

Requests are due at random (Poisson) times, and sent when they are; one thread submits, steps and looks at the clock.
ttft (to the first token) counts from when a request was due, so what it waits for a step to end counts; under
--max-concurrency from when there was room for it. tpot is (last token's time - first's) / (tokens - 1) of a request,
itl the time between two of its tokens. Figures are of the steady state: from the end of the first request to the last
arrival. output counts generated tokens, total those of prompts too; goodput is requests per second that keep both
--slo-ttft and --slo-tpot; busy is the share of the time in which a step runs, running the sequences in one.

With a draft model each trace is also played without drafts, and every request must have the same text with them. A
check judges the drafts of a sequence and gives at least one token; itl is 0 between tokens of one check.
"""

import gc
import math
from contextlib import nullcontext

from measure.cases import whole
from measure.drafts import add_draft_arguments, draft_of, draft_stats, most_of
from measure.models import add_model_arguments, add_ple, models_of
from measure.report import BenchError, Row
from measure.requests.arrivals import draw_requests, longest
from measure.requests.playing import play
from measure.requests.serving import stats_of, stats_over

# The server scenario of MLPerf Inference's Llama 2 70B: time to first token, and per token after it.
SLO_TTFT_S, SLO_TPOT_S = 2.0, 0.2


def rate_list(text):
    """'4,8.5,inf' -> requests per second; inf is all at once. An argparse type."""
    rates = []
    for part in text.split(","):
        try:
            rates.append(float(part))
        except ValueError:
            rates.append(math.nan)
        if not rates[-1] > 0:
            raise BenchError(f"rates {text!r}: {part!r} is none, expected requests per second above 0, or inf")
    return rates


def seconds(text):
    """An argparse type: a number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise BenchError(f"{text!r} is no time in seconds, expected a number above 0")
    return value


def share(text):
    """An argparse type: a number from 0 to below 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise BenchError(f"{text!r} is no share, expected a number from 0 to below 1")
    return value


def add_arguments(parser):
    add_model_arguments(parser)
    add_draft_arguments(parser)
    add_ple(parser)
    parser.set_defaults(repeats=1)          # the requests of a trace are samples already
    parser.add_argument("--requests", type=whole(1), default=64, metavar="N", help="of a trace")
    parser.add_argument("--rate", type=rate_list, default="4,8,inf", metavar="LIST",
                        help="requests per second; inf is all at once")
    parser.add_argument("--input", type=whole(1), default=512, metavar="N", help="mean tokens of a prompt")
    parser.add_argument("--output", type=whole(1), default=128, metavar="N", help="mean tokens to generate")
    parser.add_argument("--length-spread", type=share, default=0.0, metavar="SHARE",
                        help="lengths are uniform within mean * (1 - SHARE) .. mean * (1 + SHARE)")
    parser.add_argument("--shared-prefix", type=whole(0), default=0, metavar="N",
                        help="tokens at the beginning of every prompt that are the same in all")
    parser.add_argument("--max-concurrency", type=whole(1), metavar="N", help="requests in flight at most")
    parser.add_argument("--max-seqs", type=whole(1), default=64, metavar="N", help="sequences computed at once")
    parser.add_argument("--max-batch-tokens", type=whole(1), default=2048, metavar="N", help="tokens of a step")
    parser.add_argument("--slo-ttft", type=seconds, default=SLO_TTFT_S, metavar="SECONDS",
                        help="promised time to first token")
    parser.add_argument("--slo-tpot", type=seconds, default=SLO_TPOT_S, metavar="SECONDS",
                        help="promised time per token")


def run(args, report):
    """A row for each model and rate; 0."""
    from engine.backend import open_lane
    if args.lane == "emulated":
        raise BenchError("serve measures time, and the emulated lane's says nothing of a GPU; use --lane cpu or cuda")
    default = ["gemma-3-1b" if args.lane.startswith("cuda") else "gemma-3-270m"]
    for model in models_of(args, default):
        serve_model(args, report, model, open_lane(args.lane, "auto"))
        gc.collect()                        # the next model needs the memory
    return 0


def serve_model(args, report, model, lane):
    """Opens the model, warms it up, and plays every rate `repeats` times, in turns, without drafts and with as many as
    asked for."""
    trace_of(args, model.spec.vocab, args.rate[0], 0)       # what is wrong with it shows before minutes of work
    draft = draft_of(args, model, report)
    counts = [0, *(args.n_draft_tokens if draft else ())]
    core = core_for(args, model, lane, draft)
    for n_drafts in counts:
        set_drafts(core, n_drafts)
        warm_up(core, args)
    cases = [(rate, n_drafts) for rate in args.rate for n_drafts in counts]
    values, notes, texts = {case: [] for case in cases}, {case: [] for case in cases}, {}
    with report.bar(len(cases) * args.repeats * args.requests, f"{model.name}: requests") as bar:
        for repeat in range(args.repeats):
            for rate, n_drafts in cases:
                set_drafts(core, n_drafts)
                tasks = []
                played = play(trace_of(args, model.spec.vocab, rate, repeat), core.loop, task_maker(core, tasks),
                              args.max_concurrency, bar.update)
                check_texts(tasks, texts.setdefault((rate, repeat), tasks))
                found, window = stats_of(played, args.slo_ttft, args.slo_tpot)
                said = [window.note]
                if n_drafts:
                    stats, more = draft_stats(core.control.health.stats())
                    found |= {name: (stat.median, stat.unit, stat.better) for name, stat in stats.items()}
                    said += more
                values[rate, n_drafts].append(found | {"window": (window.seconds, "s", "")})
                notes[rate, n_drafts] += [note for note in said if note and note not in notes[rate, n_drafts]]
    for rate, n_drafts in cases:
        of = notes[rate, n_drafts]
        if args.shared_prefix:
            of.append("there is no prefix cache yet: the shared prefix is computed for every request")
        of += [f"decode steps of {bucket} ran eagerly: {why}" for bucket, why in core.graphs.failures.items()]
        shape = shape_of(args, model, rate) | ({"n_draft_tokens": n_drafts} if draft else {})
        report.add(Row("serve", model.name, shape, stats_over(values[rate, n_drafts]), of))


def set_drafts(core, n_drafts):
    """From now on so many tokens are drafted, an int or "auto", and what became of them is counted anew."""
    from engine.draft_health import DraftHealth
    if core.control:
        core.control.wanted, core.control.health = n_drafts, DraftHealth()
        core.control.health.has_warned = True               # random weights hardly ever agree, and the row says it


def check_texts(tasks, expected):
    """Raises BenchError unless each request has the text of its number among `expected`."""
    for number, (task, other) in enumerate(zip(tasks, expected, strict=True)):
        if task.output.token_ids != other.output.token_ids:
            raise BenchError(f"drafts change the text of request {number}; no figure is kept")


def shape_of(args, model, rate):
    ple = {"ple": "host"} if args.ple == "host" and model.spec.per_layer_input else {}
    return {"lane": args.lane, "layers": model.n_layers, **ple, "rate": "inf" if rate == math.inf else rate,
            "requests": args.requests, "input": args.input, "output": args.output, "spread": args.length_spread,
            "shared_prefix": args.shared_prefix, "max_concurrency": args.max_concurrency, "max_seqs": args.max_seqs,
            "max_batch_tokens": args.max_batch_tokens, "slo_ttft": args.slo_ttft, "slo_tpot": args.slo_tpot}


def trace_of(args, vocab, rate, repeat):
    """The requests of one repeat; every rate has the same ones."""
    return draw_requests(args.requests, rate, args.input, args.output, vocab, [args.seed, repeat], args.length_spread,
                         args.shared_prefix)


def core_for(args, model, lane, draft=None):
    """The Core for the longest request there may be, and the Draft beside it."""
    from engine.config import EngineConfig
    from engine.core import Core
    n_longest = sum(longest(mean, args.length_spread) for mean in (args.input, args.output))
    most = most_of(args.n_draft_tokens) if draft else 0
    options = {"draft": str(draft.path or "random weights"), "n_draft_tokens": most} if draft else {}
    of_warming = min(2 * args.max_seqs * (1 + most) + 1, model.spec.max_positions)
    config = EngineConfig(device=args.lane, max_seqs=args.max_seqs, max_batch_tokens=args.max_batch_tokens,
                          max_seq_len=max(n_longest, of_warming), ple=args.ple, **options)
    with model.checkpoint(args.seed) as checkpoint, draft.checkpoint(args.seed) if draft else nullcontext() as other:
        return Core.open(model.spec, config, lane, checkpoint, draft=draft and (draft.spec, other))


def task_maker(core, tasks=None):
    """task_of for `play`: greedy, to the length asked for. tasks: a list that gets them, in order."""
    from engine.sampling_params import SamplingParams
    from engine.tasks import Generation

    def task_of(number, request):
        params = SamplingParams(max_tokens=request.n_output, temperature=0, ignore_eos=True)
        task = Generation(list(request.tokens), params, number, (), None, core.plan.max_seq_len)
        if tasks is not None:
            tasks.append(task)
        return task
    return task_of


def warm_up(core, args):
    """Runs a whole prompt, then decode steps of every batch size twice: a graph is captured the second time. A prompt
    of one token is a decode step already, and every second step, or later, one of them ends, however many drafts
    hold."""
    most = core.control.most if core.control and core.control.wanted else 0
    vocab = core.spec.vocab
    n = min(args.max_seqs, args.requests, args.max_concurrency or args.requests)
    play(draw_requests(1, math.inf, args.input, 1, vocab, args.seed), core.loop, task_maker(core))
    longest_end = core.plan.max_seq_len - 1
    ends = [draw_requests(1, math.inf, 1, min(2 * (i + 1) * (1 + most), longest_end), vocab, [args.seed, i])[0]
            for i in range(n)]
    play(ends, core.loop, task_maker(core))
