"""Two earlier runs side by side: which rows got better, which worse, and what is only noise.

    bench.py compare before.json after.json
    bench.py compare before.json after.json --section kernels --threshold 3 --fail-on-regression

Rows are matched by section, name and shape. The ratio is of medians and above 1 where B is better. A change is noise
where it is under the threshold, or where the p10..p90 ranges of the two overlap.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from measure.report import SECTIONS, BenchError, Stat, load_document, rows_of
from measure.tables import aligned, figure, markdown_table, number, scale_of, shape_words, spread_text

BETTER, WORSE, NOISE, SAME, CHANGED = "better", "WORSE", "noise", "same", "changed"
THRESHOLD = 5.0         # percent


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
        """How many times better the median is in B. For a stat that has no better side, B over A. None by zero."""
        above, below = self.after.median, self.before.median
        if self.after.better == "lower":
            above, below = below, above
        if above == below:
            return 1.0
        return above / below if below else None

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


def changes_of(before, after, threshold=THRESHOLD, section=None):
    """(changes, rows only in `before`, rows only in `after`) of two documents. Equal keys are matched in order."""
    def chosen(document):
        return [row for row in rows_of(document) if section in (None, row.section)]
    waiting = defaultdict(list)
    for row in chosen(before):
        waiting[row.key].append(row)
    changes, added = [], []
    for row in chosen(after):
        if not waiting[row.key]:
            added.append(row)
            continue
        old = waiting[row.key].pop(0)
        for name, stat in row.stats.items():
            if name in old.stats and old.stats[name].unit == stat.unit:
                changes.append(Change(row, name, old.stats[name], stat, threshold))
    return changes, [row for rows in waiting.values() for row in rows], added


def differences(before, after):
    """Lines on what else differs between the runs: the device, the lane, an end before its time."""
    def device(document):
        machine = document["machine"]
        return (machine.get("gpu") or {}).get("name") or machine.get("cpu")
    lines = []
    for name, find in (("device", device), ("lane", lambda document: document["settings"].get("lane"))):
        a, b = find(before), find(after)
        if a != b:
            lines.append(f"different {name}s: A ran on {a}, B on {b}")
    for side, document in (("A", before), ("B", after)):
        if document["incomplete"]:
            lines.append(f"{side} is incomplete: {document['incomplete']}")
    return lines


def change_table(changes):
    """(header, lines) of the changes that say something: not those that are the same."""
    header = ["name", "shape", "stat", "A", "p10..p90", "B", "p10..p90", "ratio", ""]
    lines = []
    for change in changes:
        if change.verdict == SAME:
            continue
        unit = change.after.unit
        scale = scale_of([change.before.median, change.after.median], unit)
        cells = [cell for stat in (change.before, change.after)
                 for cell in (f"{figure(stat.median, unit, scale)} {scale[0]}".rstrip(), spread_text(stat, scale))]
        ratio = change.ratio
        lines.append([change.row.name, shape_words(change.row.shape), change.stat, *cells,
                      "" if ratio is None else number(ratio), change.verdict])
    return header, lines


def text(before, after, threshold=THRESHOLD, section=None, markdown=False):
    """The comparison of two documents for a terminal, or as GitHub markdown."""
    changes, gone, added = changes_of(before, after, threshold, section)
    table = markdown_table if markdown else aligned
    blocks = [f"{side}: {document['command']}, commit {document['commit'] or 'none'}, {document['date']}"
              for side, document in (("A", before), ("B", after))]
    blocks += differences(before, after)
    for name in SECTIONS:
        header, lines = change_table([change for change in changes if change.row.section == name])
        if lines:
            blocks.append(f"\n### {name}\n" if markdown else f"\n{name}")
            blocks.append(table(header, lines))
    for title, rows in (("only in A", gone), ("only in B", added)):
        if rows:
            blocks.append(f"\n{title}" + ("\n" if markdown else ""))
            blocks += [f"{'- ' if markdown else '  '}{row.section}: {row.name} ({shape_words(row.shape)})".replace(
                " ()", "") for row in rows]
    blocks.append(f"\n{summary(changes, threshold)}")
    return "\n".join(blocks)


def summary(changes, threshold=THRESHOLD):
    counts = {verdict: sum(change.verdict == verdict for change in changes)
              for verdict in (BETTER, WORSE, CHANGED, NOISE, SAME)}
    words = ", ".join(f"{n} {verdict.lower()}" for verdict, n in counts.items() if n)
    return (f"{words or 'nothing in common'}; ratio: how many times better B is; noise: under {threshold:g} % or "
            "overlapping p10..p90")


def add_arguments(parser):
    parser.add_argument("before", metavar="A.json", help="the document of a run, written by --json")
    parser.add_argument("after", metavar="B.json", help="of the run to judge")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, metavar="PERCENT",
                        help="a smaller change of a median is noise")
    parser.add_argument("--section", choices=SECTIONS, help="only this part of the documents")
    parser.add_argument("--fail-on-regression", action="store_true", help="exit status 1 where anything got worse")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help='write it as markdown; "-" prints that')


def run(args, report):
    """Prints the comparison; 1 where something got worse and that is asked for, else 0."""
    if not args.threshold >= 0:
        raise BenchError(f"--threshold is {args.threshold}, expected at least 0")
    before, after = load_document(args.before), load_document(args.after)
    to_stdout = args.markdown == Path("-")
    print(text(before, after, args.threshold, args.section, markdown=to_stdout))
    if args.markdown and not to_stdout:
        args.markdown.write_text(text(before, after, args.threshold, args.section, markdown=True) + "\n",
                                 encoding="utf-8")
    changes, _, _ = changes_of(before, after, args.threshold, args.section)
    return int(args.fail_on_regression and any(change.verdict == WORSE for change in changes))
