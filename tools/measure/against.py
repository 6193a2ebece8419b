"""Other engines and kernels beside ours: same arrays, same run, in turns (A B A B), outputs compared before that.

    python tools/bench.py against --lane cpu --peer transformers                 # whole generations, a process a side
    python tools/bench.py against --preset gemma-4-31b --op attention,linear     # kernels
    python tools/bench.py against --preset gemma-4-31b --layers 12 --case 'decode={1,8}*1@1024' --case prefill=8192

Kernel peers: torch (cuBLAS, grouped_mm), compiled (torch.compile), sdpa, flex, triton (fused experts), flashinfer where
it is there. Model peers on our own weights: a torch model, compiled or not, and transformers; on the cpu lane
transformers has a process and weights of its own. A peer whose output differs is reported and not timed.
"""

from importlib.util import find_spec
from pathlib import Path

from measure.cases import int_list, one_of, parse_cases, whole
from measure.checkpoint_files import FOLDER
from measure.models import add_model_arguments
from measure.peer.checkpoints import SHAPES
from measure.report import BenchError

PEERS = ("transformers", "torch", "compiled", "sdpa", "flex", "flashinfer", "triton")
PRESETS = ("gemma-3-1b",)
CASES = ("decode=1*1@1024", "decode=8*1@1024", "prefill=2048")


def add_arguments(parser):
    parser.add_argument("--peer", type=one_of(*PEERS), metavar="A,B", help="of " + ", ".join(PEERS)
                        + " (default: transformers on cpu, elsewhere all)")
    parser.add_argument("--op", type=lambda text: text.split(","), metavar="A,B",
                        help="kernels of these ops only (default: all, unless --case is given)")
    parser.add_argument("--case", type=parse_cases, action="extend", metavar="CASE",
                        help="whole models at this case; repeatable (default: a few, unless --op is given)")
    parser.add_argument("--n-tokens", type=int_list, default="1,64,4096", metavar="LIST", help="of a kernel's step")
    parser.add_argument("--context", type=int_list, default="1024", metavar="LIST", help="of decode attention")
    parser.add_argument("--batch", type=int_list, default="1,8", metavar="LIST", help="sequences that decode at once")
    parser.add_argument("--sets", type=whole(1), metavar="N",
                        help="of a kernel's inputs, used in turn (default: so many that none is left in the L2 cache)")
    add_model_arguments(parser)
    parser.add_argument("--tokens", type=whole(2), default=16, metavar="N", help="decoded in one sample of a model")
    cpu = parser.add_argument_group("transformers on cpu")
    cpu.add_argument("--shapes", type=one_of(*SHAPES), default=",".join(SHAPES), metavar="A,B",
                     help="checkpoints: of " + ", ".join(SHAPES))
    cpu.add_argument("--prefill", type=whole(1), default=512, metavar="N", help="tokens of the long prompt")
    cpu.add_argument("--decode", type=whole(2), default=64, metavar="N", help="tokens generated to time decoding")
    cpu.add_argument("--threads", type=whole(1), default=2, metavar="N", help="BLAS and OpenMP threads of each side")
    cpu.add_argument("--cache", type=Path, default=FOLDER, metavar="DIR",
                     help="where checkpoints are written, and found again")


def run(args, report):
    """0, or 1 where outputs disagree; a missed goal is in the report and fails nothing: it is a time of one run."""
    names = args.peer or (["transformers"] if args.lane == "cpu" else list(PEERS))
    is_good = True
    if args.lane == "cpu" and "transformers" in names:
        is_good &= beside_transformers(args, report)
        names = [name for name in names if name != "transformers"]
    if names:
        is_good &= in_one_process(args, names, report)
    if not report.rows and is_good:
        raise BenchError(f"against: everything was skipped: {report.why_skipped()}")
    return 0 if is_good else 1


def is_installed(package):
    return find_spec(package) is not None


def beside_transformers(args, report):
    for package in ("torch", "transformers"):
        if not is_installed(package):
            report.skip("transformers", f"{package} is not installed; the extra `parity` brings it")
            return True
    from measure.peer import against_cpu
    return against_cpu.run(args, report) == 0


def in_one_process(args, names, report):
    """Kernels and whole models on one lane; whether all outputs agree."""
    from engine.backend import open_lane
    from measure.kernel.kernel_cases import cases_of, some
    from measure.peer.against_kernels import measure_kernels
    from measure.peer.against_model import check_cases, measure_models
    from measure.peer.peer_models import model_peers
    from measure.peer.peers import kernel_peers
    wants_kernels, wants_models = args.op or not (args.case or args.model), args.case or args.model or not args.op
    args.case = args.case or [case for text in CASES for case in parse_cases(text)]
    check_cases(args.case)
    cases = cases_of(args.preset or list(PRESETS), args.n_tokens, args.context, args.batch, args.op)
    lane, is_good = open_lane(args.lane, "auto"), True
    if wants_kernels:
        peers = kernel_peers(names, {case.op for case in some(cases, args.op)}, lane, report)
        is_good &= measure_kernels(cases, peers, lane, args, report)
    if wants_models:
        peers = model_peers(names, lane, report)
        if peers:
            is_good &= measure_models(args, PRESETS, lane, report, peers)
    return is_good
