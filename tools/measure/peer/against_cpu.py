"""against --lane cpu --peer transformers: whole generations beside transformers, on the same random checkpoints.

First what they compute is compared: the log-probabilities of the tokens that we find likeliest after a prompt, and
after each of the next that we generate. A shape where they differ is not timed.
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

import numpy as np

from measure import checkpoint_files
from measure.peer.against_model import FLOAT32_BOUND
from measure.peer.checkpoints import SHAPES, kv_bytes, matrices, token_bytes, weight_bytes
from measure.peer.turns import SETTLE_S, compared
from measure.report import BenchError, Goal, Row, Stat

FOLDER = Path(__file__).resolve().parent
SIDES = ("rawgem", "transformers")
PROMPT_TOKENS = 16          # the prompt that decoding starts from
AGREE_TOKENS = 16           # greedy tokens compared between the sides, a row
N_LIKELIEST = 16           # of each token compared
# Of log-probabilities, as a share of the largest logit: one is a logit less a log-sum, and both are that far off.
BOUND = 2 * FLOAT32_BOUND
FIRST_ID = 3                # below are pad, eos and bos
SQUARE = [(4096, 4096)] * 16        # 1 GiB in matrices that suit BLAS: what the memory can give

# How many times the other side's median over ours, at least. {measure: bound, or {shape: bound}}
LEAST_RATIO = {
    "load, fresh process": 1.0,
    "load, again": 1.0,
    "prefill": 1.0,
    "decode, batch 1": {**dict.fromkeys(SHAPES, 1.0), "tiny": 4.0, "small": 2.5, "270m": 1.2},
    "decode, batch 8": 1.0,
}
# Our own median, at most. Below 270m the interpreter outweighs the weights.
MOST = {"import": 0.3, "peak over weights + KV": {"270m": 1.15}}
# Our own median, at least. Below 270m the weights sit in the CPU's caches.
LEAST = {"of the GEMV rate": {"270m": 85.0}}


def goal_of(shape, measure):
    """The Goal of a measure of a shape, or None."""
    def bound(goals):
        found = goals.get(measure)
        return found.get(shape) if isinstance(found, dict) else found
    if bound(LEAST_RATIO) is not None:
        return Goal("ratio", at_least=bound(LEAST_RATIO))
    if bound(MOST) is not None:
        return Goal("ours", at_most=bound(MOST))
    return None if bound(LEAST) is None else Goal("ours", at_least=bound(LEAST))


class Worker:
    """A worker.py process: one side, asked over its pipes, `threads` threads to its BLAS and OpenMP."""

    def __init__(self, side, options):
        self.side = side
        threads = {f"{library}_NUM_THREADS": str(options["threads"]) for library in ("OMP", "OPENBLAS", "MKL")}
        env = {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self.process = subprocess.Popen([sys.executable, FOLDER / "worker.py", side, json.dumps(options)],
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


class Samples(dict):
    """{measure: {side: [value, one a repeat]}}, in the order of the first value."""

    def add(self, measure, side, value):
        self.setdefault(measure, {}).setdefault(side, []).append(value)


def random_prompts(shape, n, length, seed):
    """n prompts of `length` token ids. A new seed a repeat, so that nothing can be kept from the one before."""
    draw = random.Random(f"{shape.name} {n} {length} {seed}")
    return [[draw.randrange(FIRST_ID, shape.spec.vocab) for _ in range(length)] for _ in range(n)]


def agreement(ours, theirs):
    """For each row, how many leading tokens are equal: 16 of 16, or where the sides part."""
    return [next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
            for x, y in zip(ours, theirs, strict=True)]


def ready_checkpoint(shape, folder, seed):
    """The directory of the checkpoint, written unless it is there, and read into the page cache for both sides."""
    directory = checkpoint_files.written(shape, folder, seed)
    for file in directory.iterdir():
        with open(file, "rb") as stream:
            while stream.read(1 << 24):
                pass
    return directory


def error_of(ours, theirs, prompts, n_tokens):
    """Of the tokens that `ours` finds likeliest after each prompt, and after each that it then generates but the last
    of n_tokens, the largest difference of log-probabilities, as a share of the largest logit; NaN where one is."""
    found = ours.ask("likeliest", prompts=prompts, n_tokens=n_tokens, n=N_LIKELIEST)
    known = [prompt + row[:-1] for prompt, row in zip(prompts, found["token_ids"], strict=True)]
    answer = theirs.ask("logprobs", prompts=known, tokens=found["likeliest"])
    return np.max(np.abs(np.subtract(found["logprobs"], answer["logprobs"]))) / answer["largest"]


def compare(shape, path, options, args, report):
    """Adds the row of how far apart the sides' log-probabilities are; whether that is within BOUND."""
    with ExitStack() as stack:
        sides = [stack.enter_context(Worker(side, options)) for side in SIDES]
        for worker in sides:
            worker.ask("load", path=str(path))
        error = float(np.max([
            error_of(*sides, random_prompts(shape, 1, args.prefill, -1), 1),
            error_of(*sides, random_prompts(shape, max(args.batch), PROMPT_TOKENS, -1), min(AGREE_TOKENS, args.decode))
        ]))
    is_good = error <= BOUND                                    # NaN is not
    note = f"not timed: log-probabilities differ by {error:.2g} of the largest logit, expected {BOUND:.2g}"
    report.add(Row("against", "outputs", {"model": shape.name, "peer": "transformers"},
                   {"error": Stat("x", error, "lower")} if np.isfinite(error) else {}, () if is_good else note))
    return is_good


def measure_cold(shape, path, options, args, bar):
    """Samples of fresh processes; the first round, which warms byte code and page cache, is not kept."""
    samples = Samples()
    for repeat in range(args.repeats + 1):
        long = random_prompts(shape, 1, args.prefill, repeat)
        short = random_prompts(shape, 1, PROMPT_TOKENS, repeat)
        for side in SIDES:
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
        bar.update(1)
    return samples


def measure_warm(shape, path, workers, gemv, args, bar):
    """(Samples, {batch: leading equal tokens a row}) of live processes that take turns.

    Prefill is the time of one token after a long prompt. Decode is what the tokens after the first take, a token.
    """
    samples, agree = Samples(), {}
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
                    samples.add(decode_name(batch), side, (answer["seconds"] - first_s) / (args.decode - 1))
            if repeat < 0:
                agree[batch] = agreement(*(tokens[side] for side in SIDES))
        if repeat >= 0:
            for name, products in (("gemv", matrices(shape.spec)), ("gemv, square", SQUARE)):
                samples.add(name, "gemv", gemv.ask("gemv", matrices=products)["bytes_per_s"])
        bar.update(1)
    return samples, agree


def decode_name(batch):
    return f"decode, batch {batch}"


def rows_of(shape, samples, facts, args):
    """The rows of one shape, from samples in seconds and bytes; decode at batch 1 also as a share of GEMV's rate."""
    def row(measure, unit="s", convert=float, of=None, better="lower", notes=()):
        sides = [[convert(value) for value in samples[of or measure][side]] for side in SIDES]
        return Row("against", measure, {"model": shape.name, "peer": "transformers"},
                   compared(*sides, unit=unit, better=better), notes, goal_of(shape.name, measure))

    def decode_row(measure, *rest, of=None, **options):
        """A difference of two times: one that is not above zero says how disturbed they were, and nothing else."""
        if min(map(min, samples[of or measure].values())) <= 0:
            return Row("against", measure, {"model": shape.name, "peer": "transformers"}, {},
                       [f"not judged: {args.decode} tokens took no longer than one in some round; more --decode "
                        "tokens, or a quieter machine"])
        return row(measure, *rest, of=of, **options)

    rows = [row(name) for name in ("import", "load, fresh process", "load, again", "import to first token", "prefill")]
    for batch in args.batch:
        equal = ", ".join(map(str, facts["agree"][batch]))
        rows.append(decode_row(decode_name(batch), notes=f"equal greedy tokens, of {facts['agree_of']} a row: {equal}"))
    if 1 in args.batch:
        for name, gemv in (("of the GEMV rate", "gemv"), ("of square GEMV's rate", "gemv, square")):
            limit = max(samples[gemv]["gemv"])
            rows.append(decode_row(name, "%", lambda s, limit=limit: 100 * facts["token_bytes"] / s / limit,
                                   of=decode_name(1), better="higher",
                                   notes=f"GEMV in NumPy, best: {limit / 1e9:.1f} GB/s"))
    rows += [row(name, "bytes") for name in ("memory after import", "peak memory")]
    rows.append(row("peak over weights + KV", "x", lambda n: n / facts["floor_bytes"], of="peak memory"))
    return rows


def bench_shape(shape, args, report):
    """Measures one shape; adds its rows to the report, and its facts and the sides' versions. Whether outputs agree."""
    path = ready_checkpoint(shape, args.cache, args.seed)
    max_seq_len = max(args.prefill, PROMPT_TOKENS + args.decode) + 1
    options = {"device": "cpu", "threads": args.threads, "max_seqs": max(args.batch), "max_seq_len": max_seq_len,
               "architecture": shape.config["architectures"][0]}
    if not compare(shape, path, options, args, report):
        return False
    with report.bar(2 * (args.repeats + 1), f"{shape.name}: fresh processes, then in turns") as bar:
        samples = measure_cold(shape, path, options, args, bar)
        with ExitStack() as stack:
            workers = {side: stack.enter_context(Worker(side, options)) for side in SIDES}
            gemv = stack.enter_context(Worker("gemv", options))
            warm, agree = measure_warm(shape, path, workers, gemv, args, bar)
    samples.update(warm)
    for worker in workers.values():
        report.versions.update(worker.hello["versions"])
    spec = shape.spec
    facts = {"config": shape.config, "weight_bytes": weight_bytes(spec), "token_bytes": token_bytes(spec),
             "floor_bytes": weight_bytes(spec) + kv_bytes(spec, max_seq_len), "agree": agree,
             "agree_of": min(AGREE_TOKENS, args.decode), "gemv_bytes_per_s": samples["gemv"]["gemv"],
             "square_gemv_bytes_per_s": samples["gemv, square"]["gemv"]}
    report.facts.setdefault("models", {})[shape.name] = facts
    for row in rows_of(shape, samples, facts, args):
        report.add(row)
    return True


def run(args, report):
    """Every shape of args.shapes; 1 where outputs differ. A missed goal is in the report; times of one run do not fail
    it."""
    args.cache.mkdir(parents=True, exist_ok=True)
    agreed = [bench_shape(SHAPES[name], args, report) for name in args.shapes]
    return 0 if all(agreed) else 1
