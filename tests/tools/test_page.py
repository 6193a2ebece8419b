"""tools/measure/pages: a page that is whole and says what the document says, no more and no less."""

import copy
import json
import re
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest
from measure.pages import charts, page
from measure.pages.page import ORDER, TITLES, html
from measure.report import SECTIONS, BenchError, Goal, Report, Row, Stat
from measure.step.timeline import PARTS
from measure.tables import figure, section_table

from engine.trace import OPS

BYTES_PER_S, FLOPS_PER_S = 4e12, 800e12
NASTY = "<script>alert('1')</script> & \"quoted\" \x1b[31m \x00 \ud800"
VOID = {"meta"}


def kernel(name, time_s, n_bytes, flops, shape, goal=None, notes=()):
    floor_s = max(n_bytes / BYTES_PER_S, flops / FLOPS_PER_S)
    samples = [time_s * factor for factor in (1.0, 1.07, 0.94, 1.02)]
    stats = {"time": Stat("s", samples, "lower"), "bytes": Stat("bytes", n_bytes), "flops": Stat("flop", flops),
             "percent_of_roof": Stat("%", [100 * floor_s / s for s in samples], "higher")}
    return Row("kernels", name, {"preset": "gemma-3-1b", **shape}, stats, notes, goal)


def kernels():
    """Thirty, of which many lie on one another in the plot."""
    rows = []
    for n_tokens in (1, 2, 4, 8, 16, 64, 512):
        for n_in, n_out in ((1152, 1536), (1024, 1152), (6912, 1152)):
            n_bytes, flops = 2 * (n_in * n_out + n_tokens * (n_in + n_out)), 2 * n_tokens * n_in * n_out
            rows.append(kernel("linear", 1.3 * max(n_bytes / BYTES_PER_S, flops / FLOPS_PER_S), n_bytes, flops,
                               {"n_tokens": n_tokens, "n_in": n_in, "n_out": n_out}, Goal("percent_of_roof", 80)))
        rows.append(kernel("attention decode", n_tokens * 3e-6, n_tokens * 2**20, n_tokens * 2**23,
                           {"rows": f"{n_tokens}*1@512", "head_dim": 256, "window": None}, notes=["L2 warm"]))
    rows.append(kernel("embed", 2e-6, 2**20, 0, {"n_tokens": 64}))
    rows.append(Row("kernels", "add_norm", {"preset": "gemma-3-1b", "n_tokens": 3}, {}, "not timed: wrong"))
    return rows


def step(case="decode=1@64"):
    shape = {"preset": "gemma-3-1b", "case": case, "lane": "cuda"}
    ops = [("linear qkv", 3e-4, 2e-4), ("sample", 2e-5, 3e-5), ("attention decode local", 1e-4, 2e-5)]
    rows = [Row("step", name, {**shape, "order": order, "n_launches": 26},
                {"time": Stat("s", time_s, "lower"), "floor": Stat("s", floor_s),
                 "percent_of_roof": Stat("%", 100 * floor_s / time_s)})
            for order, (name, time_s, floor_s) in enumerate(ops)]
    parts = dict(zip(PARTS, (1.5e-4, 2e-5, 2.5e-4, 7e-5, -1e-5), strict=True))
    return rows + [Row("step", name, shape, {"time": Stat("s", time_s)}, PARTS[name]) for name, time_s in parts.items()]


def others():
    ratio = Stat("x", [1.4, 1.5, 1.6], "higher")
    return [Row("ceilings", "read-only sum", {}, {"rate": Stat("bytes/s", BYTES_PER_S, "higher")}),
            Row("traffic", "rms_norm", {"n_tokens": 8}, {"moved / cost": Stat("x", 1.05)}, (),
                Goal("moved / cost", at_most=1.1)),
            Row("resources", "rms_norm", {"arch": "sm_90a"}, {"registers": Stat("1", 40)}),
            Row("engine", "decode", {"case": "decode=1@64"}, {"tpot": Stat("s", [1e-3, 2e-3], "lower")}),
            Row("serve", "serve", {"rate": "inf"}, {"goodput": Stat("requests/s", 3.25, "higher")}),
            Row("load", "weights", {"cache": "warm"}, {"time": Stat("s", 9.125, "lower")}),
            Row("against", "linear", {"peer": "torch"}, {"ratio": ratio, "error": Stat("x", 0.001)}, (),
                Goal("ratio", at_least=2.0)),
            Row("tests", "pytest", {}, {"passed": Stat("1", 812)}),
            Row("floors", "decode", {"case": "decode=1@64"}, {"time": Stat("s", 4.7e-4)})]


def document(rows=None, **changes):
    report = Report("bench.py all", {"lane": "cuda"})
    for row in [*kernels(), *step(), *others()] if rows is None else rows:
        report.add(row)
    report.facts["ceilings"] = {"bytes_per_s": BYTES_PER_S, "flops_per_s": FLOPS_PER_S, "source": "measured"}
    return {**json.loads(json.dumps(report.as_dict())), **changes}


def parsed(text):
    """The page as a tree. It is XML too, so a tag that is not closed or text that is not escaped raises."""
    return ElementTree.fromstring(text.removeprefix("<!doctype html>"))


def words(element):
    return " ".join("".join(element.itertext()).split())


def section(text, name):
    return parsed(text).find(f".//section[@id='{name}']")


def cells(table):
    """[[text of each cell]] of a table's body."""
    return [[words(cell) for cell in line] for line in table.iter("tr")][1:]


class Tags(HTMLParser):
    """Which tags are open; raises where one is closed that is not the last."""

    def __init__(self):
        super().__init__()
        self.open, self.ids = [], []

    def handle_starttag(self, tag, attributes):
        self.ids += [value for key, value in attributes if key == "id"]
        self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID or "svg" in self.open, f"<{tag}/> is not closed in HTML"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


# --- the page is whole

@pytest.mark.parametrize("rows", [None, [], *[[row] for row in others()], kernels(), kernels()[-2:], step(),
                                  step()[:2], step()[-1:]])
def test_page_is_well_formed_with_any_sections(rows):
    text = html(document(rows))
    tags = Tags()
    tags.feed(text)
    tags.close()
    assert not tags.open and len(tags.ids) == len(set(tags.ids))
    found = [one.get("id") for one in parsed(text).iter("section")]
    expected = {row.section for row in ([*kernels(), *step(), *others()] if rows is None else rows)}
    assert set(found) == expected
    links = [link.get("href") for link in parsed(text).iter("a")]
    assert links == [f"#{name}" for name in found]


def test_page_needs_nothing_from_elsewhere():
    text = html(document())
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)|\ssrc=|<link|<img|<iframe", text)


def test_every_section_has_a_place():
    assert set(ORDER) == set(TITLES) == set(SECTIONS) and len(ORDER) == len(SECTIONS)


def test_what_the_document_says_is_escaped():
    stats = {NASTY: Stat("s", 1.0), "time": Stat("s", 1.0), "bytes": Stat("bytes", 8), "flops": Stat("flop", 8),
             "floor": Stat("s", 0.2)}
    nasty = document([Row("kernels", NASTY, {NASTY: NASTY}, stats, [NASTY], Goal(NASTY, at_most=0.5)),
                      Row("step", NASTY, {"case": NASTY, "order": 0}, stats),
                      Row("step", "floor", {"case": NASTY}, stats, [NASTY])],
                     command=NASTY, metadata={NASTY: NASTY}, settings={NASTY: NASTY}, incomplete=NASTY,
                     skipped=[{"what": NASTY, "why": NASTY}], commit=NASTY)
    nasty["machine"]["gpu"] = {"name": NASTY}
    text = html(nasty)
    text.encode()                                               # no lone surrogates
    tree = parsed(text)
    assert len(list(tree.iter("script"))) == 1 and "alert" not in tree.find(".//script").text
    assert words(tree).count("<script>alert('1')</script> & \"quoted\"") >= 14


def test_a_document_that_is_none_is_refused():
    with pytest.raises(BenchError, match="schema"):
        html({"schema": 99})


def test_a_run_that_ended_early_says_so():
    assert "Incomplete run" not in html(document())
    loud = parsed(html(document(incomplete="KeyboardInterrupt"))).find(".//p[@class='loud']")
    assert words(loud).startswith("Incomplete run: KeyboardInterrupt.")
    assert "Nothing was measured" in html(document([]))
    assert "flashinfer: not installed" in html(document(skipped=[{"what": "flashinfer", "why": "not installed"}]))


# --- its numbers

def test_every_kernel_has_its_numbers():
    table = section(html(document()), "kernels").find(".//table")
    shown = sorted(cells(table), key=lambda line: int(line[0]))
    assert len(shown) == len(kernels())
    percents = [row.stats["percent_of_roof"].median for row in kernels() if row.stats]
    assert [line[3].split()[0] for line in shown[:-1]] == [figure(value, "%", ("%", 1.0)) for value in sorted(percents)]
    _, header, lines = section_table(kernels())
    for title in ("time us", "bytes MB", "flops MFLOP"):
        column, known = [words(one) for one in table.iter("th")].index(title), header.index(title)
        assert sorted(line[column].split()[0] for line in shown if line[column]) == sorted(
            line[known] for line in lines if line[known])
    spread = header.index("time us") + 1
    assert header[spread] == "p10..p90"
    assert all(line[spread] in words(table) for line in lines)
    assert words(table).count("MISS") == sum(row.is_met is False for row in kernels())


@pytest.mark.parametrize("row", others(), ids=lambda row: row.section)
def test_tables_say_what_text_tables_say(row):
    _, _, [line] = section_table([row])
    [shown] = cells(section(html(document([row])), row.section).find(".//table"))
    expected = " ".join(line).split()
    if row.goal:
        expected.remove(row.goal.stat.split()[0])               # the head says it
        expected = [word for word in expected if word not in row.goal.stat.split()]
    assert sorted(" ".join(shown).split()) == sorted(expected)


def test_percent_bars_are_as_long_as_their_numbers():
    rows = [row for row in kernels() if row.stats]
    table = section(html(document(rows)), "kernels").find(".//table")
    bars = [(float(cell.find("span").text), cell) for cell in table.iter("td") if cell.get("class") == "bar"]
    assert len(bars) == len(rows)
    most = max(100.0, *(row.stats["percent_of_roof"].median for row in rows))
    for value, cell in bars:
        width = float(cell.find(".//rect").get("width").rstrip("%"))
        assert width == pytest.approx(100 * value / most, abs=0.4)      # the number has three digits
    goals = [mark for _, cell in bars for mark in cell.iter("line") if mark.get("class") == "goal"]
    assert len(goals) == sum(row.goal is not None for row in rows)
    assert {float(mark.get("x1").rstrip("%")) for mark in goals} == {80.0 * 100 / most}


@pytest.mark.parametrize(("value", "begin", "size"), [(1.0, 50, 0), (4.0, 50, 50), (0.25, 0, 50), (2.0, 50, 25),
                                                      (0.5, 25, 25), (9.0, 50, 50), (0.0, 0, 50)])
def test_ratio_bars_begin_at_one(value, begin, size):
    rect = ElementTree.fromstring(charts.ratio_bar(value, 4.0)).find("rect")
    assert (float(rect.get("x").rstrip("%")), float(rect.get("width").rstrip("%"))) == (begin, size)


@pytest.mark.parametrize(("ratios", "sizes"), [([2.0, 8.0, 0.5], [50 / 3, 50, 50 / 3]), ([1.1, 1.0], [6.88, 0]),
                                               ([100.0, 10.0], [50, 50])])
def test_ratio_bars_of_a_table_share_a_scale_of_2_to_10_each_way(ratios, sizes):
    rows = [Row("against", "linear", {"peer": str(i)}, {"ratio": Stat("x", value, "higher")})
            for i, value in enumerate(ratios)]
    rects = section(html(document(rows)), "against").iter("rect")
    assert [float(rect.get("width").rstrip("%")) for rect in rects] == pytest.approx(sizes, abs=0.01)


def test_a_ratio_with_no_better_side_and_no_goal_has_no_bar():
    def n_bars(stat, goal=None):
        row = Row("traffic", "linear", {}, {"ratio": stat}, (), goal)
        return len(list(section(html(document([row])), "traffic").iter("rect")))
    assert n_bars(Stat("x", 1.2)) == 0
    assert n_bars(Stat("x", 1.2, "lower")) == n_bars(Stat("x", 1.2), Goal("ratio", at_most=2)) == 1


def test_a_peer_that_is_ahead_is_red_and_so_is_a_goal_missed():
    def style(ratio, goal=None):
        row = Row("against", "linear", {}, {"ratio": Stat("x", ratio, "higher")}, (), goal)
        return section(html(document([row])), "against").find(".//rect").get("class")
    assert [style(1.2), style(0.8), style(1.2, Goal("ratio", 1.5)), style(1.6, Goal("ratio", 1.5))] == [
        "good", "bad", "bad", "good"]


def test_rows_with_other_figures_have_their_own_table():
    rows = [Row("engine", "step", {}, {"wall": Stat("s", 1), "gpu": Stat("s", 1), "memory": Stat("bytes", 1)}),
            Row("engine", "decode", {}, {"tpot": Stat("s", 1), "itl p50": Stat("s", 1), "memory": Stat("bytes", 1)}),
            Row("engine", "step", {}, {"wall": Stat("s", 2), "gpu": Stat("s", 1)})]
    tables = list(section(html(document(rows)), "engine").iter("table"))
    assert [[line[0] for line in cells(table)] for table in tables] == [["step", "step"], ["decode"]]


# --- charts

@pytest.mark.parametrize("style", ["if-wide", "if-narrow"])
def test_roofline_has_a_numbered_point_for_each_kernel_with_flops(style):
    shown = section(html(document()), "kernels")
    plot = shown.find(f".//div[@class='{style}']/svg")
    points = {int(point.get("data-n")): point for point in plot.iter("g")}
    assert len(points) == sum("flops" in row.stats and row.stats["flops"].median > 0 for row in kernels())
    listed = {int(item.get("data-n")): words(item) for item in shown.find(".//ol")}
    lines = {int(line[0]): line for line in cells(shown.find(".//table"))}
    assert sorted(listed) == sorted(lines) == list(range(1, len(kernels()) + 1))
    for number, point in points.items():
        title, name = point.find("title").text, lines[number][1]
        assert title.startswith(f"{number}. {name}") and listed[number].startswith(f"{number}{name}")
        assert f"percent_of_roof {lines[number][3].split()[0]} %" in title
        assert "not drawn" not in listed[number]
    assert all("not drawn" in listed[number] for number in set(listed) - set(points))


def test_roofline_puts_points_under_the_roof_where_the_axes_say():
    points = [charts.Point(1, "matrix", 2.0, 8e12, ""), charts.Point(2, "matrix", 200.0, 800e12, ""),
              charts.Point(3, "norm", 2.0, 0.8e12, "")]
    plot = ElementTree.fromstring(charts.roofline(points, BYTES_PER_S, FLOPS_PER_S, 760, 520))
    roof = [tuple(map(float, corner.split(","))) for corner in plot.find("polyline").get("points").split()]
    places = [(float(c.get("cx")), float(c.get("cy"))) for c in plot.iter("circle")]
    assert places[1] == roof[1]                                 # at the ridge
    (x0, y0), (x1, y1) = roof[:2]
    assert places[0][1] == pytest.approx(y0 + (y1 - y0) * (places[0][0] - x0) / (x1 - x0), abs=0.3)     # on the slope
    ticks = {t.text: float(t.get("y")) for t in plot.iter("text") if t.get("text-anchor") == "end"}
    assert places[2][1] - places[0][1] == pytest.approx(ticks["1"] - ticks["10"], abs=0.3)              # a decade below


@pytest.mark.parametrize("size", [(760, 520), (360, 380)])
@pytest.mark.parametrize("ridge", [0.02, 200.0])
def test_what_the_roof_is_fits_the_plot(size, ridge):
    points = [charts.Point(1, "matrix", 1e4, 1e9, "")]
    plot = ElementTree.fromstring(charts.roofline(points, 1e9, ridge * 1e9, *size))
    frame = next(rect for rect in plot.iter("rect") if rect.get("class") == "frame")
    labels = [text for text in plot.iter("text") if text.get("class") == "note"]
    assert len(labels) == 2
    for text in labels:
        assert text.get("text-anchor") == "end"
        assert float(text.get("x")) - charts.CHAR * len(text.text) >= float(frame.get("x")) - 0.1


@pytest.mark.parametrize("size", [(760, 520), (360, 380)])
def test_no_number_of_the_plot_lies_on_another(size):
    """By the widths that charts.py counts on; a browser's are less."""
    points = [charts.Point(i, "matrix", 1.0 + i / 1000, 3e12, "") for i in range(1, 31)]
    plot = charts._Axes(*size, [0.1, 200], [1e11, 1e15])
    spots = [(plot.x(point.intensity), plot.y(point.flops_per_s)) for point in points]
    labels = charts._placed(points, spots, [], plot)
    assert all(labels)
    assert not any(charts._overlap(a.box, b.box) for a, b in combinations(labels, 2))
    assert all(plot.holds(label.box) for label in labels)


@pytest.mark.parametrize("ceilings", [None, {}, {"bytes_per_s": 1e12}])
def test_without_ceilings_there_is_no_plot_but_the_table(ceilings):
    shown = section(html(document(kernels(), facts={"ceilings": ceilings})), "kernels")
    assert shown.find(".//ol") is None and len(cells(shown.find(".//table"))) == len(kernels())


def test_step_bar_holds_all_of_the_time_in_order():
    shown = section(html(document()), "step")
    bar = next(svg for svg in shown.iter("svg") if svg.get("class") == "strip")
    segments = [rect for rect in bar.iter("rect") if rect.get("class").startswith("segment")]
    assert [rect.get("class").split()[1:] for rect in segments] == [
        ["matrix", "floor"], ["matrix", "rest"], ["sample", "floor"], ["sample", "rest"], ["attention", "floor"],
        ["attention", "rest"], ["beside", "gap"], ["beside", "host"]]
    widths = [float(rect.get("width").rstrip("%")) for rect in segments]
    total = 3e-4 + 2e-5 + 1e-4 + 7e-5                           # the host's part is negative here: no bar
    expected = [2e-4, 1e-4, 2e-5, 0, 2e-5, 8e-5, 7e-5, 0]       # sample is above its roof: it lost nothing
    assert widths == pytest.approx([100 * seconds / total for seconds in expected], abs=0.01)
    begins = [float(rect.get("x").rstrip("%")) for rect in segments]
    assert begins == pytest.approx([sum(widths[:i]) for i in range(len(widths))], abs=0.01)


def test_step_says_the_largest_losses_and_where_the_time_goes():
    losses, goes = map(cells, section(html(document()), "step").iter("table"))
    assert [line[1] for line in losses] == ["linear qkv", "attention decode local", "gaps between kernels"]
    assert [float(line[3]) for line in losses] == [100, 80, 70]         # us
    assert [float(line[4]) for line in losses] == [300, 100, 70]
    assert [line[6] for line in losses] == ["66.7", "20.0", ""]
    assert [line[0].split()[0] for line in goes] == ["floor", "extra", "below", "gaps", "host", "sum"]
    assert [float(line[1]) for line in goes] == [150, 20, 250, 70, -10, 480]
    assert all(note in line[0] for note, line in zip(PARTS.values(), goes, strict=False))


def test_only_the_ten_largest_losses_are_listed_and_numbered():
    shape = {"case": "decode=1@64"}
    rows = [Row("step", f"linear {i}", {**shape, "order": i}, {"time": Stat("s", i + 2.0), "floor": Stat("s", 1.0)})
            for i in range(14)]
    shown = section(html(document(rows)), "step")
    [losses] = map(cells, shown.iter("table"))
    assert [line[1] for line in losses] == [f"linear {i}" for i in range(13, 3, -1)]
    numbers = [text.text for text in shown.find(".//svg").iter("text") if text.get("class", "").startswith("rest")]
    assert set(numbers) <= {str(i) for i in range(1, 11)} and numbers[-1] == "1"


def test_steps_without_times_are_a_table():
    rows = [Row("step", "linear", {"case": "decode=1@64", "order": 0}, {"bytes": Stat("bytes", 4096)})]
    shown = section(html(document(rows)), "step")
    assert shown.find(".//svg") is None and cells(shown.find(".//table")) == [["linear", "4.10"]]


@pytest.mark.parametrize("total", [1e-6, 3.3e-4, 1e-3, 0.9999, 1.0, 5.0, 7.3e3])
def test_a_bar_has_a_few_round_ticks_within_it(total):
    bar = ElementTree.fromstring(charts.strip([charts.Segment(total, "matrix", "floor", "")], total))
    ticks = [float(line.get("x1").rstrip("%")) for line in bar.iter("line")]
    assert 3 <= len(ticks) <= 6 and ticks[0] == 0 and max(ticks) <= 100.001
    assert all(len(text.text) <= 6 for text in bar.iter("text"))


def test_the_page_leaves_the_document_alone():
    before = document()
    after = copy.deepcopy(before)
    page.html(after)
    assert after == before


def test_every_op_has_a_colour():
    assert set(charts.FAMILIES) == set(OPS)
    style = (Path(page.__file__).parent / "page.css").read_text()
    for family in charts.FAMILY_NAMES:
        assert family in {*charts.FAMILIES.values(), "other"}
        assert f".{family} {{ --hue: var(--{family}); }}" in style and style.count(f"--{family}: #") == 2
