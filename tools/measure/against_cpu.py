"""bench.py engine: the whole engine beside another one, on the same random checkpoints, taking turns.

Cold: fresh processes import, load, prefill and decode once; gives import, load and peak memory. Warm: one process a
side stays alive and the sides take turns (A B A B) at each measurement, so a machine that slows down slows both.
"""

import json
import os
import random
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import bench_report as report
from bench_checkpoints import SHAPES

TOOLS = Path(__file__).resolve().parent
SETTLE_S = 0.1              # before each turn: idle BLAS threads spin for some ms after the other side's work
PROMPT_TOKENS = 16          # the prompt that decoding starts from
AGREE_TOKENS = 16           # greedy tokens compared between the sides, a row
FIRST_ID = 3                # below are pad, eos and bos
SQUARE = [(4096, 4096)] * 16        # 1 GiB in matrices that suit BLAS: what the memory can give


class BenchError(RuntimeError):
    """A worker failed or died; the message holds what it said."""


class Worker:
    """A bench_worker.py process: one side, asked over its pipes, `threads` threads to its BLAS and OpenMP."""

    def __init__(self, side, options):
        self.side = side
        threads = {f"{library}_NUM_THREADS": str(options["threads"]) for library in ("OMP", "OPENBLAS", "MKL")}
        env = {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self.process = subprocess.Popen([sys.executable, TOOLS / "bench_worker.py", side, json.dumps(options)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.hello = self._answer()

    def ask(self, do, **arguments):
        """One request, its answer. Raises BenchError: the worker's traceback, or that it ended."""
        time.sleep(SETTLE_S)
        with suppress(BrokenPipeError):     # it has ended; _answer says so
            print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise BenchError(f"the {self.side} worker ended (exit status {self.process.wait()}) without an answer")
        answer = json.loads(line)
        if "error" in answer:
            raise BenchError(f"the {self.side} worker failed:\n{answer['error']}")
        return answer

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with suppress(BrokenPipeError):
            self.process.stdin.close()      # the worker's loop ends with its input
        self.process.wait()
        self.process.stdout.close()


def random_prompts(shape, n, length, seed):
    """n prompts of `length` token ids. A new seed a repeat, so that nothing can be kept from the one before."""
    draw = random.Random(f"{shape.name} {n} {length} {seed}")
    return [[draw.randrange(FIRST_ID, shape.vocab) for _ in range(length)] for _ in range(n)]


def agreement(ours, theirs):
    """For each row, how many leading tokens are equal: 16 of 16, or where the sides part."""
    return [next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
            for x, y in zip(ours, theirs, strict=True)]


def write_checkpoint(shape, directory, seed):
    """In a process of its own, for the memory's sake (see bench_checkpoints); does nothing when it is there."""
    command = [sys.executable, TOOLS / "bench_checkpoints.py", shape.name, directory, "--seed", str(seed)]
    subprocess.run(command, check=True)
    for file in directory.iterdir():
        with open(file, "rb") as stream:    # into the page cache, for both sides alike
            while stream.read(1 << 24):
                pass


def measure_cold(shape, path, sides, options, args):
    """Samples of fresh processes; the first round, which warms byte code and page cache, is not kept."""
    samples = report.Samples()
    for repeat in range(args.repeats + 1):
        long = random_prompts(shape, 1, args.prefill, repeat)
        short = random_prompts(shape, 1, PROMPT_TOKENS, repeat)
        for side in sides:
            with Worker(side, {**options, "max_seqs": 1}) as worker:
                load_s = worker.ask("load", path=str(path))["seconds"]
                first_s = worker.ask("generate", prompts=long, n_tokens=1)["seconds"]
                worker.ask("generate", prompts=short, n_tokens=args.decode)
                if repeat:
                    samples.add("import", side, worker.hello["import_s"])
                    samples.add("load, fresh process", side, load_s)
                    samples.add("import to first token", side, worker.hello["import_s"] + load_s + first_s)
                    samples.add("memory after import", side, worker.hello["import_bytes"])
                    samples.add("peak memory", side, worker.ask("peak")["bytes"])
    return samples


def measure_warm(shape, path, workers, gemv, args):
    """(Samples, {batch: leading equal tokens a row}) of live processes that take turns.

    Prefill is the time of one token after a long prompt. Decode is what the tokens after the first take, a token.
    """
    samples, agree = report.Samples(), {}
    for repeat in range(-1, args.repeats):
        for side, worker in workers.items():
            seconds = worker.ask("load", path=str(path))["seconds"]
            if repeat >= 0:
                samples.add("load, again", side, seconds)
    for repeat in range(-1, args.repeats):                  # round -1 warms up, and is compared
        prompts = random_prompts(shape, 1, args.prefill, repeat)
        for side, worker in workers.items():
            seconds = worker.ask("generate", prompts=prompts, n_tokens=1)["seconds"]
            if repeat >= 0:
                samples.add("prefill", side, seconds)
        for batch in args.batch:
            prompts = random_prompts(shape, batch, PROMPT_TOKENS, repeat)
            tokens = {}
            for side, worker in workers.items():
                first_s = worker.ask("generate", prompts=prompts, n_tokens=1)["seconds"]
                answer = worker.ask("generate", prompts=prompts, n_tokens=args.decode)
                tokens[side] = [row[:AGREE_TOKENS] for row in answer["token_ids"]]
                if repeat >= 0:
                    samples.add(report.decode_name(batch), side, (answer["seconds"] - first_s) / (args.decode - 1))
            if repeat < 0 and len(tokens) == 2:
                agree[batch] = agreement(*tokens.values())
        if repeat >= 0:
            for name, matrices in (("gemv", shape.matrices()), ("gemv, square", SQUARE)):
                samples.add(name, "gemv", gemv.ask("gemv", matrices=matrices)["bytes_per_s"])
    return samples, agree


def bench_shape(shape, sides, args):
    """One shape's part of the report: {"rows": [Row], "facts": {...}, "versions": {...}}."""
    path = args.cache / f"{shape.name}-seed{args.seed}"
    write_checkpoint(shape, path, args.seed)
    max_seq_len = max(args.prefill, PROMPT_TOKENS + args.decode) + 1
    options = {"device": args.device, "threads": args.threads, "max_seqs": max(args.batch), "max_seq_len": max_seq_len}
    tell(f"{shape.name}: fresh processes")
    samples = measure_cold(shape, path, sides, options, args)
    tell(f"{shape.name}: warm processes, in turns")
    with ExitStack() as stack:
        workers = {side: stack.enter_context(Worker(side, options)) for side in sides}
        gemv = stack.enter_context(Worker("gemv", options))
        warm, agree = measure_warm(shape, path, workers, gemv, args)
    samples.update(warm)
    versions = {name: version for worker in workers.values() for name, version in worker.hello["versions"].items()}
    floor_bytes = shape.weight_bytes() + shape.kv_bytes(max_seq_len)
    facts = {"config": shape.config(), "weight_bytes": shape.weight_bytes(), "token_bytes": shape.token_bytes(),
             "floor_bytes": floor_bytes, "agree": agree, "agree_of": min(AGREE_TOKENS, args.decode),
             "gemv_bytes_per_s": samples["gemv"]["gemv"], "square_gemv_bytes_per_s": samples["gemv, square"]["gemv"]}
    return {"rows": report.rows_of(shape, samples, sides, facts, args), "facts": facts, "versions": versions}


def run(args, command):
    """Measures every shape asked for, prints the tables, writes the JSON; returns the document."""
    sides = ["rawgem", *([args.against] if args.against else [])]
    args.cache.mkdir(parents=True, exist_ok=True)
    load_before = os.getloadavg()[0]
    document = report.header(command, args)
    document["shapes"] = {}
    for name in args.shapes:
        part = bench_shape(SHAPES[name], sides, args)
        document["versions"].update(part["versions"])
        document["shapes"][name] = {**part["facts"], "rows": [row.as_dict() for row in part["rows"]]}
        print(report.shape_text(name, part["facts"], part["rows"], sides), flush=True)
    document["load_average"] = [load_before, os.getloadavg()[0]]
    print(report.header_text(document))
    if args.json:
        args.json.write_text(json.dumps(document, indent=2) + "\n")
    return document


def tell(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)
