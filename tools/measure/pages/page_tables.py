"""The page's tables: the cells of tables.section_table, with bars for percents and ratios."""

from dataclasses import replace

from measure.pages import charts
from measure.pages.charts import escaped
from measure.tables import figure, goal_text, scale_of, section_table, shape_words, spread_text

MOST_SHAPE_COLUMNS = 4          # more sizes than this, or sizes that some rows lack, share one column
SPREAD = "p10..p90"             # section_table's head of a column that belongs to the one before it
VERDICT = ""                    # likewise: "pass" or "MISS", after the goal
LONG = 40                       # characters of a text that breaks into lines
DRAWN = {"%": charts.percent_bar, "x": charts.ratio_bar}
ERROR = "error"                 # a share of something: it has nothing to do with 1
MOST_RATIO = 10.0               # where a ratio's bar ends
ROOF = ("percent_of_roof", "percent_of_floor", "percent of roof")


def roof_percent(row):
    """The median of a row's percent of roof, None where it has none."""
    return next((row.stats[name].median for name in ROOF if name in row.stats), None)


def row_words(row):
    """"linear: qkv local (n_tokens 1, n_in 5376)"."""
    return f"{row.name} ({shape_words(row.shape)})" if row.shape else row.name


def missed_words(row):
    """What a row was to reach and what it did."""
    stat = row.stats[row.goal.stat]
    return f"{row.section}: {row_words(row)}: {figure(stat.median, stat.unit)}, goal {goal_text(row)[0]}"


def figures_of(row):
    """Lines of all of a row's figures, for hovering."""
    lines = []
    for name, stat in row.stats.items():
        spread = spread_text(stat, scale_of([stat.median], stat.unit))
        lines.append(f"{name} {figure(stat.median, stat.unit)}" + (f" ({spread})" if spread else ""))
    return "\n".join(lines)


def folded(rows):
    """(constant sizes, rows): sizes that are many, or differ in kind from row to row, as one text named "sizes"."""
    constant, _, _ = section_table(rows)
    varying = dict.fromkeys(key for row in rows for key in row.shape if key not in constant)
    if len(varying) <= MOST_SHAPE_COLUMNS and all(key in row.shape for row in rows for key in varying):
        return constant, rows
    words = [shape_words({key: value for key, value in row.shape.items() if key in varying}) for row in rows]
    return constant, [replace(row, shape={"sizes": text}) for row, text in zip(rows, words, strict=True)]


def table(rows, leads=None, caption=""):
    """A section's rows as HTML, in a box that scrolls where it is wider than the window; p10..p90 below the median.

    leads  (number, family) of each row, for a first column that points into a chart
    """
    constant, rows_folded = folded(rows)
    same, header, lines = section_table(rows_folded)
    constant = {key: value for key, value in (constant | same).items() if value is not None}
    columns = [column for column, title in enumerate(header) if title not in (SPREAD, VERDICT)]
    header, lines = _short_goals(rows, header, lines)
    bars = _bars(rows, header)
    styles = {column: "" if all(_is_number(line[column]) for line in lines) else "text" for column in columns}
    styles.update({column: "text sizes" for column in columns if header[column] == "sizes"
                   or (styles[column] and max(len(line[column]) for line in lines) > LONG)})
    styles.update({column: "goal" for column in columns if header[column + 1:column + 2] == [VERDICT]})
    above = [caption, f"All: {shape_words(constant)}." if constant else "",
             f"Medians, {SPREAD} below them." if SPREAD in header else ""]
    head = "".join(_tag("th", escaped(header[column]), styles[column]) for column in columns)
    body = []
    for index, (row, line) in enumerate(zip(rows, lines, strict=True)):
        lead, attribute = "", ""
        if leads:
            number, family = leads[index]
            lead, attribute = _tag("td", number, f"lead {family}"), f' data-n="{number}"'
        cells = "".join(_cell(row, line, column, header, styles[column], bars) for column in columns)
        body.append(f"<tr{attribute}>{lead}{cells}</tr>")
    words = " ".join(filter(None, above))
    return ((f"<p>{escaped(words)}</p>" if words else "")
            + boxed(f"{_tag('th', '#', 'lead') if leads else ''}{head}", "".join(body)))


def _short_goals(rows, header, lines):
    """Where all goals are on one figure the head says which, not every cell."""
    names = {row.goal.stat for row in rows if row.goal}
    if len(names) != 1:
        return header, lines
    name, column = names.pop(), header.index(VERDICT) - 1
    cut = [[*line[:column], line[column].removeprefix(f"{name} "), *line[column + 1:]] for line in lines]
    return [*header[:column], f"goal of {name}", *header[column + 1:]], cut


def boxed(head, body):
    """A table of cells of a head and rows of a body, in its own scroll box."""
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _tag(name, content, style=""):
    return f'<{name} class="{style}">{content}</{name}>' if style else f"<{name}>{content}</{name}>"


def _cell(row, line, column, header, style, bars):
    text = escaped(line[column])
    beside = header[column + 1] if column + 1 < len(header) else None
    if beside == VERDICT:
        verdict = {"pass": '<b class="good">pass</b> ', "MISS": '<b class="bad">MISS</b> '}.get(line[column + 1], "")
        return _tag("td", verdict + text, "goal")
    below = f" <small>{escaped(line[column + 1])}</small>" if beside == SPREAD and line[column + 1] else ""
    bar = bars[column](row) if column in bars else ""
    return _tag("td", f"<span>{text}</span>{bar}{below}", "bar") if bar else _tag("td", text + below, style)


def _is_number(text):
    try:
        float(text or "0")
    except ValueError:
        return False
    return True


def _bars(rows, header):
    """{column: row -> SVG} of the stats that are percents, or ratios that are better on one side or have a goal."""
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row.stats):
        stats = [row.stats[name] for row in rows if name in row.stats]
        unit = stats[0].unit
        title = name if name.endswith(unit) else f"{name} {unit}"
        is_judged = unit != "x" or stats[0].better or any(row.goal and row.goal.stat == name for row in rows)
        if unit in DRAWN and name != ERROR and is_judged and title in header:
            found[header.index(title)] = _bar(DRAWN[unit], name, [stat.median for stat in stats])
    return found


def _bar(draw, name, values):
    """row -> SVG, "" for a row without this stat."""
    most = max(100.0, *values) if draw is charts.percent_bar else \
        min(MOST_RATIO, max([2.0, *(max(value, 1 / value) for value in values if value > 0)]))

    def bar(row):
        if name not in row.stats:
            return ""
        goal = row.goal if row.goal and row.goal.stat == name else None
        bound = goal and (goal.at_most if goal.at_least is None else goal.at_least)
        return draw(row.stats[name].median, most, bound, _style(row, name, goal))
    return bar


def _style(row, name, goal):
    """Whether a bar is good or bad: as its goal says; a peer's ratio without one, as its side of 1 says."""
    is_good = row.is_met if goal else None
    stat = row.stats[name]
    if goal is None and row.section == "against" and stat.unit == "x" and stat.better:
        is_good = stat.median >= 1 if stat.better == "higher" else stat.median <= 1
    return "value" if is_good is None else "good" if is_good else "bad"
