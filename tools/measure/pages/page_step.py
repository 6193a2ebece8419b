"""The page's step charts: a bar a case, split by op into the time at the ceilings and the rest; the largest losses."""

from measure.pages import charts
from measure.pages.charts import Segment, escaped
from measure.pages.page_tables import boxed, figures_of, roof_percent, row_words
from measure.step.timeline import PARTS
from measure.tables import figure, number, scale_of

MOST_LOSSES = 10
# Of PARTS: {name: (kind, words)}.
BESIDE = {"gaps": ("gap", "gaps between kernels"), "host": ("host", "host, outside the launches")}
CASE = ("preset", "model", "layers", "case", "lane", "ple")         # of a row's shape: what says which step it is of
KEY = ('<span class="segment-key">at the ceilings</span><span class="segment-key rest">lost</span>'
       '<span class="segment-key gap">gaps and host</span>')


def steps(rows):
    """A chart for each case of section "step" whose ops have times; "" where none has."""
    cases = {}
    for row in rows:
        case = ", ".join(f"{row.shape[key]}{' layers' * (key == 'layers')}" for key in CASE
                         if row.shape.get(key) is not None)
        cases.setdefault(case, []).append(row)
    drawn = "".join(_chart(case, found) for case, found in cases.items())
    return drawn and charts.family_key([charts.family(row.name) for row in rows if row.name not in PARTS], KEY) + drawn


def _chart(case, rows):
    rows = [row for row in rows if "time" in row.stats]
    parts = {row.name: row for row in sorted((row for row in rows if row.name in PARTS),
                                             key=lambda row: list(PARTS).index(row.name))}
    ops = sorted((row for row in rows if row.name not in PARTS), key=lambda row: row.shape.get("order", 0))
    shown = [*ops, *(parts[name] for name in BESIDE if name in parts)]
    total = sum(map(_time, shown))
    if not total:
        return ""
    lost = [row for row in sorted(shown, key=_lost, reverse=True)[:MOST_LOSSES] if _lost(row) > 0]
    places = {id(row): place for place, row in enumerate(lost, 1)}
    bar = charts.strip([segment for row in shown for segment in _segments(row, places.get(id(row), ""))], total)
    tables = (_losses(lost, total) if lost else "") + (_attribution(list(parts.values())) if "floor" in parts else "")
    return f'<h3>{escaped(case)}</h3>{bar}<div class="pair">{tables}</div>'


def _attribution(parts):
    """What the parts are of their sum, the wall time of a step where all are there. A part may be negative."""
    wall = sum(row.stats["time"].median for row in parts)
    scale = scale_of([wall], "s")
    lines = []
    for row in parts:
        time = row.stats["time"].median
        share = 100 * time / wall if wall > 0 else 0.0
        said = escaped("; ".join(row.notes))
        lines.append(f'<tr><td class="part">{escaped(row.name)} <small>{said}</small></td>'
                     f'<td>{figure(time, "s", scale)}</td><td class="bar"><span>{number(share)}</span>'
                     f"{charts.percent_bar(share)}</td></tr>")
    lines.append(f'<tr><td class="part">sum</td><td>{figure(wall, "s", scale)}</td><td></td></tr>')
    return boxed(f'<th class="text">where it goes</th><th>time {scale[0]}</th><th>of the step %</th>', "".join(lines))


def _time(row):
    return max(row.stats["time"].median, 0.0)


def _lost(row):
    """Seconds over the floor, 0 where none is known; all of a gap."""
    if row.name in BESIDE:
        return _time(row)
    return max(_time(row) - row.stats["floor"].median, 0.0) if "floor" in row.stats else 0.0


def _segments(row, place):
    title = f"{row_words(row)}\n{figures_of(row)}"
    if row.name in BESIDE:
        return [Segment(_time(row), "beside", BESIDE[row.name][0], title, str(place))]
    family = charts.family(row.name)
    return [Segment(_time(row) - _lost(row), family, "floor", title, row.name),
            Segment(_lost(row), family, "rest", title, str(place))]


def _losses(rows, total):
    """The table under a bar: its numbers are those on the bar."""
    scale = scale_of([_time(row) for row in rows], "s")
    head = ('<th class="lead">#</th><th class="text">the largest losses</th><th>of the bar %</th>'
            f"<th>lost {scale[0]}</th><th>time {scale[0]}</th><th>launches</th><th>percent of roof</th>")
    shares = [100 * _lost(row) / total for row in rows]
    lines = []
    for place, (row, share) in enumerate(zip(rows, shares, strict=True), 1):
        percent = roof_percent(row)
        family, name = ("beside", BESIDE[row.name][1]) if row.name in BESIDE else (charts.family(row.name), row.name)
        lines.append(f'<tr><td class="lead {family}">{place}</td><td class="text">{escaped(name)}</td>'
                     f'<td class="bar"><span>{number(share)}</span>{charts.percent_bar(share, max(shares))}</td>'
                     f"<td>{figure(_lost(row), 's', scale)}</td><td>{figure(_time(row), 's', scale)}</td>"
                     f"<td>{escaped(row.shape.get('n_launches', ''))}</td>"
                     f"<td>{'' if percent is None else number(percent)}</td></tr>")
    return boxed(head, "".join(lines))
