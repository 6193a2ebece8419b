"""A bench document as one self-contained HTML page: no network, no script needed to read it, light and dark.

    html(document) -> str           document as Report.as_dict() or load_document(path) gives it

Figures come from tables.py, so they are those of the text and markdown tables; bars and plots from charts.py.
"""

import json
from dataclasses import replace
from pathlib import Path

from measure.pages import charts
from measure.pages.charts import escaped
from measure.pages.page_step import steps
from measure.pages.page_tables import ROOF, figures_of, folded, missed_words, roof_percent, row_words, table
from measure.report import check_document
from measure.step.timeline import PARTS
from measure.tables import alike, header_lines, notes_of, sections

HERE = Path(__file__).resolve().parent
# section: (title, what to know to read it)
TITLES = {
    "ceilings": ("Ceilings", "What this machine does at most, measured in the same run."),
    "kernels": ("Kernels", "The roof is the time that a kernel's bytes or its FLOPs take at the ceilings, whichever is "
                           "longer; percent of roof is that time over the measured one. A kernel without FLOPs is not "
                           "in the plot."),
    "traffic": ("Traffic", "Counted by the emulator's checker, without a clock. cost: the bytes that the cost model "
                           "says. moved: the 32-byte sectors that warps ask for, in bytes, but for small rereads, "
                           "which a cache serves. distinct: each byte once."),
    "resources": ("Resources", "What each kernel takes of a multiprocessor (SM), as the compiler says, and how many of "
                               "its blocks and warps an SM holds at once."),
    "engine": ("Engine", "Whole steps and generations. wall: from building the batch to having its tokens. gpu or ops: "
                         "the launches alone, back to back. floor: what weights, K and V take at the ceilings. tpot: "
                         "time per token, itl: between two tokens, ttft: to the first."),
    "step": ("Where a step's time goes", "Each op's launches, timed in a row: the full part is what its bytes or FLOPs "
                                         "take at the ceilings, the light part is lost."),
    "serve": ("Serving", "A trace of requests, played in real time."),
    "load": ("Loading", "From files to weights in place."),
    "against": ("Beside peers", "In turns, on the same inputs, outputs compared first. A ratio's bar begins at 1."),
    "tests": ("Tests", ""),
    "floors": ("Floors", "By count alone: what bytes and FLOPs take at the ceilings."),
}
MOST_OPEN = 12                  # lines of a list that is shown unasked
STATS = (*ROOF, "time", "bytes_per_s", "flops_per_s")       # of a kernel, what is read first
ORDER = ("engine", "step", "kernels", "against", "serve", "load", "ceilings", "floors", "traffic", "resources", "tests")


def html(document):
    """The page. Raises BenchError for what is no bench document."""
    check_document(document)
    found = dict(sections(document))
    names = [name for name in ORDER if name in found]
    body = [_header(document, found), _notices(document, found)]
    if names:
        links = "".join(f'<a href="#{name}">{TITLES[name][0]}</a>' for name in names)
        body.append(f"<nav>{links}</nav>")
    body += [_section(name, found[name], document) for name in names]
    body.append(_details(document))
    return ("<!doctype html>\n"
            '<html lang="en"><head><meta charset="utf-8"/>'
            '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
            f"<title>{escaped(_title(document))}</title><style>{(HERE / 'page.css').read_text()}</style></head>\n"
            f"<body>{charts.HATCH}{''.join(body)}<script>{(HERE / 'page.js').read_text()}</script></body></html>\n")


def _title(document):
    machine = document["machine"]
    on = machine.get("gpu", {}).get("name") or machine.get("cpu") or "unknown machine"
    return f"Rawgem bench: {on}"


def _header(document, found):
    goals = [row for rows in found.values() for row in rows if row.goal]
    lines = header_lines(document)
    if goals:
        lines.append(("goals", f"{sum(row.is_met for row in goals)} of {len(goals)} met"))
    terms = "".join(f"<dt>{escaped(key)}</dt><dd>{escaped(value)}</dd>" for key, value in lines)
    return f"<header><h1>{escaped(_title(document))}</h1><dl>{terms}</dl></header>\n"


def _notices(document, found):
    """What a reader must not miss: a run that ended early, goals missed, what was skipped and why."""
    parts = []
    if document["incomplete"]:
        parts.append(f'<p class="loud"><strong>Incomplete run:</strong> {escaped(document["incomplete"])}. What was '
                     "measured until then follows.</p>")
    elif not found:
        parts.append('<p class="loud">Nothing was measured.</p>')
    missed = [row for rows in found.values() for row in rows if row.is_met is False]
    if missed:
        parts.append(_list("Goals missed", list(map(missed_words, missed)), "missed"))
    if document["skipped"]:
        parts.append(_list("Skipped", [f"{one['what']}: {one['why']}" for one in document["skipped"]], "skipped"))
    return "".join(parts)


def _list(title, lines, style):
    """Folded up where it is long: goals that are missed stand in the tables too."""
    items = "".join(f"<li>{escaped(line)}</li>" for line in lines)
    is_open = ' open="open"' if len(lines) <= MOST_OPEN else ""
    return f'<details class="{style}"{is_open}><summary>{title}: {len(lines)}</summary><ul>{items}</ul></details>\n'


def _section(name, rows, document):
    title, explained = TITLES[name]
    content = {"kernels": _kernels, "step": _step}.get(name, _plain)(rows, document)
    return (f'<section id="{name}"><h2>{title}</h2>{f"<p>{explained}</p>" if explained else ""}{content}'
            f"{_notes([row for row in rows if name != 'step' or row.name not in PARTS])}</section>\n")


def _notes(rows):
    notes = notes_of(rows) if rows else []
    return f'<ul class="notes">{"".join(f"<li>{escaped(note)}</li>" for note in notes)}</ul>' if notes else ""


def _plain(rows, document):
    return "".join(map(table, alike(rows)))


def _step(rows, document):
    return steps(rows) or _plain(rows, document)


def _kernels(rows, document):
    """The plot with its numbered list beside it, then the table, furthest from the roof first."""
    known = [roof_percent(row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (known[i] is None, known[i] or 0))
    rows = [replace(rows[i], stats={name: rows[i].stats[name] for name in dict.fromkeys([*STATS, *rows[i].stats])
                                    if name in rows[i].stats}) for i in order]
    leads = [(number, charts.family(row.name)) for number, row in enumerate(rows, 1)]
    plot = _roofline(rows, leads, document["facts"].get("ceilings"))
    return plot + table(rows, leads, "Furthest from the roof first.")


def _roofline(rows, leads, ceilings):
    """"" without ceilings or where no row has time, bytes and FLOPs."""
    points = []
    for (number, family), row in zip(leads, rows, strict=True):
        time, n_bytes, flops = (row.stats[name].median if name in row.stats else 0
                                for name in ("time", "bytes", "flops"))
        if time > 0 and n_bytes > 0 and flops > 0:
            points.append(charts.Point(number, family, flops / n_bytes, flops / time,
                                       f"{number}. {row_words(row)}\n{figures_of(row)}"))
    if not points or not isinstance(ceilings, dict) or not {"bytes_per_s", "flops_per_s"} <= set(ceilings):
        return ""
    roof = ceilings["bytes_per_s"], ceilings["flops_per_s"]
    drawn = "".join(f'<div class="{style}">{charts.roofline(points, *roof, *size)}</div>'
                    for style, size in (("if-wide", (760, 520)), ("if-narrow", (360, 380))))
    plotted = {point.number for point in points}
    items = "".join(f'<li class="{family}" data-n="{number}"><b>{number}</b>{escaped(row_words(row))}'
                    f'{"" if number in plotted else " <i>not drawn</i>"}</li>'
                    for (number, family), row in zip(leads, _short(rows), strict=True))
    return (f'{charts.family_key([family for _, family in leads])}<div class="plot">{drawn}'
            f'<ol class="legend">{items}</ol></div>')


def _short(rows):
    """Rows without the sizes that are the same for all."""
    constant, _ = folded(rows)
    return [replace(row, shape={key: value for key, value in row.shape.items() if key not in constant}) for row in rows]


def _details(document):
    shown = {"settings": document["settings"], "machine": document["machine"],
             "facts": document["facts"]}
    text = json.dumps({key: value for key, value in shown.items() if value}, indent=1, default=str, ensure_ascii=False)
    return (f'<details class="recorded"><summary>Settings, machine and facts as recorded</summary>'
            f"<pre>{escaped(text)}</pre></details>\n")
