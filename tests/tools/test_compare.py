"""tools/measure/compare.py: what got better, what worse, what is noise, what is missing."""

import json
from pathlib import Path

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
    found = compare.comparison(document(before), document(after), **options)
    assert (found.gone, found.added, found.apart) == ([], [], {})
    return found.changes[0]


@pytest.mark.parametrize("before, after, better, ratio, verdict", [
    ([2.0], [1.0], "lower", 2, "better"), ([1.0], [2.0], "lower", 0.5, "WORSE"),
    ([1.0], [2.0], "higher", 2, "better"), ([2.0], [1.0], "higher", 0.5, "WORSE"),
    ([1.0], [2.0], "", 2, "changed"), ([2.0], [2.0], "lower", 1, "same"),
    ([1.0], [1.04], "lower", 1 / 1.04, "noise"), ([1.0], [0.96], "lower", 1 / 0.96, "noise"),
    ([1.0], [1.06], "lower", 1 / 1.06, "WORSE"), ([100.0], [105.0], "higher", 1.05, "better"),      # not under 5 %
    ([1, 2, 3], [2, 3, 4], "lower", 2 / 3, "noise"),                    # ranges overlap
    ([1.0, 1.1, 1.2], [1.4, 1.5, 1.6], "lower", 1.1 / 1.5, "WORSE"),    # they do not
    ([1, 1, 5], [4.2, 9, 9], "lower", 1 / 9, "WORSE"), ([1, 1, 5, 5], [5, 5, 9, 9], "lower", 3 / 7, "noise"),
    ([5, 5, 9, 9], [1, 1, 5, 5], "lower", 7 / 3, "noise"),              # they touch
    ([0.0], [2.0], "lower", 0, "WORSE"), ([2.0], [0.0], "lower", None, "better"), ([0.0], [0.0], "lower", 1, "same"),
    ([-1.0], [-2.0], "lower", None, "better"), ([-1.0], [2.0], "lower", None, "WORSE"),     # what is left of a time
    ([2.0], [-1.0], "lower", None, "better"),
])
def test_a_ratio_above_one_is_better_in_b(before, after, better, ratio, verdict):
    change = only_change(timed(*before, better=better), timed(*after, better=better))
    assert change.ratio == (ratio if ratio is None else pytest.approx(ratio))
    assert change.verdict == verdict


def test_the_threshold_is_of_the_median(capsys):
    assert only_change(timed(100.0), timed(109.0), threshold=10).verdict == "noise"
    assert only_change(timed(100.0), timed(111.0), threshold=10).verdict == "WORSE"
    for text in ("-1", "nan"):
        assert bench.main(["compare", "a.json", "b.json", "--threshold", text]) == 2
        assert "expected at least 0" in capsys.readouterr().err


def test_rows_are_matched_by_section_name_and_shape():
    before = document(timed(1, n=1), timed(2, n=8), timed(3, name="gone", n=1), timed(4, section="engine", n=1))
    after = document(timed(8, n=8), timed(5, name="new", n=1), timed(4, section="engine", n=1), timed(1, n=1))
    found = compare.comparison(before, after)
    assert [(c.row.section, c.row.shape["n"], c.verdict) for c in found.changes] == [
        ("kernels", 8, "WORSE"), ("engine", 1, "same"), ("kernels", 1, "same")]
    assert ([row.name for row in found.gone], [row.name for row in found.added]) == (["gone"], ["new"])
    found = compare.comparison(before, after, section="engine")
    assert (len(found.changes), found.gone, found.added) == (1, [], [])


def test_rows_that_are_alike_are_matched_in_order():
    found = compare.comparison(document(timed(1), timed(5), timed(9)), document(timed(1), timed(5)))
    assert [change.verdict for change in found.changes] == ["same", "same"]
    assert [row.stats["time"].median for row in found.gone] == [9]


def test_an_op_that_comes_before_them_hides_no_ops_of_a_step():
    def step(*names):
        return document(*(timed(len(name), name=name, section="step", n_rows=1, order=order)
                          for order, name in enumerate(names)))
    found = compare.comparison(step("add", "linear", "add"), step("embed", "add", "linear", "add"))
    assert [(change.row.name, change.row.shape["order"]) for change in found.changes] == [
        ("add", 1), ("linear", 2), ("add", 3)]
    assert not found.gone and [row.name for row in found.added] == ["embed"]


def test_stats_of_one_run_only_and_of_another_unit_are_listed():
    def rows(n, **stats):
        return [Row("kernels", "a", {"n": i}, {"time": Stat("s", 1), **stats}) for i in range(n)]
    before = document(*rows(1, old=Stat("1", 1), size=Stat("bytes", 1)))
    after = document(*rows(1, new=Stat("1", 1), size=Stat("1", 1)))
    found = compare.comparison(before, after)
    assert [change.stat for change in found.changes] == ["time"]
    assert "\nnot compared\n  kernels: a (n 0): old only in A\n  kernels: a (n 0): size bytes in A, 1 in B\n" \
           "  kernels: a (n 0): new only in B\n" in compare.text(before, after)
    assert "\n  4 rows: old only in A\n" in compare.text(document(*rows(4, old=Stat("1", 1))), document(*rows(4)))


def test_shares_of_a_whole_are_left_out():
    before, after = (document(Row("step", "a", {}, {"share": Stat("%", value), "time": Stat("s", 1)}))
                     for value in (10, 90))
    assert [change.stat for change in compare.comparison(before, after).changes] == ["time"]


@pytest.mark.parametrize("section", compare.EXACT)
def test_counts_are_exact(section):
    change = only_change(timed(100.0, section=section), timed(101.0, section=section))
    assert change.verdict == "WORSE"


def test_noise_is_counted_and_hidden_unless_all_is_asked_for(tmp_path, capsys):
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for path, values in zip(paths, ((1.0, 1.0), (1.01, 2.0)), strict=True):
        rows = [timed(value, name=name) for name, value in zip(("quiet", "slow"), values, strict=True)]
        Path(path).write_text(json.dumps(document(*rows)))
    assert bench.main(["compare", *paths]) == 0
    out = capsys.readouterr().out
    assert "quiet" not in out and "1 worse, 1 noise (hidden, --all shows them); ratio" in out
    assert bench.main(["compare", *paths, "--all"]) == 0
    out = capsys.readouterr().out
    assert "quiet  time" in out and "1 worse, 1 noise; ratio" in out


def test_text_of_two_documents():
    before = document(timed(2e-3, n=1, p="x"), timed(3, n=2, p="x"), timed(4, n=2, p="x"), timed(1, name="gone"))
    after = document(timed(1e-3, n=1, p="x"), timed(1, n=2, p="x"), timed(4, n=2, p="x"), timed(1, name="new", n=3),
                     lane="cuda", incomplete="interrupted")
    assert compare.text(before, after) == """\
A: bench.py kernels, commit abc, today
B: bench.py kernels, commit abc, today
different lanes: A ran on cpu, B on cuda
B is incomplete: interrupted

kernels: p x
name    shape  stat        A  p10..p90        B  p10..p90  ratio
linear    n 1  time  2.00 ms            1.00 ms             2.00  better
linear    n 2  time   3.00 s             1.00 s             3.00  better

only in A
  kernels: gone

only in B
  kernels: new (n 3)

2 better, 1 same; ratio: how many times better B is; noise: under 5 % or overlapping p10..p90"""
    assert "| linear | n 1 | time | 2.00 ms |  | 1.00 ms |  | 2.00 | better |" in compare.text(
        before, after, markdown=True)


def test_both_sides_of_a_change_have_one_unit():
    constant, header, (line,) = compare.change_table([only_change(timed(2.0, n=1), timed(0.5, n=1))])
    assert [line[2], line[4]] == ["2.00 s", "0.500 s"]
    assert constant == {"n": 1} and "shape" not in header


def test_a_gpu_is_the_device():
    before = document(machine={"cpu": "Abacus", "gpu": {"name": "H100"}})
    assert compare.differences(before, document()) == ["different devices: A ran on H100, B on Abacus"]
    assert compare.differences(document(), document()) == []


def test_other_ceilings_and_other_work_are_said():
    def with_ceilings(rate, load, source="given"):
        facts = {"ceilings": {"bytes_per_s": rate, "flops_per_s": 2e12, "source": source}}
        return document(facts=facts, machine={"cpu": "Abacus", "cores": 2, "load_average": load})
    quiet = with_ceilings(1e9, [0.25, 2.25])
    assert compare.differences(quiet, with_ceilings(1e9, [0.25, 0.25], "measured")) == []
    assert compare.differences(quiet, with_ceilings(2e9, [0.25, 3.5])) == [
        "different ceilings: A's are 1.00 GB/s, 2.00 TFLOP/s, B's 2.00 GB/s, 2.00 TFLOP/s; percents of a roof or floor "
        "are of them", "B ran beside other work: load average 0.25 before, 3.50 after"]
    assert compare.differences(document(), quiet) == []


@pytest.mark.parametrize("after, options, status", [
    (2.0, [], 0), (2.0, ["--fail-on-regression"], 1), (0.5, ["--fail-on-regression"], 0),
    (2.0, ["--fail-on-regression", "--section", "engine"], 2),
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


def test_a_guard_that_compares_nothing_is_an_error(tmp_path, capsys):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, name in zip(paths, ("linear", "renamed"), strict=True):
        path.write_text(json.dumps(document(timed(1.0, name=name))))
    assert bench.main(["compare", *map(str, paths)]) == 0
    assert bench.main(["compare", *map(str, paths), "--fail-on-regression"]) == 2
    assert "guards nothing" in capsys.readouterr().err
