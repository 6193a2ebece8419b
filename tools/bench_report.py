"""What bench.py prints and writes: rows of samples with best, median, ratio and goal; the machine; tables; JSON."""

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from math import floor, log10
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
QUIET_LOAD = 0.5        # a load average above this before we start: other work shares the cores

# How many times the other side's median over ours, at least. {measure: bound, or {shape: bound}}
LEAST_RATIO = {
    "load, fresh process": 1.0,
    "load, again": 1.0,
    "prefill": 1.0,
    "decode, batch 1": {"tiny": 4.0, "small": 2.5, "270m": 1.2},
    "decode, batch 8": 1.0,
}
# Our own median, at most. Below 270m the interpreter outweighs the weights.
MOST = {"import": 0.3, "peak over weights + KV": {"270m": 1.15}}
# Our own median, at least. Below 270m the weights sit in the CPU's caches.
LEAST = {"of the GEMV rate": {"270m": 85.0}}


class Samples(dict):
    """{measure: {side: [value, one a repeat]}}, in the order of the first value."""

    def add(self, measure, side, value):
        self.setdefault(measure, {}).setdefault(side, []).append(value)


@dataclass(frozen=True)
class Row:
    """One measure of one shape. `theirs` is empty when nothing was run against; better is "lower" or "higher"."""

    shape: str
    measure: str
    unit: str
    ours: tuple
    theirs: tuple = ()
    better: str = "lower"

    @property
    def pairs(self):
        """How many times better we are, repeat by repeat (the sides took turns); > 1 is ahead."""
        return [self._times(a, b) for a, b in zip(self.ours, self.theirs, strict=True)] if self.theirs else []

    @property
    def ratio(self):
        """How many times better our median is than theirs, or None."""
        return self._times(median(self.ours), median(self.theirs)) if self.theirs else None

    @property
    def best_ratio(self):
        """The same of the bests, which other work on the machine disturbs least; or None."""
        return self._times(self.best(self.ours), self.best(self.theirs)) if self.theirs else None

    @property
    def goal(self):
        """(text, whether it is met); ("", None) where no goal is set, or a ratio's other side was not run."""
        least_ratio, most, least = (_bound(goals, self) for goals in (LEAST_RATIO, MOST, LEAST))
        if least_ratio is not None and self.theirs:
            return f"ratio >= {least_ratio:g}", self.ratio >= least_ratio
        if most is not None:
            return f"<= {most:g} {self.unit}".rstrip(), median(self.ours) <= most
        if least is not None:
            return f">= {least:g} {self.unit}", median(self.ours) >= least
        return "", None

    def best(self, values):
        return min(values) if self.better == "lower" else max(values)

    def _times(self, ours, theirs):
        return theirs / ours if self.better == "lower" else ours / theirs

    def as_dict(self):
        text, is_met = self.goal
        sides = {side: {"best": self.best(values), "median": median(values), "samples": list(values)}
                 for side, values in (("ours", self.ours), ("theirs", self.theirs)) if values}
        return {"measure": self.measure, "unit": self.unit, "better": self.better, **sides,
                "best_ratio": self.best_ratio, "ratio": self.ratio, "pairs": self.pairs, "goal": text, "is_met": is_met}


def _bound(goals, row):
    bound = goals.get(row.measure)
    return bound.get(row.shape) if isinstance(bound, dict) else bound


def decode_name(batch):
    return f"decode, batch {batch}"


def rows_of(shape, samples, sides, facts, args):
    """The table of one shape, from samples in seconds and bytes; decode at batch 1 also as a share of GEMV's rate."""
    def row(measure, unit, convert, of=None, better="lower"):
        values = [tuple(convert(value) for value in samples[of or measure][side]) for side in sides]
        return Row(shape.name, measure, unit, *values, better=better)

    rows = [row(name, "s", float) for name in ("import", "load, fresh process", "load, again", "import to first token")]
    rows.append(row("prefill", "ms", lambda s: s * 1e3))
    rows += [row(decode_name(batch), "ms/step", lambda s: s * 1e3) for batch in args.batch]
    if 1 in args.batch:
        for name, gemv in (("of the GEMV rate", "gemv"), ("of square GEMV's rate", "gemv, square")):
            limit = max(samples[gemv]["gemv"])
            rows.append(row(name, "%", lambda s, limit=limit: 100 * facts["token_bytes"] / s / limit,
                            of=decode_name(1), better="higher"))
    rows += [row(name, "MB", lambda n: n / 1e6) for name in ("memory after import", "peak memory")]
    rows.append(row("peak over weights + KV", "x", lambda n: n / facts["floor_bytes"], of="peak memory"))
    return rows


def header(command, args):
    """What was run, on what, by which code: the first part of the document."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()
                if key not in ("json", "metadata", "run")}
    return {"command": command, "commit": commit(), "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": machine(), "versions": {"python": platform.python_version()}, "settings": settings,
            "metadata": dict(args.metadata)}


def machine():
    """CPU model, the cores this process may use, memory in bytes, system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": cpu_model(), "cores": cores, "memory_bytes": memory_bytes, "system": platform.platform()}


def cpu_model():
    """As Linux names it, with family and model number where the name says little; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else name


def commit():
    """The checkout's commit, with "+changes" when files differ from it; None outside git."""
    def git(*arguments):
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
    try:
        head = git("rev-parse", "--verify", "--quiet", "HEAD")
        if head.returncode:
            return None
        return head.stdout.strip() + ("+changes" if git("status", "--porcelain").stdout.strip() else "")
    except FileNotFoundError:
        return None


def number(value):
    """Three significant digits, no exponent, nothing cut before the point."""
    digits = 2 - floor(log10(abs(value))) if value else 0
    return f"{value:.{max(0, digits)}f}"


def table(rows):
    """Lines of aligned columns; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row):
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        return "  ".join([first.strip().ljust(widths[0]), *rest]).rstrip()
    return "\n".join(map(line, rows))


def shape_text(name, facts, rows, sides):
    """One shape's table under a line of facts."""
    lines = [["measure", "unit", *(f"{side} {what}" for side in sides for what in ("best", "median")),
              *(["of bests", "ratio", "pairs"] if len(sides) == 2 else []), "goal", ""]]
    for row in rows:
        text, is_met = row.goal
        values = [number(f(v)) for v in (row.ours, row.theirs) if v for f in (row.best, median)]
        ratios = []
        if row.theirs:
            ratios = [number(row.best_ratio), number(row.ratio), f"{number(min(row.pairs))}-{number(max(row.pairs))}"]
        lines.append([row.measure, row.unit, *values, *ratios, text, {True: "pass", False: "MISS", None: ""}[is_met]])
    config = facts["config"]
    head = (f"\n{name}: hidden {config['hidden_size']}, {config['num_hidden_layers']} layers, "
            f"vocab {config['vocab_size']}, float32 weights {facts['weight_bytes'] / 1e6:.1f} MB, "
            f"with KV {facts['floor_bytes'] / 1e6:.1f} MB\n"
            f"GEMV in NumPy, best: {max(facts['gemv_bytes_per_s']) / 1e9:.1f} GB/s on this model's matrices, "
            f"{max(facts['square_gemv_bytes_per_s']) / 1e9:.1f} GB/s on 4096 x 4096")
    equal = [f"batch {batch}: {', '.join(map(str, counts))}" for batch, counts in facts["agree"].items()]
    if equal:
        head += f"\nequal greedy tokens, of {facts['agree_of']} a row: " + "; ".join(equal)
    return head + "\n" + table(lines)


def header_text(document):
    """The lines that make the figures above worth something: command, commit, machine, versions."""
    machine, settings = document["machine"], document["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    before, after = document["load_average"]
    more = "".join(f"\n{key}: {value}" for key, value in document["metadata"].items())
    if before > QUIET_LOAD:
        more += "\nother work was running on this machine: trust the bests before the medians, and neither for a claim"
    return (f"\ncommand: {document['command']}\ncommit: {document['commit'] or 'none'}, {document['date']}\n"
            f"machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, "
            f"load average {before:.2f} before, {after:.2f} after\nversions: {versions}\n"
            f"float32, {settings['threads']} threads a side, median of {settings['repeats']}; "
            f"prefill {settings['prefill']} tokens, decode {settings['decode']}"
            f"{'; ratio: how many times better ours is' if settings['against'] else ''}{more}")
