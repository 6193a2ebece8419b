"""Everything this project can say about a GPU, by one command that ends in time.

    python3 tools/gpu_report.py                          # under 9 minutes on one GPU
    python3 tools/gpu_report.py --only tests,kernels --out report
    python3 tools/gpu_report.py --lane cpu --quick       # the same flow at toy sizes, without a GPU

Ceilings, the test suite on the GPU, every kernel, whole steps of real shapes, peers side by side, a stream of requests,
loading: each is a process of its own under a time limit, so what fails or hangs loses nothing of the others. Writes
benchmarks/<gpu>/<date>-<commit>.json and .md, again after each part. It installs and downloads nothing, leaves clocks
and power as they are, and shortens or skips what does not fit, by name. Exit status: 0, 1 where a part failed or did
not end, 2 where it cannot run.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))     # the checkout, where it is not installed

from measure import machine
from measure.report import BenchError, Report, show
from measure.runs import watchdog
from measure.runs.gpu_parts import chosen, full_parts, quick_parts
from measure.runs.parts import Runner, as_markdown, last_line, why_incomplete
from measure.tables import aligned, text

LIMIT_S = 540.0
WRITE_S = 10.0              # for the files at the end
PROBE_S = 60.0              # for opening the GPU
SCRATCH_BYTES = 8 << 30     # the checkpoint that `load` writes, and more
PACKAGES = ("numpy", "ml_dtypes", "cupy-cuda13x", "cupy-cuda12x", "pytest", "torch", "triton", "transformers",
            "flashinfer-python", "safetensors", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")
PROBE = """
import json
from engine.backend import open_lane
lane = open_lane({lane!r}, "auto")
properties = lane.cupy.cuda.runtime.getDeviceProperties(lane.device.id)
print(json.dumps({{"name": properties["name"].decode(), "free_bytes": lane.memory_bytes()}}))
"""
SMI = ("nvidia-smi", "-q", "-d", "MEMORY,UTILIZATION,ECC,TEMPERATURE,POWER,CLOCK,COMPUTE,PERFORMANCE")


def build_parser():
    parser = argparse.ArgumentParser(prog="gpu_report.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lane", default="cuda", metavar="LANE", help="cuda, cuda:N, or with --quick cpu or emulated "
                        "(default: cuda)")
    parser.add_argument("--quick", action="store_true", help="toy sizes: does the flow work?")
    parser.add_argument("--only", type=lambda names: names.split(","), default=[], metavar="A,B",
                        help="these parts; engine stands for every engine-...")
    parser.add_argument("--skip", type=lambda names: names.split(","), default=[], metavar="A,B",
                        help="not these parts")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="S",
                        help=f"seconds for everything together (default: {LIMIT_S:.0f})")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: benchmarks/<gpu>, with "
                        "--quick build/report)")
    parser.add_argument("--commit", metavar="HASH", help="of this checkout, where git cannot say")
    return parser


def main(argv=None):
    began, argv = time.monotonic(), sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(argv)
    try:
        with Stop.listening() as stop:
            return make_report(args, argv, began + args.limit, stop)
    except BenchError as error:
        print(f"gpu_report: {error}", file=sys.stderr)
        return 2


def make_report(args, argv, until, stop):
    """Runs the parts and writes the report; returns the exit status."""
    check(args)
    is_gpu = args.lane.startswith("cuda")
    index = int(args.lane.partition(":")[2] or 0) if is_gpu else None
    folder = Path(tempfile.mkdtemp(prefix="rawgem-report-", dir=scratch_root()))
    try:
        gpu = probe(args.lane, folder, stop) if is_gpu else {"name": args.lane}
        report = Report(shlex.join(["python3", "tools/gpu_report.py", *argv]), vars(args), gpu=index)
        parts = quick_parts(args.lane) if args.quick else full_parts(args.lane, gpu["free_bytes"])
        parts = chosen(parts, args.only, args.skip)
        report.facts["packages"] = packages()
        if is_gpu:
            report.facts["nvidia_smi"] = nvidia_smi(folder)
        out = args.out or machine.ROOT / ("build/report" if args.quick else f"benchmarks/{slug(gpu['name'])}")
        out.mkdir(parents=True, exist_ok=True)
        runner = Runner(report, folder, until - WRITE_S, (sys.executable,), machine.ROOT, stop.is_set)
        stem = f"{report.date[:10]}-{short_commit(args.commit or machine.commit())}"
        runner.after_each = lambda: write(runner, out / stem, args.commit, "the run went on from here")
        is_good = runner.run(parts)
        document = write(runner, out / stem, args.commit, "interrupted" if stop.is_set() else why_incomplete(report))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    show(f"{text(document)}\n\n{part_lines(report.facts['parts'])}\n\n{out / stem}.json\n{out / stem}.md")
    return 0 if is_good and not stop.is_set() else 1


def check(args):
    if re.fullmatch(r"cuda(:\d+)?|cpu|emulated", args.lane) is None:
        raise BenchError(f"no lane {args.lane!r}, expected cuda, cuda:N, cpu or emulated")
    if not args.lane.startswith("cuda") and not args.quick:
        raise BenchError(f"a whole report is of a GPU; --lane {args.lane} goes with --quick")
    if not 0 < args.limit < float("inf"):
        raise BenchError(f"--limit {args.limit} is no time in seconds, expected a number above 0")


class Stop:
    """Whether this process was asked to end: SIGTERM, SIGINT and SIGHUP are noted, and what runs is ended in order."""

    def __init__(self):
        self._asked = False

    def is_set(self):
        return self._asked

    def _ask(self, *_):
        self._asked = True

    @classmethod
    @contextmanager
    def listening(cls):
        stop, before = cls(), {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, stop._ask)
                      for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            yield stop
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def scratch_root():
    """Where temporary files go: memory where files have room in it, so that a disk's speed is no matter."""
    memory = "/dev/shm"
    has_room = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free >= SCRATCH_BYTES
    return memory if has_room else None


def probe(lane, folder, stop):
    """{"name", "free_bytes"} of the GPU. Raises BenchError unless the engine opens it: in a process of its own, because
    a driver may hang."""
    log = folder / "probe.log"
    outcome = watchdog.run([sys.executable, "-c", PROBE.format(lane=lane)], PROBE_S, log, machine.ROOT,
                           is_stopped=stop.is_set)
    if outcome.status != watchdog.OK:
        raise BenchError(f"the engine cannot open {lane} ({outcome.why}): {last_line(log)}; --lane cpu --quick "
                         "needs none")
    return json.loads(last_line(log))


def packages():
    """{package: version} of what is installed and what a part may want; None for what is not there."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def nvidia_smi(folder):
    """What it says of the GPUs, lines; it changes nothing."""
    log = folder / "nvidia-smi.log"
    outcome = watchdog.run(SMI, 20, log, grace_s=1)
    return watchdog.tail(log, 400, 64_000) if outcome.status == watchdog.OK else [f"nvidia-smi: {outcome.why}"]


def part_lines(parts):
    """A line for each part: how it ended, and why behind it."""
    rows = [[part["name"], part["status"], f"{part['seconds']:.0f}"] for part in parts]
    lines = aligned(["part", "status", "s"], rows).splitlines()
    return "\n".join(f"{line}  {why}".rstrip() for line, why in
                     zip(lines, ["", *(part["why"] for part in parts)], strict=True))


def slug(name):
    """'NVIDIA H100 80GB HBM3' -> 'nvidia-h100-80gb-hbm3'"""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def short_commit(commit):
    """As file names have it: 'f3c4984', 'f3c4984-changes' where files differ from it, 'no-commit' outside git."""
    if not commit:
        return "no-commit"
    head, plus, _ = commit.partition("+")
    return re.sub(r"[^\w.-]+", "-", head)[:7] + ("-changes" if plus else "")


def write(runner, stem, commit, incomplete):
    """Writes the .json and the .md, each at once or not at all; returns the document."""
    report = runner.report
    report.incomplete = incomplete
    document = report.as_dict()
    document["commit"] = commit or document["commit"]
    if "gpu" in document["machine"]:
        document["machine"]["gpu"] = {**runner.gpu, **document["machine"]["gpu"]}
    for ending, content in ((".json", json.dumps(document, indent=1, allow_nan=False) + "\n"),
                            (".md", as_markdown(document))):
        part = stem.with_name(f"{stem.name}{ending}.part")
        part.write_text(content, encoding="utf-8")
        part.replace(stem.with_name(f"{stem.name}{ending}"))
    return document


if __name__ == "__main__":
    sys.exit(main())
