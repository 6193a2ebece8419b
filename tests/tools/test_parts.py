"""tools/measure/runs/parts.py: parts that fail, hang or will not end lose nothing of the others."""

from measure.runs.parts import Part, as_markdown, limit_of, why_incomplete

from tests.tools.part_runs import HANG_S, HANGS, STUBBORN, part, runner, script

# --- limits

def test_a_part_leaves_the_others_their_least():
    assert limit_of(part("a"), 50, [part("b", 10), part("c", 20)]) == 20
    assert limit_of(part("a", most_s=5), 50, [part("b", 10)]) == 5
    assert limit_of(part("a", 30), 50, [part("b", 40)]) == 50        # too little for both: the first goes first
    assert limit_of(part("a", 30), 50, [part("b", 40), part("c", 5)]) == 45
    assert limit_of(part("a", 30), 29, []) is None
    assert limit_of(part("a"), 50, [part("b", 10), part("c", 20, spare=True)]) == 40


def test_spare_parts_take_what_is_over_or_say_how_to_have_them(tmp_path, quick_end):
    runs = runner(tmp_path, 60)
    first, last, never = (Part(name, script(tmp_path, name, ""), least_s, 100, spare=name != "first")
                          for name, least_s in (("first", 1), ("last", 20), ("never", 70)))
    assert runs.run([first, last, never])
    assert [one["name"] for one in runs.report.facts["parts"]] == ["first", "last"]
    [skipped] = [one["why"] for one in runs.report.skipped if one["what"] == "never"]
    assert skipped.endswith(" s were left, it needs 70 s; --only never gives it time of its own")


# --- a whole run

def test_faulty_parts_lose_nothing_of_the_others(tmp_path, quick_end, hours):
    runs, seen = runner(tmp_path), []
    runs.after_each = lambda: seen.append(len(runs.report.rows))
    good = runs.run([
        Part("first", script(tmp_path, "first", ""), 1, 100),
        Part("failing", script(tmp_path, "failing", "sys.exit('it broke')"), 1, 100),
        Part("silent", ("-c", "raise RuntimeError('nothing measured')"), 1, 100),
        Part("sleeping", script(tmp_path, "sleeping", HANGS), 1, HANG_S),
        Part("stubborn", ("-c", f"print('it hangs', flush=True){STUBBORN.format(seconds=HANG_S)}"), 1, HANG_S),
        Part("large", ("-c", ""), 1, 100, why_not="it does not fit"),
        Part("last", script(tmp_path, "last", ""), 1, 100)])
    assert not good
    report = runs.report
    assert [row.name for row in report.rows] == ["first", "failing", "sleeping", "last"]
    assert {one["name"]: one["status"] for one in report.facts["parts"]} == {
        "first": "ok", "failing": "failed", "silent": "failed", "sleeping": "timed out", "stubborn": "timed out",
        "last": "ok"}
    by_name = {one["name"]: one for one in report.facts["parts"]}
    assert by_name["failing"]["log"][-1] == "it broke" and "log" not in by_name["last"]
    assert by_name["silent"]["why"] == "exit status 1: RuntimeError: nothing measured"
    assert {"what": "large", "why": "it does not fit"} in report.skipped
    assert {"what": "last: something", "why": "a reason"} in report.skipped
    assert seen == [1, 2, 2, 3, 3, 4]                                # after each there is a report to write
    assert why_incomplete(report) == ("silent failed (exit status 1: RuntimeError: nothing measured); "
                                      f"stubborn timed out (not done after {HANG_S} s)")


def test_a_part_that_crashes_says_where(tmp_path, quick_end):
    runs = runner(tmp_path)
    code = "def crash():\n import ctypes\n ctypes.string_at(0)\ncrash()"
    assert not runs.run([Part("crashing", ("-c", code), 1, 100)])
    [entry] = runs.report.facts["parts"]
    assert entry["why"].startswith("ended by SIGSEGV: ") and any("in crash" in line for line in entry["log"])


def test_the_markdown_of_a_faulty_run_shows_tables_and_logs(tmp_path, quick_end):
    runs = runner(tmp_path)
    runs.run([Part("good", script(tmp_path, "good", ""), 1, 100),
              Part("bad", script(tmp_path, "bad", "sys.exit('it | broke')"), 1, 100)])
    text = as_markdown(runs.report.as_dict())
    assert "| good | ok |" in text and "| bad | failed |" in text
    assert "### bad: the end of its log" in text and "it | broke" in text and "### good: the end" not in text
    assert "### ceilings" in text and str(tmp_path / "run") not in text


def test_time_that_is_short_shortens_and_skips_parts(tmp_path, quick_end):
    runs = runner(tmp_path, seconds=300)
    runs.run([Part("shortened", script(tmp_path, "shortened", ""), 1, 600, full_s=500, short=("--repeats", "1")),
              Part("whole", script(tmp_path, "whole", ""), 1, 600, full_s=2, short=("--repeats", "1")),
              Part("skipped", script(tmp_path, "skipped", ""), 400, 600)])
    logs = {name: (runs.folder / f"{name}.log").read_text().split() for name in ("shortened", "whole")}
    assert logs == {"shortened": ["begun", "--repeats", "1"], "whole": ["begun"]}
    why = {one["what"]: one["why"] for one in runs.report.skipped}
    assert "all of it takes 500 s; run with --repeats 1" in why["some of shortened"]
    assert "it needs 400 s" in why["skipped"] and "some of whole" not in why


def test_the_first_ceilings_go_to_the_parts_behind(tmp_path, quick_end):
    ceilings = {"bytes_per_s": 1e9, "flops_per_s": 2e9, "source": "measured"}
    runs = runner(tmp_path)
    show = ("-c", "import sys; print(sys.argv[1:])", "{ceilings}", "{scratch}")
    runs.run([Part("before", show, 1, 100),
              Part("ceilings", script(tmp_path, "ceilings", "", ceilings=ceilings), 1, 100),
              Part("other", script(tmp_path, "other", "", ceilings={**ceilings, "source": "again"}), 1, 100),
              Part("after", show, 1, 100)])
    assert runs.report.facts["ceilings"] == ceilings
    scratch = str(runs.folder / "scratch")
    assert (runs.folder / "before.log").read_text().strip() == str([scratch])
    assert (runs.folder / "after.log").read_text().strip() == str(["--ceilings", str(runs.folder / "ceilings.out"),
                                                                   scratch])


def test_facts_of_parts_are_joined(tmp_path, quick_end):
    runs = runner(tmp_path)
    runs.run([Part("a", script(tmp_path, "a", "", models={"x": 1}, list=[1], one=1), 1, 100),
              Part("b", script(tmp_path, "b", "", models={"y": 2}, list=[2], one=2), 1, 100)])
    facts = runs.report.facts
    assert (facts["models"], facts["list"], facts["one"], facts["one of b"]) == ({"x": 1, "y": 2}, [1, 2], 1, 2)


def test_a_broken_document_is_said(tmp_path, quick_end):
    runs = runner(tmp_path)
    assert not runs.run([Part("broken", ("-c", "import sys; open(sys.argv[1], 'w').write('{')", "{out}"), 1, 100)])
    [skipped] = runs.report.skipped
    assert skipped["what"] == "broken" and "no JSON" in skipped["why"]


def test_an_interrupted_run_keeps_what_it_has(tmp_path, quick_end):
    runs = runner(tmp_path)
    runs.is_stopped = lambda: bool(runs.report.rows)
    runs.run([Part(name, script(tmp_path, name, ""), 1, 100) for name in ("first", "second")])
    assert [row.name for row in runs.report.rows] == ["first"]
    assert {"what": "second", "why": "interrupted before it"} in runs.report.skipped
