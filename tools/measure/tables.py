"""A bench document as text for a terminal and as GitHub markdown; how its figures are rounded and scaled."""

import re
from collections import Counter
from math import floor, log10

from measure.report import SECTIONS, check_document, rows_of

QUIET_LOAD = 0.5        # a load average above this before we start, or above this and all cores after: other work
MANY_ROWS = 3           # a note of more rows than this names their number
_PERCENTILE = re.compile(r" p\d+$")
# unit: (a unit for people, how much of ours it is), rising; a column takes one of them
SCALES = {"s": [("us", 1e-6), ("ms", 1e-3), ("s", 1.0)],
          "bytes": [("bytes", 1.0), ("KB", 1e3), ("MB", 1e6), ("GB", 1e9)],
          "bytes/s": [("MB/s", 1e6), ("GB/s", 1e9)],
          "flop": [("flop", 1.0), ("MFLOP", 1e6), ("GFLOP", 1e9), ("TFLOP", 1e12)],
          "flop/s": [("MFLOP/s", 1e6), ("GFLOP/s", 1e9), ("TFLOP/s", 1e12)],
          "1": [("", 1.0)]}


def number(value):
    """Three significant digits, no exponent, nothing cut before the point."""
    digits = 2 - floor(log10(abs(value))) if value else 0
    return f"{value:.{max(0, digits)}f}"


def scale_of(values, unit):
    """(label, divisor) for figures of one column: the largest scale in which the one in their middle is at least 1, or
    the largest is a thousand."""
    scales = SCALES.get(unit, [(unit, 1.0)])
    sizes = sorted(abs(value) for value in values if value)
    least = max(sizes[len(sizes) // 2], sizes[-1] / 1e3) if sizes else 0
    return next((scale for scale in reversed(scales) if least >= scale[1]), scales[0])


def figure(value, unit, scale=None):
    """One number under a scale, "12.3 us" with its unit where no scale is given; whole counts and bytes stay whole."""
    label, divisor = scale or scale_of([value], unit)
    is_whole = unit in ("1", "bytes", "flop") and divisor == 1 and value == int(value)
    text = str(int(value)) if is_whole else number(value / divisor)
    return text if scale or not label else f"{text} {label}"


def shape_value(value):
    """A value of a row's shape as people read it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def shape_words(shape):
    return ", ".join(f"{key} {shape_value(value)}" for key, value in shape.items() if value is not None)


def spread_text(stat, scale):
    """p10..p90 under a scale, "" where the samples say no more than their median."""
    low, high = (figure(value, stat.unit, scale) for value in (stat.p10, stat.p90))
    return "" if low == high else f"{low}..{high}"


def goal_text(row):
    """("time <= 300 ms", "pass" or "MISS"), two empty ones without a goal."""
    if row.goal is None:
        return "", ""
    sign, bound = ("<=", row.goal.at_most) if row.goal.at_least is None else (">=", row.goal.at_least)
    unit = row.stats[row.goal.stat].unit
    return f"{row.goal.stat} {sign} {figure(bound, unit)}", "pass" if row.is_met else "MISS"


def constant_shape(rows):
    """What the shapes of all rows say alike."""
    return {key: value for key, value in rows[0].shape.items()
            if all(key in row.shape and repr(row.shape[key]) == repr(value) for row in rows)}


def alike(rows):
    """A section's rows in lists, a table each: those of a list have at least half of their stats in common with the
    widest of it, or add none to them."""
    lists = []
    for row in rows:
        names = set(row.stats)
        for found in lists:
            widest = max((set(other.stats) for other in found), key=len)
            if names <= widest or widest <= names or 2 * len(names & widest) >= len(names | widest):
                found.append(row)
                break
        else:
            lists.append([row])
    return lists


def section_table(rows):
    """(constant shape values, header, lines of cells) of the rows of a table."""
    constant = constant_shape(rows)
    varying = [key for key in dict.fromkeys(key for row in rows for key in row.shape) if key not in constant]
    columns = [[row.name for row in rows]]
    header = ["name"]
    for key in varying:
        header.append(key)
        columns.append([shape_value(row.shape.get(key)) for row in rows])
    families = _families(rows)
    for name in dict.fromkeys(name for row in rows for name in row.stats):
        for label, cells in _stat_columns(name, [row.stats.get(name) for row in rows], families[_family(name)]):
            header.append(label)
            columns.append(cells)
    if any(row.goal for row in rows):
        header += ["goal", ""]
        columns += list(map(list, zip(*map(goal_text, rows), strict=True)))
    return constant, header, [list(line) for line in zip(*columns, strict=True)]


def _family(name):
    """"ttft p99" -> "ttft": percentiles of one quantity are read side by side, so they have one scale."""
    return _PERCENTILE.sub("", name)


def _families(rows):
    """{family: [Stat]} of all stats of a table."""
    families = {}
    for row in rows:
        for name, stat in row.stats.items():
            families.setdefault(_family(name), []).append(stat)
    return families


def _stat_columns(name, stats, family):
    """[(header, cells)]: the medians, and p10..p90 where there is any. Units that differ stand beside the figures.
    family: the stats that share a scale, these among them."""
    units = {stat.unit for stat in stats if stat is not None}
    scales = {unit: scale_of([stat.median for stat in family if stat.unit == unit], unit) for unit in units}
    cells, spreads = [], []
    for stat in stats:
        scale = stat and scales[stat.unit]
        unit = f" {scale[0]}" if stat and len(units) > 1 and scale[0] else ""
        cells.append(figure(stat.median, stat.unit, scale) + unit if stat else "")
        spreads.append(spread_text(stat, scale) if stat else "")
    label = scales[units.pop()][0] if len(units) == 1 else ""
    columns = [(name if name.replace("_", " ").split()[-1] == label or not label else f"{name} {label}", cells)]
    return [*columns, ("p10..p90", spreads)] if any(spreads) else columns


def notes_of(rows):
    """Lines: each note once, with the rows it is of unless it is of all, or with the names whose rows all have it."""
    constant, of, named = constant_shape(rows), {}, Counter(row.name for row in rows)
    for row in rows:
        for note in row.notes:
            of.setdefault(note, []).append(row)
    lines = []
    for note, noted in of.items():
        names = Counter(row.name for row in noted)
        if len(noted) == len(rows) > 1:
            lines.append(note)
        elif len(names) < len(noted) and len(names) <= MANY_ROWS and all(names[name] == named[name] for name in names):
            lines.append(f"{'; '.join(names)}: {note}")
        elif len(noted) > MANY_ROWS:
            lines.append(f"{len(noted)} rows: {note}")
        else:
            words = [shape_words({key: row.shape[key] for key in row.shape if key not in constant}) for row in noted]
            names = [f"{row.name} ({word})" if word else row.name for row, word in zip(noted, words, strict=True)]
            lines.append(f"{'; '.join(names)}: {note}")
    return lines


def header_lines(document):
    """[(key, text)]: what makes the figures worth something: command, commit, machine, versions."""
    machine = document["machine"]
    lines = [("command", document["command"]), ("commit", f"{document['commit'] or 'none'}, {document['date']}")]
    if "lane" in document["settings"]:
        lines.append(("lane", str(document["settings"]["lane"])))
    before, after = machine.get("load_average") or (None, None)
    load = f", load average {before:.2f} before, {after:.2f} after" if before is not None else ""
    if {"cpu", "cores", "memory_bytes"} <= set(machine):
        lines.append(("machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} "
                      f"GiB{load}"))
    if "gpu" in machine:
        lines.append(("gpu", gpu_text(machine["gpu"])))
    lines.append(("versions", ", ".join(f"{name} {version}" for name, version in document["versions"].items())))
    ceilings = ceilings_text(document)
    if ceilings:
        lines.append(("ceilings", f"{ceilings} ({document['facts']['ceilings'].get('source', 'given')})"))
    lines += [(key, str(value)) for key, value in document["metadata"].items()]
    if is_busy(machine):
        lines.append(("busy", "other work was running on this machine: trust the bests before the medians, and "
                      "neither for a claim"))
    return lines


def is_busy(machine):
    """Whether other work ran beside the run; our own raises the load average to one a core at most."""
    before, after = machine.get("load_average") or (None, None)
    if before is None:
        return False
    return before > QUIET_LOAD or ("cores" in machine and after > machine["cores"] + QUIET_LOAD)


def ceilings_text(document):
    """The ceilings' figures, "" without any."""
    ceilings = document["facts"].get("ceilings")
    if not isinstance(ceilings, dict) or not {"bytes_per_s", "flops_per_s"} <= set(ceilings):
        return ""
    return f"{figure(ceilings['bytes_per_s'], 'bytes/s')}, {figure(ceilings['flops_per_s'], 'flop/s')}"


def gpu_text(gpu):
    """Name, size, driver, and clocks and power before and after."""
    parts = [str(gpu.get("name", "unknown"))]
    if "n_sms" in gpu:
        parts.append(f"{gpu['n_sms']} SMs")
    if "memory_bytes" in gpu:
        parts.append(f"{gpu['memory_bytes'] / 2**30:.0f} GiB")
    if "driver" in gpu:
        parts.append(f"driver {gpu['driver']}")
    if "power_limit_w" in gpu:
        parts.append(f"limit {gpu['power_limit_w']:g} W")
    for when in ("before", "after"):
        state = gpu.get(when) or {}
        words = [f"{state[key]:g} {unit}" for key, unit in (("sm_mhz", "MHz"), ("power_w", "W"), ("celsius", "C"))
                 if isinstance(state.get(key), float)]
        if words:
            parts.append(f"{' '.join(words)} {when}")
    return ", ".join(parts)


def aligned(header, lines):
    """Lines of aligned columns; the first column to the left, the others to the right."""
    rows = [header, *lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row):
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        return "  ".join([first.strip().ljust(widths[0]), *rest]).rstrip()
    return "\n".join(map(line, rows))


def markdown_table(header, lines):
    def line(cells):
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    rule = "|" + "|".join([":--", *["--:"] * (len(header) - 1)]) + "|"
    return "\n".join([line(header), rule, *map(line, lines)])


def sections(document):
    """[(section, rows)] in the order of SECTIONS."""
    rows = rows_of(document)
    found = {section: [row for row in rows if row.section == section] for section in SECTIONS}
    return [(section, rows) for section, rows in found.items() if rows]


def titled_tables(document):
    """[(title, rows)]: the tables of every section, named after their rows where a section has several."""
    found = []
    for section, rows in sections(document):
        lists = alike(rows)
        for one in lists:
            names = {row.name for row in one}
            found.append((f"{section}, {one[0].name}" if len(lists) > 1 == len(names) else section, one))
    return found


def text(report):
    """A Report or its document for a terminal: the tables, what was skipped, and the header last."""
    document = _document(report)
    blocks = [f"INCOMPLETE: {document['incomplete']}"] if document["incomplete"] else []
    for title, rows in titled_tables(document):
        constant, header, lines = section_table(rows)
        title = f"{title}: {shape_words(constant)}" if constant else title
        blocks.append("\n".join([title, aligned(header, lines), *(f"  {note}" for note in notes_of(rows))]))
    if document["skipped"]:
        blocks.append("\n".join(["skipped", *(f"  {one['what']}: {one['why']}" for one in document["skipped"])]))
    blocks.append("\n".join(f"{key}: {value}" for key, value in header_lines(document)))
    return "\n\n".join(blocks)


def markdown(report):
    """The same as GitHub markdown."""
    document = _document(report)
    blocks = [f"**Incomplete: {document['incomplete']}**"] if document["incomplete"] else []
    for title, rows in titled_tables(document):
        constant, header, lines = section_table(rows)
        blocks.append(f"### {title}")
        if constant:
            blocks.append(shape_words(constant))
        blocks.append(markdown_table(header, lines))
        notes = notes_of(rows)
        if notes:
            blocks.append("\n".join(f"- {note}" for note in notes))
    if document["skipped"]:
        blocks += ["### skipped", "\n".join(f"- {one['what']}: {one['why']}" for one in document["skipped"])]
    blocks.append("\n".join(f"- {key}: {value}" for key, value in header_lines(document)))
    return "\n\n".join(blocks) + "\n"


def _document(report):
    document = report if isinstance(report, dict) else report.as_dict()
    check_document(document)
    return document
