"""Where the time goes. Each subcommand measures one thing and prints a table; --json FILE keeps everything.

    python tools/bench.py engine --device cpu --against transformers

`engine` runs whole generations on random Gemma 3 checkpoints, beside another engine on the same files.
"""

import argparse
import getpass
import shlex
import sys
import tempfile
from pathlib import Path

import bench_engine
from bench_checkpoints import SHAPES


def shape_list(text):
    names = text.split(",")
    for name in names:
        if name not in SHAPES:
            raise argparse.ArgumentTypeError(f"unknown shape {name!r}, expected some of {','.join(SHAPES)}")
    return names


def whole(least):
    """An argparse type: an int that is at least so much."""
    def parse(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= {least}")
        return int(text)
    return parse


def int_list(text):
    return [whole(1)(part) for part in text.split(",")]


def key_value(text):
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not key=value")
    return key, value


def build_parser():
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    common.add_argument("--metadata", type=key_value, action="append", default=[], metavar="KEY=VALUE",
                        help="a note to keep with the figures; repeatable")

    engine = commands.add_parser("engine", parents=[common], help="whole generations: load, prefill, decode, memory",
                                 formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    engine.add_argument("--device", choices=["cpu"], default="cpu")
    engine.add_argument("--against", choices=["transformers"], help="the engine to run beside this one")
    engine.add_argument("--shapes", type=shape_list, default=list(SHAPES), metavar="A,B",
                        help="of " + ", ".join(SHAPES))
    engine.add_argument("--repeats", type=whole(1), default=5, help="samples of each measure")
    engine.add_argument("--prefill", type=whole(1), default=512, help="tokens of the long prompt")
    engine.add_argument("--decode", type=whole(2), default=64, help="tokens generated to time decoding")
    engine.add_argument("--batch", type=int_list, default=[1, 8], metavar="N,M", help="batch sizes to decode at")
    engine.add_argument("--threads", type=whole(1), default=2, help="BLAS and OpenMP threads of each side")
    engine.add_argument("--seed", type=whole(0), default=0, help="of the random weights")
    engine.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / f"rawgem-bench-{getpass.getuser()}",
                        help="where checkpoints are written, and found again")
    engine.set_defaults(run=bench_engine.run)
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    try:
        args.run(args, command=shlex.join(["python", "tools/bench.py", *(sys.argv[1:] if argv is None else argv)]))
    except bench_engine.BenchError as error:
        sys.exit(f"bench: {error}")


if __name__ == "__main__":
    main()
