"""How fast a checkpoint opens: import, weights, peak memory, beside safetensors' own reader.

    bench.py load --preset gemma-3-1b --folder /dev/shm
    bench.py load --model checkpoints/gemma-3-4b-it --lane cpu

A preset's shape is written once to a random checkpoint in the released layout, and found again. Every sample is a new
process, and the sides take turns. Nothing empties the page cache: files that were just written are read from memory.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from measure import loading
from measure.checkpoint_files import FOLDER, SHARD_BYTES, written
from measure.models import add_model_arguments, models_of
from measure.peer.turns import compared
from measure.report import BenchError, Goal, Row, Stat

LIMIT_S = 300               # of one sample: one that hangs must end
LEAST_OF_PINNED = 90        # percent of what pinned copies reach


def add_arguments(parser):
    add_model_arguments(parser)
    parser.set_defaults(repeats=3)
    parser.add_argument("--folder", type=Path, default=FOLDER, metavar="DIR",
                        help="where random checkpoints are written, and found again")


def run(args, report):
    """A row for each model and side; 0."""
    if args.lane == "emulated":
        raise BenchError("load measures time, and the emulated lane's says nothing of a GPU; use --lane cpu or cuda")
    for model in models_of(args, ["gemma-3-1b" if args.lane.startswith("cuda") else "gemma-3-270m"]):
        load_model(args, report, model)
    return 0


def load_model(args, report, model):
    path = model.path
    if path is None:
        with report.bar(2 * _n_weights(model.spec), f"{model.name}: writing") as bar:
            path = written(model, args.folder, args.seed, SHARD_BYTES, bar.update)
    sides = ["rawgem"]
    for side, why_not in peers(args.lane).items():
        if why_not:
            report.skip(f"load: {side}", why_not)
        else:
            sides.append(side)
    samples = {side: [] for side in sides}
    with report.bar(args.repeats * len(sides), f"{model.name}: loading") as bar:
        for _ in range(args.repeats):
            for side in sides:
                samples[side].append(ask(side, path, args.lane))
                bar.update(1)
    limit = ask("pinned copies", path, args.lane)["bytes_per_s"] if args.lane.startswith("cuda") else None
    for side in sides:
        report.versions.update(samples[side][0]["versions"])
    shape = {"lane": args.lane, "layers": model.n_layers, "files": len(loading.shards(path)),
             "bytes": samples["rawgem"][0]["n_bytes"]}
    for row in rows_of(model.name, shape, samples, limit):
        report.add(row)


def _n_weights(spec):
    from engine.tensors import n_weights
    return n_weights(spec)


def peers(lane):
    """{side: why it cannot run here, "" where it can}."""
    sides = {"safetensors.numpy": ["safetensors"]}
    if lane.startswith("cuda"):
        sides["safetensors.torch"] = ["safetensors", "torch"]
    return {side: "".join(f"{package} is not installed" for package in packages[-1:]
                          if importlib.util.find_spec(package) is None) for side, packages in sides.items()}


def ask(side, path, lane):
    """What one process answers. Raises BenchError for what went wrong in it, and when it takes longer than LIMIT_S."""
    command = [sys.executable, loading.__file__, side, json.dumps({"path": str(path), "lane": lane})]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        raise BenchError(f"load: {side} did not end within {LIMIT_S} s") from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise BenchError(f"load: {side} ended with status {done.returncode}: {last}") from None
    if "error" in answer:
        raise BenchError(f"load: {side}: {answer['error']}")
    return answer


def rows_of(name, shape, samples, limit=None):
    """A Row a side of {side: [answer]}. limit: bytes a second of pinned copies, None where there is no GPU."""
    ours, rows = samples["rawgem"], []
    for side, answers in samples.items():
        def stat(unit, value, better, answers=answers):
            return Stat(unit, [value(answer) for answer in answers], better)
        stats = {"import": stat("s", lambda one: one["import_s"], "lower")}
        if side == "rawgem":
            stats["lane"] = stat("s", lambda one: one["lane_s"], "lower")
            stats["open"] = stat("s", lambda one: one["open_s"], "lower")
        stats["weights"] = stat("s", lambda one: one["weights_s"], "lower")
        stats["rate"] = stat("bytes/s", lambda one: one["n_bytes"] / one["weights_s"], "higher")
        if limit is not None:
            stats["of pinned"] = stat("%", lambda one: 100 * one["n_bytes"] / one["weights_s"] / limit, "higher")
        stats["host peak"] = stat("bytes", lambda one: one["peak_bytes"], "lower")
        stats["extra over largest"] = stat("x", lambda one: one["extra_bytes"] / ours[0]["largest_bytes"], "lower")
        if side != "rawgem":
            seconds = ([one["weights_s"] for one in some] for some in (ours, answers))
            stats["rawgem ahead"] = compared(*seconds)["ratio"]
        goal = Goal("of pinned", at_least=LEAST_OF_PINNED) if limit is not None and side == "rawgem" else None
        rows.append(Row("load", f"{name}, {side}", shape, stats, notes_of(shape["lane"]), goal))
    if limit is not None:
        rows.append(Row("load", f"{name}, pinned copies", shape, {"rate": Stat("bytes/s", limit, "higher")}))
    return rows


def notes_of(lane):
    notes = ["each sample is a process of its own; files are in the page cache, or may be",
             "extra over largest: host memory at the peak beyond what stays there, over the largest tensor's bytes"]
    if not lane.startswith("cuda"):
        notes.append("safetensors.numpy: read, then converted to float32 as rawgem does")
    return notes
