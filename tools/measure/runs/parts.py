"""The parts of a long report: each a command of its own under a time limit, so that none can lose what others found.

All parts share one deadline. A part is shortened where less time is left than it wants, skipped where less is left than
it needs, and what it leaves over goes to those after it. None is kept for spare parts: they take what is over.
"""

import os
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path

from measure.report import BenchError, load_document, plain, rows_of
from measure.runs import watchdog
from measure.runs.suite import read_suite
from measure.tables import markdown, markdown_table

END_S = watchdog.GRACE_S + watchdog.GONE_S      # a part that must be ended may take so long beyond its limit
N_TAIL = 40                                     # lines of a failed part's log that the report keeps
CRASHES = {"PYTHONFAULTHANDLER": "1"}           # a part that crashes says where


@dataclass(frozen=True)
class Part:
    """One command of a report.

    argv     after the Python interpreter; "{out}" stands for the file it writes, a JSON document or a junit file,
             "{scratch}" for a folder, "{ceilings}" for --ceilings FILE of the first part that has them, or nothing
    short    what is added to argv where it gets less than full_s
    least_s  with less it is not begun
    most_s   with more it is not done any better
    stall_s  ended when it prints nothing for so long
    suite    it is pytest, and writes a junit file
    why_not  why it is not run at all
    spare    no other is shortened so that it has its least
    env      (name, value) of variables set for it
    """

    name: str
    argv: tuple
    least_s: float
    most_s: float
    full_s: float = 0.0
    short: tuple = ()
    stall_s: float | None = None
    suite: bool = False
    why_not: str = ""
    spare: bool = False
    env: tuple = ()


def limit_of(part, left_s, later):
    """Seconds that `part` may take of left_s, so that each of `later` that still fits can have its least; None where it
    cannot be begun. Parts come in order of weight: where there is too little for all, those before go first."""
    if left_s < part.least_s:
        return None
    kept = 0.0
    for other in later:
        if not other.spare and part.least_s + kept + other.least_s <= left_s:
            kept += other.least_s
    return min(part.most_s, left_s - kept)


@dataclass
class Runner:
    """Runs parts and puts what they measured into one Report.

    report      gets the rows, what was skipped, and facts["parts"]: each part's command, status, seconds, log's end
    folder      for files and logs of the parts
    until       time.monotonic() at which the last must have ended
    python      the command of an interpreter
    after_each  called when a part has been taken in
    """

    report: object
    folder: Path
    until: float
    python: tuple
    cwd: Path
    is_stopped: object = lambda: False
    after_each: object = lambda: None
    gpu: dict = field(default_factory=dict)         # what parts know of it that nvidia-smi does not say
    ceilings_of: str = ""                           # the part that measured them

    def run(self, parts):
        """Runs every part that there is time for; returns whether all that ran came to a good end."""
        self.report.facts["parts"], good = [], True
        for place, part in enumerate(parts):
            if part.why_not:
                self.report.skip(part.name, part.why_not)
                continue
            if self.is_stopped():
                self.report.skip(part.name, "interrupted before it")
                continue
            left = self.until - END_S - time.monotonic()
            limit = limit_of(part, left, [other for other in parts[place + 1:] if not other.why_not])
            if limit is None:
                alone = f"; --only {part.name} gives it time of its own" if part.spare else ""
                self.report.skip(part.name, f"{max(0, left):.0f} s were left, it needs {part.least_s:.0f} s{alone}")
                continue
            good &= self._run(part, limit)
            self.after_each()
        return good

    def _run(self, part, limit):
        log, is_short = self.folder / f"{part.name}.log", bool(part.short) and limit < part.full_s
        if is_short:
            self.report.skip(f"some of {part.name}", f"{limit:.0f} s were left, all of it takes {part.full_s:.0f} s; "
                             f"run with {shlex.join(part.short)}")
        argv = part.argv + (part.short if is_short else ())
        self.report.tell(f"{part.name}: at most {limit:.0f} s")
        outcome = watchdog.run([*self.python, *self._filled(argv, part.name)], limit, log, self.cwd, part.stall_s,
                               is_stopped=self.is_stopped, env={**os.environ, **CRASHES, **dict(part.env)})
        status, why, is_whole, gpu = outcome.status, outcome.why, True, {}
        if part.suite:
            ended = self._take_suite(part, log, outcome)
            is_whole = not ended
            if ended and status in (watchdog.OK, watchdog.FAILED):
                status, why = watchdog.FAILED, f"{why}: {ended}" if why else ended
        else:
            document = self._document(part)
            is_whole = document is not None and not document["incomplete"]
            if document is not None:
                gpu = document["machine"].get("gpu", {})
                self._take(part, document)
                why = document["incomplete"] if status == watchdog.FAILED and document["incomplete"] else why
            elif status in (watchdog.OK, watchdog.FAILED):
                status, why = watchdog.FAILED, f"{why or 'it wrote no document'}: {last_line(log)}"
        self.report.tell(f"{part.name}: {status} after {outcome.seconds:.0f} s{f' ({why})' if why else ''}")
        entry = {"name": part.name, "status": status, "why": why, "is_whole": is_whole,
                 "seconds": round(outcome.seconds, 1), "limit_s": round(limit, 1), "command": self._shown(argv)}
        entry |= {f"gpu_{when}": gpu[when] for when in ("before", "after") if gpu.get(when)}
        if status != watchdog.OK:
            entry["log"] = [line.replace(f"{self.folder}/", "") for line in watchdog.tail(log, N_TAIL)]
        self.report.facts["parts"].append(entry)
        return status == watchdog.OK

    def _file(self, name):
        return self.folder / f"{name}.out"

    def _filled(self, argv, name):
        names = {"{out}": self._file(name), "{scratch}": self.folder / "scratch"}
        for argument in argv:
            if argument == "{ceilings}":
                yield from ("--ceilings", str(self._file(self.ceilings_of))) if self.ceilings_of else ()
            else:
                yield str(names.get(argument, argument))

    def _shown(self, argv):
        """The command as a person would give it."""
        names = {"{out}": "OUT", "{scratch}": "FOLDER", "{ceilings}": "--ceilings CEILINGS" if self.ceilings_of else ""}
        words = [names.get(argument, shlex.quote(argument)) for argument in argv]
        return " ".join(["python", *filter(None, words)])

    def _take_suite(self, part, log, outcome):
        """Puts a test run's row and failures into the report; "" where it told of every test, else why not."""
        suite = read_suite(self._file(part.name), log, outcome.status in (watchdog.OK, watchdog.FAILED))
        self.report.add(suite.row(part.name, part.argv[part.argv.index("--lane") + 1], outcome.seconds))
        failures = self.report.facts.setdefault("failed_tests", [])
        failures += [{"test": test, "text": list(lines)} for test, lines in suite.failures]
        return suite.ended

    def _document(self, part):
        """What the part wrote; None for nothing that can be read."""
        if not self._file(part.name).is_file():
            return None
        try:
            return load_document(self._file(part.name))
        except BenchError as error:
            self.report.skip(part.name, str(error))
            return None

    def _take(self, part, document):
        """Puts a part's rows, facts and versions into the report."""
        for row in rows_of(document):
            self.report.add(row)
        for one in document["skipped"]:
            self.report.skip(f"{part.name}: {one['what']}", one["why"])
        self.report.versions.update(document["versions"])
        self.gpu |= {key: value for key, value in document["machine"].get("gpu", {}).items()
                     if key not in ("before", "after")}
        facts = {key: value for key, value in document["facts"].items() if key != "parts"}
        if "ceilings" in facts and self.ceilings_of:
            del facts["ceilings"]
        elif "ceilings" in facts:
            self.ceilings_of = part.name
        _join(self.report.facts, facts, part.name)


def _join(into, facts, name):
    """Adds `facts` to those there are: objects are joined, lists follow each other, and the first of others stays."""
    for key, value in facts.items():
        if key not in into:
            into[key] = value
        elif isinstance(into[key], dict) and isinstance(value, dict):
            _join(into[key], value, name)
        elif isinstance(into[key], list) and isinstance(value, list):
            into[key] = into[key] + value
        elif into[key] != value:
            into.setdefault(f"{key} of {name}", value)


def last_line(log):
    """Of a log file that says anything."""
    return next((line.strip()[:400] for line in reversed(watchdog.tail(log)) if line.strip()), "it printed nothing")


def why_incomplete(report):
    """Which parts did not come to their end, None for none. One that ended and found faults is whole."""
    ended = [f"{part['name']} {part['status']}" + (f" ({part['why']})" if part["why"] else "")
             for part in report.facts.get("parts", ()) if not part["is_whole"]]
    return "; ".join(ended) or None


def as_markdown(document):
    """The tables of a merged document, its parts before them, failed tests and logs of failed parts behind."""
    parts = plain(document["facts"].get("parts", []))
    lines = [[part["name"], part["status"], f"{part['seconds']:.0f}", f"{part['limit_s']:.0f}", f"`{part['command']}`"]
             for part in parts]
    blocks = ["### parts", markdown_table(["part", "status", "s", "limit s", "command"], lines)] if lines else []
    blocks.append(markdown(document).rstrip("\n"))
    failures = document["facts"].get("failed_tests", [])
    if failures:
        blocks.append("### failed tests")
        blocks += [_fenced(f"{one['test']}\n" + "\n".join(one["text"])) for one in failures]
    for part in parts:
        if part.get("log"):
            blocks += [f"### {part['name']}: the end of its log", _fenced("\n".join(part["log"]))]
    return "\n\n".join(blocks) + "\n"


def _fenced(text):
    return "```text\n" + text.replace("```", "'''") + "\n```"
