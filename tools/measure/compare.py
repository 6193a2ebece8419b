"""Two earlier runs side by side: which rows got better, which worse, and what is only noise.

    bench.py compare before.json after.json
    bench.py compare before.json after.json --section kernels --threshold 3 --fail-on-regression

Rows are matched by section, name and shape, ops of a step in their order. The ratio is of medians and above 1 where B
is better. A change is noise where it is under the threshold, or where the p10..p90 ranges of the two overlap; --all
shows those too. Counts (the sections traffic and resources) are exact: there every change says something. Shares of a
whole (the stat "share") are left out: they change when anything else does.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from measure.report import SECTIONS, BenchError, Stat, load_document, rows_of, show
from measure.tables import (
    MANY_ROWS,
    aligned,
    ceilings_text,
    constant_shape,
    figure,
    is_busy,
    markdown_table,
    number,
    scale_of,
    shape_words,
    spread_text,
)

BETTER, WORSE, NOISE, SAME, CHANGED = "better", "WORSE", "noise", "same", "changed"
THRESHOLD = 5.0         # percent
EXACT = ("traffic", "resources")        # sections without noise
SHARE = "share"         # a stat that is not compared
PLACE = "order"         # of a shape, which is not compared either


@dataclass(frozen=True)
class Change:
    """One stat of one row in both runs."""

    row: object
    stat: str
    before: Stat
    after: Stat
    threshold: float

    @property
    def ratio(self):
        """How many times better the median is in B. For a stat that has no better side, B over A. None by zero, and
        where either is negative, as what is left of a time may be."""
        above, below = self.after.median, self.before.median
        if self.after.better == "lower":
            above, below = below, above
        if above == below:
            return 1.0
        return above / below if below > 0 and above >= 0 else None

    @property
    def verdict(self):
        if self.before.median == self.after.median:
            return SAME
        size = abs(self.after.median - self.before.median) / abs(self.before.median or self.after.median)
        overlap = self.before.p10 <= self.after.p90 and self.after.p10 <= self.before.p90
        if overlap or 100 * size < self.threshold:
            return NOISE
        if not self.after.better:
            return CHANGED
        return BETTER if (self.after.median < self.before.median) == (self.after.better == "lower") else WORSE


@dataclass(frozen=True)
class Comparison:
    """Of two documents: what is in both, rows in one only, and {why: rows} of stats that cannot be compared."""

    changes: list
    gone: list
    added: list
    apart: dict


def comparison(before, after, threshold=THRESHOLD, section=None):
    """The Comparison of two documents. Rows with equal keys are matched in order."""
    def chosen(document):
        return [row for row in rows_of(document) if section in (None, row.section)]
    waiting = defaultdict(list)
    for row in chosen(before):
        waiting[_key(row)].append(row)
    changes, added, apart = [], [], {}
    for row in chosen(after):
        if not waiting[_key(row)]:
            added.append(row)
            continue
        old = waiting[_key(row)].pop(0)
        for name in dict.fromkeys([*old.stats, *row.stats]):
            a, b = old.stats.get(name), row.stats.get(name)
            if name == SHARE:
                continue
            if a and b and a.unit == b.unit:
                changes.append(Change(row, name, a, b, 0.0 if row.section in EXACT else threshold))
            else:
                why = f"{a.unit} in A, {b.unit} in B" if a and b else f"only in {'A' if a else 'B'}"
                apart.setdefault(f"{name} {why}", []).append(row)
    return Comparison(changes, [row for rows in waiting.values() for row in rows], added, apart)


def _key(row):
    """A row's, but for its place among the ops of a step, which moves with any op that comes or goes before it."""
    section, name, shape = row.key
    return section, name, tuple((key, value) for key, value in shape if key != PLACE)


def differences(before, after):
    """Lines on what else differs between the runs: device, lane, ceilings, other work, an end before its time."""
    def device(document):
        machine = document["machine"]
        return (machine.get("gpu") or {}).get("name") or machine.get("cpu")
    lines = []
    for name, find in (("device", device), ("lane", lambda document: document["settings"].get("lane"))):
        a, b = find(before), find(after)
        if a != b:
            lines.append(f"different {name}s: A ran on {a}, B on {b}")
    a, b = map(ceilings_text, (before, after))
    if a and b and a != b:
        lines.append(f"different ceilings: A's are {a}, B's {b}; percents of a roof or floor are of them")
    for side, document in (("A", before), ("B", after)):
        if is_busy(document["machine"]):
            load = "{:.2f} before, {:.2f} after".format(*document["machine"]["load_average"])
            lines.append(f"{side} ran beside other work: load average {load}")
        if document["incomplete"]:
            lines.append(f"{side} is incomplete: {document['incomplete']}")
    return lines


def change_table(changes):
    """(constant shape values, header, lines) of changes, of which there is at least one."""
    constant = constant_shape([change.row for change in changes])
    words = [shape_words({key: value for key, value in change.row.shape.items() if key not in constant})
             for change in changes]
    lines = []
    for change, shape in zip(changes, words, strict=True):
        unit = change.after.unit
        scale = scale_of([change.before.median, change.after.median], unit)
        cells = [cell for stat in (change.before, change.after)
                 for cell in (f"{figure(stat.median, unit, scale)} {scale[0]}".rstrip(), spread_text(stat, scale))]
        ratio = change.ratio
        lines.append([change.row.name, *[shape] * any(words), change.stat, *cells,
                      "" if ratio is None else number(ratio), change.verdict])
    return constant, ["name", *["shape"] * any(words), "stat", "A", "p10..p90", "B", "p10..p90", "ratio", ""], lines


def text(before, after, threshold=THRESHOLD, section=None, markdown=False, is_all=False):
    """The comparison of two documents for a terminal, or as GitHub markdown. is_all: noise too."""
    found = comparison(before, after, threshold, section)
    table, item = (markdown_table, "- ") if markdown else (aligned, "  ")
    hidden = (SAME,) if is_all else (SAME, NOISE)
    blocks = [f"{side}: {document['command']}, commit {document['commit'] or 'none'}, {document['date']}"
              for side, document in (("A", before), ("B", after))]
    blocks += differences(before, after)
    for name in SECTIONS:
        shown = [change for change in found.changes if change.row.section == name and change.verdict not in hidden]
        if shown:
            constant, header, lines = change_table(shown)
            title = f"{name}: {shape_words(constant)}" if constant else name
            blocks.append(f"\n### {title}\n" if markdown else f"\n{title}")
            blocks.append(table(header, lines))
    for title, lines in (("only in A", map(_words, found.gone)), ("only in B", map(_words, found.added)),
                         ("not compared", (f"{_whose(rows)}: {why}" for why, rows in found.apart.items()))):
        lines = [f"{item}{line}" for line in lines]
        if lines:
            blocks += [f"\n{title}" + ("\n" if markdown else ""), *lines]
    blocks.append(f"\n{summary(found.changes, threshold, is_all)}")
    return "\n".join(blocks)


def _words(row):
    return f"{row.section}: {row.name} ({shape_words(row.shape)})".replace(" ()", "")


def _whose(rows):
    return f"{len(rows)} rows" if len(rows) > MANY_ROWS else "; ".join(map(_words, rows))


def summary(changes, threshold=THRESHOLD, is_all=False):
    counts = {verdict: sum(change.verdict == verdict for change in changes)
              for verdict in (BETTER, WORSE, CHANGED, NOISE, SAME)}
    hidden = {} if is_all else {NOISE: " (hidden, --all shows them)"}
    words = ", ".join(f"{n} {verdict.lower()}{hidden.get(verdict, '')}" for verdict, n in counts.items() if n)
    return (f"{words or 'nothing in common'}; ratio: how many times better B is; noise: under {threshold:g} % or "
            "overlapping p10..p90")


def add_arguments(parser):
    parser.add_argument("before", metavar="A.json", help="the document of a run, written by --json")
    parser.add_argument("after", metavar="B.json", help="of the run to judge")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, metavar="PERCENT",
                        help="a smaller change of a median is noise")
    parser.add_argument("--section", choices=SECTIONS, help="only this part of the documents")
    parser.add_argument("--all", action="store_true", help="show what is noise too")
    parser.add_argument("--fail-on-regression", action="store_true", help="exit status 1 where anything got worse")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help='write it as markdown; "-" prints that')


def run(args, report):
    """Prints the comparison; 1 where something got worse and that is asked for, else 0."""
    if not args.threshold >= 0:
        raise BenchError(f"--threshold is {args.threshold}, expected at least 0")
    before, after = load_document(args.before), load_document(args.after)
    to_stdout = args.markdown == Path("-")
    show(text(before, after, args.threshold, args.section, to_stdout, args.all))
    if args.markdown and not to_stdout:
        args.markdown.write_text(text(before, after, args.threshold, args.section, True, args.all) + "\n",
                                 encoding="utf-8")
    changes = comparison(before, after, args.threshold, args.section).changes
    if args.fail_on_regression and not changes:
        raise BenchError("the two have nothing in common: --fail-on-regression guards nothing")
    return int(args.fail_on_regression and any(change.verdict == WORSE for change in changes))
