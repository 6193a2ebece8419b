"""What a run of the test suite came to: from pytest's junit file, or, where it was killed first, from its -v log."""

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from measure.report import Goal, Row, Stat

OUTCOMES = {"PASSED": "passed", "XPASS": "passed", "FAILED": "failed", "ERROR": "errors", "SKIPPED": "skipped",
            "XFAIL": "skipped"}
MOST_NAMED = 20             # failures with a note of their own
LAST_LINES = 12             # of a failure's text
_BEGUN = re.compile(r"^(\S+\.py::.+?)(?: (" + "|".join(OUTCOMES) + r")\b.*)?$")
_ENDED = re.compile(r"^\[gw\d+\] \[ *\d+%\] (" + "|".join(OUTCOMES) + r") (\S+\.py::.+?)\s*$")      # by pytest-xdist
_CRASH = re.compile(r"worker 'gw\d+' crashed while running ")        # all that it says of a test whose process ended
_COLLECTED = re.compile(r"^(?:collecting \.\.\. )?collected (\d+) items?(?:.* (\d+) selected)?|"
                        r"^\d+ workers? \[(\d+) items?\]", re.MULTILINE)


@dataclass(frozen=True)
class Suite:
    """counts    {"passed" | "failed" | "errors" | "skipped": n}
    failures  ((test, the last lines of what pytest says of it), ...)
    skipped   {why: how many tests}
    ended     "" where the run came to its end and told of every test, else what it was doing, or how many it lost
    """

    counts: dict
    failures: tuple
    skipped: dict = field(default_factory=dict)
    ended: str = ""

    def row(self, name, lane, seconds):
        """The Row of a run; a test that fails misses its goal."""
        stats = {key: Stat("1", count, "lower" if key in ("failed", "errors") else "")
                 for key, count in self.counts.items()}
        stats["not passed"] = Stat("1", self.counts["failed"] + self.counts["errors"] + bool(self.ended), "lower")
        stats["time"] = Stat("s", seconds, "lower")
        notes = [f"{test}: {lines[-1] if lines else 'no text'}" for test, lines in self.failures[:MOST_NAMED]]
        if len(self.failures) > MOST_NAMED:
            notes.append(f"{len(self.failures) - MOST_NAMED} more failures")
        notes += [f"{n} skipped: {why}" for why, n in list(self.skipped.items())[:MOST_NAMED]]
        if self.ended:
            notes.append(self.ended)
        return Row("tests", name, {"lane": lane}, stats, tuple(notes), Goal("not passed", at_most=0))


def read_suite(junit, log, has_ended=True):
    """The Suite of a run. has_ended: False where it had to be stopped: pytest may have written a junit file even so,
    and the test that it was in stands there among the passed."""
    try:
        suite = read_junit(junit, n_collected(log))
    except (OSError, ElementTree.ParseError):
        return read_log(log)
    return suite if has_ended else replace(read_log(log), failures=suite.failures, skipped=suite.skipped)


def n_collected(log):
    """How many tests a log of `pytest -v` says that there are to run; None where it does not say."""
    text = Path(log).read_text(errors="replace") if Path(log).is_file() else ""
    found = _COLLECTED.search(text)
    return int(found[2] or found[1] or found[3]) if found else None


def read_junit(path, n_tests=None):
    """The Suite that pytest's --junit-xml file tells, of so many tests that were collected."""
    counts, failures, skipped = dict.fromkeys(("passed", "failed", "errors", "skipped"), 0), [], Counter()
    told, faulty = set(), set()
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        kinds = {child.tag: child for child in case}
        outcome = next((name for tag, name in (("failure", "failed"), ("error", "errors"), ("skipped", "skipped"))
                        if tag in kinds), "passed")
        test = f"{case.get('classname')}::{case.get('name')}"
        if case.get("classname"):                           # else a file that could not be collected
            told.add(test)
        if outcome in ("failed", "errors"):
            child = kinds["failure" if outcome == "failed" else "error"]
            text = child.text or child.get("message") or ""
            if test in faulty and _CRASH.match(text):       # its process ended behind the failure (tests/conftest.py)
                continue
            faulty.add(test)
            failures.append((test, tuple([line for line in text.splitlines() if line.strip()][-LAST_LINES:])))
        elif outcome == "skipped":
            skipped[(kinds["skipped"].get("message") or "no reason").splitlines()[0]] += 1
        counts[outcome] += 1
    ended = "the log does not say how many tests were collected"
    if n_tests is not None:
        ended = f"{n_tests - len(told)} of {n_tests} collected tests told nothing" if len(told) < n_tests else ""
    return Suite(counts, tuple(failures), dict(skipped), ended)


def read_log(path):
    """The Suite as far as a log of `pytest -v` tells it; the tests that had begun and did not end are named."""
    counts, failures, running = dict.fromkeys(("passed", "failed", "errors", "skipped"), 0), [], []
    text = Path(path).read_text(errors="replace") if Path(path).is_file() else ""
    is_parallel = "\n[gw" in text
    for line in text.splitlines():
        if line.startswith(("====", "!!!!")) and "test session starts" not in line:
            break                                           # what follows tells of the same tests again
        begun, ended, word = _BEGUN.match(line), _ENDED.match(line), line.split(" ")[0]
        if ended:
            outcome, test = ended.groups()
        elif begun:
            test, outcome = begun[1].strip(), begun[2]
        elif running and word in OUTCOMES:                  # the outcome of a test that printed a line itself
            test, outcome = running[-1], word
        else:
            continue
        if outcome is None:
            running = [*running, test] if is_parallel else [test]
            continue
        running = [other for other in running if other != test] if is_parallel else []
        if outcome == "FAILED" and (test, ()) in failures:  # of pytest-xdist: its process ended behind the failure
            continue
        counts[OUTCOMES[outcome]] += 1
        if OUTCOMES[outcome] in ("failed", "errors"):
            failures.append((test, ()))
    where = f"; it was in {', '.join(running)}" if running else ""
    return Suite(counts, tuple(failures), ended=f"the run did not end{where}")
