"""tools/measure/tables.py: how figures are rounded and scaled, and the tables of a small document."""


import pytest
from measure import machine, tables
from measure.report import Goal, Report, Row, Stat


@pytest.fixture
def report(monkeypatch):
    monkeypatch.setattr(machine, "machine", lambda: {"cpu": "Abacus", "cores": 2, "memory_bytes": 24 << 30})
    monkeypatch.setattr(machine, "commit", lambda: "abc")
    monkeypatch.setattr(machine, "versions", lambda: {"python": "3.11"})
    monkeypatch.setattr(machine, "load_average", lambda: 0.25)
    report = Report("bench.py kernels", {"lane": "cpu"}, {"place": "desk"})
    report.date = "2026-01-01T00:00:00Z"
    report.facts["ceilings"] = {"bytes_per_s": 4.3e12, "flops_per_s": 790e12, "source": "given"}
    return report


def fill(report):
    for n, scale in ((1, 1e-5), (64, 1e-3)):
        report.add(Row("kernels", "linear", {"lane": "cpu", "n_tokens": n, "graphs": True if n == 1 else None},
                       {"time": Stat("s", (1 * scale, 2 * scale, 3 * scale), "lower"),
                        "bytes": Stat("bytes", 1.5e6 * n), "roof": Stat("%", (81.25,), "higher")},
                       ("cold L2",), Goal("time", at_most=5e-5)))
    report.add(Row("kernels", "a|b", {"lane": "cpu", "n_tokens": 8}, {
        "bytes": Stat("bytes", 12e6), "roof": Stat("%", 50.0), "launches": Stat("1", 1234567)}))
    report.add(Row("ceilings", "copy", {}, {"rate": Stat("bytes/s", 4.3e12, "higher")}, ("read and written",)))
    report.add(Row("ceilings", "product", {}, {"rate": Stat("flop/s", 790e12, "higher")}))
    report.skip("triton", "no MoE op yet")


TEXT = """\
ceilings
name            rate
copy       4300 GB/s
product  790 TFLOP/s
  copy: read and written

kernels: lane cpu
name    n_tokens  graphs  time ms        p10..p90  bytes MB  roof %  launches             goal
linear         1     yes   0.0200  0.0120..0.0280      1.50    81.2            time <= 50.0 us  pass
linear        64             2.00      1.20..2.80      96.0    81.2            time <= 50.0 us  MISS
a|b            8                                       12.0    50.0   1234567
  linear: cold L2

skipped
  triton: no MoE op yet

command: bench.py kernels
commit: abc, 2026-01-01T00:00:00Z
lane: cpu
machine: Abacus, 2 cores, 24 GiB, load average 0.25 before, 0.25 after
versions: python 3.11
ceilings: 4300 GB/s, 790 TFLOP/s (given)
place: desk"""

KERNELS_MARKDOWN = """\
### kernels

lane cpu

| name | n_tokens | graphs | time ms | p10..p90 | bytes MB | roof % | launches | goal |  |
|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|
| linear | 1 | yes | 0.0200 | 0.0120..0.0280 | 1.50 | 81.2 |  | time <= 50.0 us | pass |
| linear | 64 |  | 2.00 | 1.20..2.80 | 96.0 | 81.2 |  | time <= 50.0 us | MISS |
| a\\|b | 8 |  |  |  | 12.0 | 50.0 | 1234567 |  |  |

- linear: cold L2

### skipped

- triton: no MoE op yet

- command: bench.py kernels
"""


def test_text_of_a_small_document(report):
    fill(report)
    assert tables.text(report) == TEXT
    assert tables.text(report.as_dict()) == tables.text(report)


def test_markdown_of_a_small_document(report):
    fill(report)
    assert KERNELS_MARKDOWN in tables.markdown(report)


def test_an_incomplete_run_says_so_first(report):
    report.incomplete = "interrupted"
    assert tables.text(report).startswith("INCOMPLETE: interrupted\n\ncommand: ")
    assert tables.markdown(report).startswith("**Incomplete: interrupted**\n\n- command: ")


@pytest.mark.parametrize("before, after, is_said", [(0.2, 0.2, False), (2.2, 0.2, True),
                                                    (0.2, 2.4, False), (0.2, 2.6, True)])      # two cores are our own
def test_a_busy_machine_is_said(report, monkeypatch, before, after, is_said):
    report._load_before = before
    monkeypatch.setattr(machine, "load_average", lambda: after)
    assert ("other work was running" in tables.text(report)) == is_said


def test_the_gpu_and_its_clocks_are_said():
    gpu = {"name": "H200", "n_sms": 132, "memory_bytes": 139 << 30, "driver": "580.1", "power_limit_w": 700.0,
           "before": {"sm_mhz": 1980.0, "power_w": 120.5}, "after": {"sm_mhz": 1755.0}}
    assert tables.gpu_text(gpu) == ("H200, 132 SMs, 139 GiB, driver 580.1, limit 700 W, 1980 MHz 120.5 W before, "
                                    "1755 MHz after")
    assert tables.gpu_text({"before": {}, "after": {}}) == "unknown"


@pytest.mark.parametrize("value, text",
                         [(0, "0"), (0.01234, "0.0123"), (1.2345, "1.23"), (41.87, "41.9"), (1234.5, "1234"),
                          (-0.5, "-0.500")])
def test_numbers_have_three_digits_and_no_exponent(value, text):
    assert tables.number(value) == text


@pytest.mark.parametrize("value, unit, text", [
    (3.2e-6, "s", "3.20 us"), (4.5e-3, "s", "4.50 ms"), (12, "s", "12.0 s"), (3e-8, "s", "0.0300 us"),
    (512, "bytes", "512 bytes"), (2.5e9, "bytes", "2.50 GB"), (4.3e12, "bytes/s", "4300 GB/s"),
    (7.9e14, "flop/s", "790 TFLOP/s"), (1e9, "flop", "1.00 GFLOP"), (97.5, "%", "97.5 %"), (3, "1", "3"),
    (0.5, "1", "0.500"), (1234567, "1", "1234567"), (1.25, "x", "1.25 x"), (80, "tokens/s", "80.0 tokens/s"),
    (0, "s", "0 us")])
def test_figures_are_scaled_for_people(value, unit, text):
    assert tables.figure(value, unit) == text


def test_a_column_has_one_scale():
    assert tables.scale_of([2e-6, 3e-3, 4e-3], "s") == ("ms", 1e-3)
    assert tables.scale_of([2e-6, 3e-6, 4e-3], "s") == ("us", 1e-6)
    assert tables.scale_of([1e9, 2e9, 1.8e15], "flop") == ("TFLOP", 1e12)     # not 1800000 GFLOP
    assert tables.scale_of([1e-6, 2e-6, 0.5], "s") == ("us", 1e-6)             # one that is large changes nothing
    assert tables.scale_of([], "s") == ("us", 1e-6)


def test_percentiles_of_one_quantity_have_one_scale():
    row = Row("serve", "a", {}, {"ttft p50": Stat("s", 0.6), "ttft p90": Stat("s", 0.9), "ttft p99": Stat("s", 1.03),
                                 "window": Stat("s", 2.5)})
    assert tables.section_table([row])[1:] == (["name", "ttft p50 ms", "ttft p90 ms", "ttft p99 ms", "window s"],
                                               [["a", "600", "900", "1030", "2.50"]])


def test_rows_with_little_in_common_have_tables_of_their_own(report):
    def row(name, *stats, n=0):
        return Row("engine", name, {"lane": "cpu", "n": n}, {stat: Stat("1", 1) for stat in stats})
    rows = [row("step"), row("step", "wall", "gpu", "rate", n=1), row("decode", "tpot", "itl", "rate", n=2),
            row("decode", "tpot", "itl", "rate", n=3), row("part", "wall", n=4), row("half", "wall", "gpu", "x", n=5)]
    first, second = tables.alike(rows)
    assert [one.shape["n"] for one in first] == [0, 1, 4, 5] and [one.shape["n"] for one in second] == [2, 3]
    for one in rows:
        report.add(one)
    text = tables.text(report)
    assert "engine: lane cpu\nname  n  wall  gpu  rate  x\n" in text
    assert "\n\nengine, decode: lane cpu\nname    n  tpot  itl  rate\ndecode  2     1    1     1\n" in text


def test_units_that_differ_stand_beside_the_figures_each_with_its_scale():
    rows = [Row("kernels", name, {}, {"rate": stat}) for name, stat in (
        ("read", Stat("bytes/s", 5e6)), ("multiply", Stat("flop/s", 3e12)), ("again", Stat("flop/s", 5e12)))]
    assert tables.section_table(rows)[1:] == (["name", "rate"], [["read", "5.00 MB/s"], ["multiply", "3.00 TFLOP/s"],
                                                                 ["again", "5.00 TFLOP/s"]])


def test_sizes_in_words():
    assert tables.shape_words({"a": True, "b": False, "c": None, "d": 0.5, "e": 4.0, "f": 3}) == (
        "a yes, b no, d 0.5, e 4, f 3")
    rows = [Row("kernels", "a", {"n": value, "same": 1}, {}) for value in (1, True)]
    assert tables.constant_shape(rows) == {"same": 1}                               # 1 == True, and reads otherwise


def test_goals_in_words():
    row = Row("kernels", "a", {}, {"roof": Stat("%", 80.0)}, goal=Goal("roof", at_least=90))
    assert tables.goal_text(row) == ("roof >= 90.0 %", "MISS")


def test_a_note_of_every_row_is_said_once(report):
    rows = [Row("kernels", "linear", {"n": n}, {"time": Stat("s", 1)}, ("cold", *(["own"] if n > 1 else [])))
            for n in range(6)]
    assert tables.notes_of(rows) == ["cold", "4 rows: own"]
    assert tables.notes_of(rows[:4]) == ["cold", "linear (n 2); linear (n 3): own"]
    assert tables.notes_of(rows[2:5]) == ["cold", "own"] and tables.notes_of(rows[:1]) == ["linear: cold"]
    assert tables.notes_of(rows[1:5]) == ["cold", "linear (n 2); linear (n 3); linear (n 4): own"]


def test_a_note_of_all_rows_of_a_name_names_it_once():
    """The parts of a step's time have a row in each case: five notes of "4 rows" would say nothing."""
    rows = [Row("step", name, {"case": case}, {"time": Stat("s", 1)}, (*notes, *["small"] * (case == 2)))
            for case in range(5) for name, notes in (("floor", ["least"]), ("gaps", ["rest"]), ("host", ["rest"]),
                                                     ("linear", []))]
    assert tables.notes_of(rows) == ["floor: least", "gaps; host: rest", "4 rows: small"]
    assert tables.notes_of(rows[:4]) == ["floor: least", "gaps; host: rest"]


def test_columns_line_up():
    assert tables.aligned(["name", "s"], [["a", "1.25"], ["longer", ""]]) == "name       s\na       1.25\nlonger"


@pytest.mark.parametrize("name, unit, header", [
    ("ours", "s", "ours s"), ("time", "s", "time s"), ("extra_bytes", "bytes", "extra_bytes"), ("n", "1", "n")])
def test_a_unit_stands_beside_a_name_that_only_ends_like_it(name, unit, header):
    _, headers, _ = tables.section_table([Row("against", "model", {}, {name: Stat(unit, 3.0)})])
    assert headers == ["name", header]
