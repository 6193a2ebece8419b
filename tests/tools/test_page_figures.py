"""Every figure of the page's tables, read back from the HTML as a person would, is the document's."""

import copy

import pytest
from measure.pages.page import html

from tests.tools.test_page import document, parsed, words

UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1, "bytes": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "MB/s": 1e6, "GB/s": 1e9,
         "flop": 1, "MFLOP": 1e6, "GFLOP": 1e9, "TFLOP": 1e12, "GFLOP/s": 1e9, "TFLOP/s": 1e12, "%": 1, "x": 1,
         "requests/s": 1, "": 1}


def says(cells, row):
    """Whether a line {title: cell} of a table is this row of the document, figure by figure."""
    cells = dict(cells)
    for name, stat in row["stats"].items():
        title = next((t for t in cells if t == name or (t.startswith(f"{name} ") and t[len(name) + 1:] in UNITS)), None)
        if title is None:
            return False
        cell = cells.pop(title)
        spread = "" if cell.find("small") is None else words(cell.find("small"))
        text, _, beside = words(cell).removesuffix(spread).strip().partition(" ")
        said = [text, *spread.split("..")] if spread else [text]
        scale = UNITS[beside or title[len(name) + 1:]]
        if not all(text and float(text) * scale == pytest.approx(stat[key], rel=0.006)      # three digits
                   for text, key in zip(said, ("median", "p10", "p90"), strict=False)):
            return False
    left = {title: words(cell) for title, cell in cells.items() if title not in ("#", "sizes")}
    verdict = "".join(left.pop(title) for title in list(left) if title.startswith("goal"))[:4]
    shape = {key: "" if value is None else str(value) for key, value in row["shape"].items()}
    return ({"pass": True, "MISS": False, "": None}[verdict] == (row["goal"] and row["goal"]["is_met"])
            and left.pop("name") == row["name"] and all(text == shape.get(key, "") for key, text in left.items()))


def unsaid(text, rows):
    """(lines of the page's tables that are no row, rows that are no line). A step's charts are not looked at."""
    lines = []
    for table in parsed(text).iterfind(".//section/div/table"):
        head = [words(cell) for cell in table.find("thead/tr")]
        lines += [dict(zip(head, line, strict=True)) for line in table.iterfind("tbody/tr")]
    rows = [row for row in rows if row["section"] != "step"]
    for line in list(lines):
        found = next((row for row in rows if says(line, row)), None)
        if found:
            lines.remove(line)
            rows.remove(found)
    return lines, rows


def test_every_figure_is_the_documents():
    one = document()
    assert unsaid(html(one), one["rows"]) == ([], [])


@pytest.mark.parametrize("figure", ["median", "p10", "p90"])
@pytest.mark.parametrize("name", ["time", "percent_of_roof"])
def test_a_figure_that_is_not_the_documents_is_found(name, figure):
    one = document()
    rows = copy.deepcopy(one["rows"])
    changed = next(row for row in rows if row["section"] == "kernels")
    changed["stats"][name][figure] *= 1.02
    lines, left = unsaid(html(one), rows)
    assert left == [changed] and len(lines) == 1
