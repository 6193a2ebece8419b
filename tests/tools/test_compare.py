"""tools/measure/compare.py: what got better, what worse, what is noise, what is missing."""

import json

import bench
import pytest
from measure import compare
from measure.report import Report, Row, Stat


def document(*rows, lane="cpu", **changes):
    report = Report("bench.py kernels", {"lane": lane})
    for row in rows:
        report.add(row)
    return report.as_dict() | {"machine": {"cpu": "Abacus"}, "commit": "abc", "date": "today"} | changes


def timed(*samples, name="linear", unit="s", better="lower", section="kernels", **shape):
    return Row(section, name, shape, {"time": Stat(unit, samples, better)})


def only_change(before, after, **options):
    changes, gone, added = compare.changes_of(document(before), document(after), **options)
    assert (gone, added) == ([], [])
    return changes[0]


@pytest.mark.parametrize("before, after, better, ratio, verdict", [
    ([2.0], [1.0], "lower", 2, "better"), ([1.0], [2.0], "lower", 0.5, "WORSE"),
    ([1.0], [2.0], "higher", 2, "better"), ([2.0], [1.0], "higher", 0.5, "WORSE"),
    ([1.0], [2.0], "", 2, "changed"), ([2.0], [2.0], "lower", 1, "same"),
    ([1.0], [1.04], "lower", 1 / 1.04, "noise"), ([1.0], [0.96], "lower", 1 / 0.96, "noise"),
    ([1.0], [1.06], "lower", 1 / 1.06, "WORSE"),
    ([1, 2, 3], [2, 3, 4], "lower", 2 / 3, "noise"),                    # ranges overlap
    ([1.0, 1.1, 1.2], [1.4, 1.5, 1.6], "lower", 1.1 / 1.5, "WORSE"),    # they do not
    ([0.0], [2.0], "lower", 0, "WORSE"), ([2.0], [0.0], "lower", None, "better"), ([0.0], [0.0], "lower", 1, "same"),
])
def test_a_ratio_above_one_is_better_in_b(before, after, better, ratio, verdict):
    change = only_change(timed(*before, better=better), timed(*after, better=better))
    assert change.ratio == (ratio if ratio is None else pytest.approx(ratio))
    assert change.verdict == verdict


def test_the_threshold_is_of_the_median():
    assert only_change(timed(100.0), timed(109.0), threshold=10).verdict == "noise"
    assert only_change(timed(100.0), timed(111.0), threshold=10).verdict == "WORSE"


def test_rows_are_matched_by_section_name_and_shape():
    before = document(timed(1, n=1), timed(2, n=8), timed(3, name="gone", n=1), timed(4, section="engine", n=1))
    after = document(timed(8, n=8), timed(5, name="new", n=1), timed(4, section="engine", n=1), timed(1, n=1))
    changes, gone, added = compare.changes_of(before, after)
    assert [(c.row.section, c.row.shape["n"], c.verdict) for c in changes] == [
        ("kernels", 8, "WORSE"), ("engine", 1, "same"), ("kernels", 1, "same")]
    assert ([row.name for row in gone], [row.name for row in added]) == (["gone"], ["new"])
    changes, gone, added = compare.changes_of(before, after, section="engine")
    assert (len(changes), gone, added) == (1, [], [])


def test_rows_that_are_alike_are_matched_in_order():
    changes, gone, _ = compare.changes_of(document(timed(1), timed(5), timed(9)), document(timed(1), timed(5)))
    assert [change.verdict for change in changes] == ["same", "same"]
    assert [row.stats["time"].median for row in gone] == [9]


def test_stats_of_one_run_only_and_of_another_unit_are_no_change():
    before = Row("kernels", "a", {}, {"time": Stat("s", 1), "old": Stat("1", 1), "size": Stat("bytes", 1)})
    after = Row("kernels", "a", {}, {"time": Stat("s", 1), "new": Stat("1", 1), "size": Stat("1", 1)})
    changes, _, _ = compare.changes_of(document(before), document(after))
    assert [change.stat for change in changes] == ["time"]


def test_text_of_two_documents():
    before = document(timed(2e-3, n=1), timed(1, n=2), timed(1, name="gone"))
    after = document(timed(1e-3, n=1), timed(1, n=2), timed(1, name="new", n=3), lane="cuda", incomplete="interrupted")
    assert compare.text(before, after) == """\
A: bench.py kernels, commit abc, today
B: bench.py kernels, commit abc, today
different lanes: A ran on cpu, B on cuda
B is incomplete: interrupted

kernels
name    shape  stat        A  p10..p90        B  p10..p90  ratio
linear    n 1  time  2.00 ms            1.00 ms             2.00  better

only in A
  kernels: gone

only in B
  kernels: new (n 3)

1 better, 1 same; ratio: how many times better B is; noise: under 5 % or overlapping p10..p90"""
    assert "| linear | n 1 | time | 2.00 ms |  | 1.00 ms |  | 2.00 | better |" in compare.text(
        before, after, markdown=True)


def test_a_gpu_is_the_device():
    before = document(machine={"cpu": "Abacus", "gpu": {"name": "H100"}})
    assert compare.differences(before, document()) == ["different devices: A ran on H100, B on Abacus"]
    assert compare.differences(document(), document()) == []


@pytest.mark.parametrize("after, options, status", [
    (2.0, [], 0), (2.0, ["--fail-on-regression"], 1), (0.5, ["--fail-on-regression"], 0),
    (2.0, ["--fail-on-regression", "--section", "engine"], 0),
    (2.0, ["--fail-on-regression", "--threshold", "150"], 0)])
def test_a_regression_fails_where_that_is_asked_for(tmp_path, capsys, after, options, status):
    for name, value in (("a.json", 1.0), ("b.json", after)):
        (tmp_path / name).write_text(json.dumps(document(timed(value))))
    assert bench.main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), *options]) == status
    assert "ratio: how many times better B is" in capsys.readouterr().out


def test_compare_writes_markdown_and_refuses_what_is_no_document(tmp_path, capsys):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document(timed(1.0))))
    assert bench.main(["compare", str(path), str(path), "--markdown", str(tmp_path / "c.md")]) == 0
    assert "1 same" in (tmp_path / "c.md").read_text()
    path.write_text("{}")
    assert bench.main(["compare", str(path), str(path)]) == 2
    assert capsys.readouterr().err == f"bench: {path}: 'schema' is missing\n"
