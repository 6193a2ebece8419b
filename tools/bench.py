"""Where the time goes. Each command measures one thing and prints tables; --json FILE keeps everything.

    python tools/bench.py kernels --preset gemma-3-1b                     # each kernel beside the machine's limit
    python tools/bench.py engine --preset gemma-3-1b --case 'decode=8*1@1024' --json after.json --html after.html
    python tools/bench.py compare before.json after.json
    python tools/bench.py floors --preset gemma-4-31b --bandwidth 4.3e12 --flops 790e12      # by count, no device
    python tools/bench.py kernels --lane emulated                         # traffic counted without a GPU

`bench.py COMMAND --help` says what a command takes. Exit status: 0, 1 where a goal is missed that guards, 2 where it
cannot run.
"""

import argparse
import importlib
import json
import os
import shlex
import signal
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))     # the checkout, where it is not installed

from measure import tables
from measure.cases import positive, whole
from measure.report import BenchError, Report, show

from engine.backend import lane_of
from engine.errors import RawgemError
from engine.models.presets import PRESETS

# What ends a run with one line; all else is a fault of ours, and shows where.
EXPECTED = (BenchError, RawgemError, KeyboardInterrupt, OSError, MemoryError)
RESCUE_S = 3.0          # from being told to end until a run that does not end is written by another thread


@dataclass(frozen=True)
class Command:
    """A module of tools/measure with add_arguments(parser) and run(args, report), imported when it is asked for.

    takes  groups of common options: "run" (lane, repeats, seed), "preset", "ceilings", "output"
    """

    module: str
    help: str
    takes: tuple = ("run", "preset", "ceilings", "output")


COMMANDS = {
    "ceilings": Command("ceilings", "what the machine can do: copies, reads, matrix products, launches",
                        ("run", "output")),
    "kernels": Command("kernels", "each kernel at real shapes, beside the limit; --lane emulated counts its traffic"),
    "engine": Command("engine", "whole steps: first token, tokens per second, and where a step's time goes"),
    "serve": Command("serve", "a stream of requests: latencies and goodput at each rate", ("run", "preset", "output")),
    "load": Command("load", "opening a checkpoint: seconds, bytes per second, peak memory",
                    ("run", "preset", "output")),
    "against": Command("against", "other engines and kernels side by side, their results compared first"),
    "floors": Command("floors", "the least a step can take, by count alone", ("preset", "ceilings", "output")),
    "compare": Command("compare", "two --json files: what got better, what worse", ()),
}


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Descriptions as they are written; defaults where there is one to say."""

    def _get_help_string(self, action):
        says_nothing = action.default is None or action.default is False or action.default == []
        return action.help if says_nothing else super()._get_help_string(action)


def key_value(text):
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise BenchError(f"{text!r} is not key=value")
    if not text.isprintable():
        raise BenchError(f"{text!r}: expected one line, without control characters")
    return key, value


def rate(text):
    """An argparse type: bytes or operations per second, so many that times are finite."""
    value = positive(text)
    if value < 1:
        raise BenchError(f"{text!r} per second, expected at least 1")
    return value


def preset_list(text):
    names = text.split(",")
    for name in names:
        if name not in PRESETS:
            raise BenchError(f"no preset {name!r}, expected some of {','.join(PRESETS)}")
    return names


def lane(text):
    try:
        lane_of(text, "auto")
    except RawgemError:
        raise BenchError(f"no lane {text!r}, expected cpu, emulated, cuda or cuda:N") from None
    return text


def add_common(parser, takes):
    """The options that commands share."""
    if "run" in takes:
        parser.add_argument("--lane", type=lane, metavar="LANE",
                            help="cpu, emulated, cuda or cuda:N (default: cuda where there is a GPU, else cpu)")
        parser.add_argument("-r", "--repeats", type=whole(1), default=10, metavar="N", help="samples of each figure")
        parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of everything random")
    if "preset" in takes:
        parser.add_argument("--preset", type=preset_list, metavar="A,B", help="models by shape: " + ", ".join(PRESETS))
    if "ceilings" in takes:
        parser.add_argument("--ceilings", type=Path, metavar="FILE", help="the machine's limits from an earlier --json")
        parser.add_argument("--bandwidth", type=rate, metavar="BYTES_PER_S", help="the limits given; needs --flops")
        parser.add_argument("--flops", type=rate, metavar="FLOP_PER_S", help="the limits given; needs --bandwidth")
    if "output" in takes:
        parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
        parser.add_argument("--markdown", type=Path, metavar="FILE",
                            help='write the tables as markdown; "-" prints them instead of text')
        parser.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page with plots")
        parser.add_argument("--metadata", type=key_value, action="append", default=[], metavar="KEY=VALUE",
                            help="a note to keep with the figures; repeatable")


def build_parser(chosen=None):
    """The parser of every command by name, and of the chosen one with its options."""
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__, formatter_class=Help)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, command in COMMANDS.items():
        module = module_of(command.module) if name == chosen else None
        sub = commands.add_parser(name, help=command.help, description=module and module.__doc__, formatter_class=Help)
        if module:
            add_common(sub, command.takes)
            module.add_arguments(sub)
    return parser


def module_of(name):
    """tools/measure/NAME.py; what it imports and is not installed is named."""
    try:
        return importlib.import_module(f"measure.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"measure.{name}":
            raise BenchError(f"{name} needs the package {error.name!r}, which is not installed") from None
        file = name.replace(".", "/")
        raise BenchError(f"{name} is not in this checkout: no tools/measure/{file}.py") from None


def parse(argv):
    """(Command, args) with args.lane settled. Ends the process as argparse does; raises BenchError."""
    chosen = next((argument for argument in argv if argument in COMMANDS), None)
    args = build_parser(chosen).parse_args(argv)
    command = COMMANDS[args.command]
    if "run" in command.takes:
        args.lane = lane_of("auto", "auto") if args.lane in (None, "auto") else args.lane
    if "ceilings" in command.takes:
        if (args.bandwidth is None) != (args.flops is None):
            raise BenchError("--bandwidth and --flops are given together")
        if args.ceilings and args.bandwidth is not None:
            raise BenchError("--ceilings FILE came with --bandwidth and --flops, expected one of the two")
    for option in ("json", "markdown", "html"):                     # before minutes of work, not after
        path = getattr(args, option, None)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise BenchError(f"--{option} {path}: no file can be written there")
        if path == Path("-") and option != "markdown":
            raise BenchError(f"--{option} -: expected a file; stdout gets the tables")
    if getattr(args, "html", None):
        module_of("pages.page")
    return command, args


def report_of(args, argv):
    """The empty Report of a run."""
    settings = {key: value for key, value in vars(args).items()
                if key not in ("json", "html", "markdown", "metadata", "command")}
    kind, _, index = (getattr(args, "lane", None) or "").partition(":")
    return Report(shlex.join(["python", "tools/bench.py", *argv]), settings, dict(args.metadata),
                  gpu=int(index or 0) if kind == "cuda" else None)


def measure(command, args, report):
    """Runs the command; returns the exit status. What it measured is written however it ends."""
    failed = []
    try:
        with stoppable(), rescued(report, args):
            status = module_of(command.module).run(args, report)
    except BaseException as error:
        report.incomplete = reason(error)
        if not isinstance(error, EXPECTED):
            raise
        print(f"bench: {report.incomplete}", file=sys.stderr)
        status = 130 if isinstance(error, KeyboardInterrupt) else 2
    finally:
        failed += write(report, args)
        for line in failed:
            print(f"bench: {line}", file=sys.stderr)
    return max(status, 2) if failed else status


def reason(error):
    """One line on why a run ended early."""
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted"
    if isinstance(error, (BenchError, RawgemError)):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {error}"


@contextmanager
def stoppable():
    """Within it SIGTERM ends the run as Ctrl-C does, so that what was measured is still written."""
    def stop(*_):
        raise KeyboardInterrupt("ended by SIGTERM")
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def rescued(report, args):
    """Within it, a run that is told to end and cannot, because it waits for a GPU that never answers, is written and
    ended by a thread of its own: signals reach Python's handlers only between two of its instructions."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told, teller = os.pipe()
    os.set_blocking(teller, False)
    is_over = threading.Event()

    def watch():
        with os.fdopen(told, "rb", buffering=0) as signals:
            if not signals.read(1) or is_over.wait(RESCUE_S):
                return
        report.incomplete = "told to end, it did not: it waited for something, most likely the GPU"
        try:
            write(report, args)
        finally:
            os._exit(130)
    before = signal.set_wakeup_fd(teller, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
        signal.set_wakeup_fd(before)
        os.close(teller)


def write(report, args):
    """Tables to stdout, and the files that were asked for; the JSON first. Returns a line for each that failed, which
    takes no other with it."""
    document, failed = report.as_dict(), []

    def put(option, path, text):
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            failed.append(f"--{option} {path}: {error.strerror}")
    if args.json:
        put("json", args.json, json.dumps(document, indent=1, allow_nan=False) + "\n")
    on_stdout = args.markdown == Path("-")
    if report.rows or report.skipped or not report.incomplete:
        show(tables.markdown(document) if on_stdout else tables.text(document))
    if args.markdown and not on_stdout:
        put("markdown", args.markdown, tables.markdown(document))
    if args.html:
        put("html", args.html, module_of("pages.page").html(document))
    return failed


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        command, args = parse(argv)
        if "output" not in command.takes:
            return module_of(command.module).run(args, None)
        return measure(command, args, report_of(args, argv))
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
