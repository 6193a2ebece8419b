"""Measurements as data: a Stat is samples of one quantity, a Row one thing measured, a Report all rows of a run.

A report becomes a JSON document, and a document gives its rows back; tables, page and compare read the document.
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from statistics import median

from tqdm import tqdm

from measure import machine

SCHEMA = 1
SECTIONS = ("ceilings", "kernels", "traffic", "resources", "engine", "step", "serve", "load", "against", "tests",
            "floors")
UNITS = ("s", "bytes", "bytes/s", "flop", "flop/s", "%", "tokens/s", "requests/s", "x", "1")
BETTER = ("lower", "higher", "")


class BenchError(argparse.ArgumentTypeError):
    """One clear line about what cannot run. argparse shows it as it is where an argument's type raises it."""


def show(text):
    """Prints it. A reader that has left, as `head` does, is no failure."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # Python writes what is left when it ends


def plain(value):
    """The value as JSON can say it: NumPy's numbers and arrays as Python's, what JSON has not as text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, (str, int, type(None))) else str(value)


def percentile(samples, percent):
    """Between the two nearest samples, as NumPy's default does."""
    ordered = sorted(samples)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True)
class Stat:
    """One quantity: a sample a repeat, a count has one. `samples` may be given as any iterable or as one number."""

    unit: str
    samples: tuple
    better: str = ""                                    # "lower", "higher", or "" for what is neither

    def __post_init__(self):
        values = self.samples if hasattr(self.samples, "__iter__") else [self.samples]
        values = tuple(float(value) for value in values)
        if self.unit not in UNITS:
            raise ValueError(f"Stat: unit is {self.unit!r}, expected one of {', '.join(UNITS)}")
        if self.better not in BETTER:
            raise ValueError(f"Stat: better is {self.better!r}, expected 'lower', 'higher' or ''")
        if not values or not all(map(math.isfinite, values)):
            raise ValueError(f"Stat: samples are {values}, expected at least one, all finite")
        object.__setattr__(self, "samples", values)

    @property
    def median(self):
        return median(self.samples)

    @property
    def p10(self):
        return percentile(self.samples, 10)

    @property
    def p90(self):
        return percentile(self.samples, 90)

    @property
    def best(self):
        """What other work on the machine disturbs least; the median of what is neither better lower nor higher."""
        return {"lower": min, "higher": max, "": median}[self.better](self.samples)

    def as_dict(self):
        return {"unit": self.unit, "better": self.better, "samples": list(self.samples), "median": self.median,
                "p10": self.p10, "p90": self.p90, "best": self.best}


@dataclass(frozen=True)
class Goal:
    """A bound on the median of one stat of a row."""

    stat: str
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self):
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"Goal: at_least is {self.at_least}, at_most is {self.at_most}, expected one of them")

    def is_met(self, row):
        value = row.stats[self.stat].median
        return value >= self.at_least if self.at_least is not None else value <= self.at_most


@dataclass(frozen=True)
class Row:
    """One thing measured. `compare` finds it again by section, name and shape."""

    section: str
    name: str
    shape: dict
    stats: dict
    notes: tuple = ()
    goal: Goal | None = None

    def __post_init__(self):
        where = f"row {self.name!r}"
        if self.section not in SECTIONS:
            raise ValueError(f"{where}: section is {self.section!r}, expected one of {', '.join(SECTIONS)}")
        shape = {key: value.item() if hasattr(value, "item") else value for key, value in self.shape.items()}
        for key, value in shape.items():
            if not isinstance(value, (str, int, float, type(None))) or (isinstance(value, float)
                                                                        and not math.isfinite(value)):
                raise ValueError(f"{where}: shape has {key}={value!r}, expected text, a finite number, a bool or None")
        for key, stat in self.stats.items():
            if not isinstance(stat, Stat):
                raise ValueError(f"{where}: stat {key!r} is {type(stat).__name__}, expected Stat")
        if self.goal is not None and self.goal.stat not in self.stats:
            raise ValueError(f"{where}: its goal is on {self.goal.stat!r}, its stats are {', '.join(self.stats)}")
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "notes", (self.notes,) if isinstance(self.notes, str) else tuple(self.notes))

    @property
    def key(self):
        return self.section, self.name, tuple(sorted((key, repr(value)) for key, value in self.shape.items()))

    @property
    def is_met(self):
        """Whether its goal is; None without one."""
        return None if self.goal is None else self.goal.is_met(self)

    def as_dict(self):
        goal = self.goal and {"stat": self.goal.stat, "at_least": self.goal.at_least, "at_most": self.goal.at_most,
                              "is_met": self.is_met}
        return {"section": self.section, "name": self.name, "shape": dict(self.shape),
                "stats": {key: stat.as_dict() for key, stat in self.stats.items()},
                "notes": list(self.notes), "goal": goal}

    @classmethod
    def from_dict(cls, row):
        goal = row["goal"] and Goal(row["goal"]["stat"], row["goal"]["at_least"], row["goal"]["at_most"])
        stats = {key: Stat(stat["unit"], stat["samples"], stat["better"]) for key, stat in row["stats"].items()}
        return cls(row["section"], row["name"], row["shape"], stats, tuple(row["notes"]), goal)


class Report:
    """What one run measured, and on what. gpu is the CUDA device's number, None for none."""

    def __init__(self, command="", settings=None, metadata=None, gpu=None):
        self.command, self.settings, self.metadata = command, dict(settings or {}), dict(metadata or {})
        self.facts, self.rows, self.skipped = {}, [], []
        self.versions = {}                              # of what ran in other processes; this one's are found
        self.incomplete = None                          # why the run ended early, None while it did not
        self.gpu = gpu
        self.date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._commit = machine.commit()                 # of the code that is about to run
        self._load_before = machine.load_average()
        self._gpu_before = {} if gpu is None else machine.gpu_state(gpu)
        self._gpu_facts = None                          # asked for once: nvidia-smi may take a second

    def add(self, row):
        if not isinstance(row, Row):
            raise ValueError(f"Report.add: {type(row).__name__} came, expected Row")
        self.rows.append(row)

    def skip(self, what, why):
        self.skipped.append({"what": str(what), "why": str(why)})

    def why_skipped(self):
        """All that was skipped, in a line."""
        return "; ".join(f"{skipped['what']}: {skipped['why']}" for skipped in self.skipped)

    def bar(self, of, desc=""):
        """A progress bar over an iterable, or for a total to .update(); on stderr, off when that is no terminal."""
        options = {"desc": desc, "file": sys.stderr, "disable": None, "leave": False}
        return tqdm(total=of, **options) if isinstance(of, int) else tqdm(of, **options)

    def tell(self, text):
        tqdm.write(str(text), file=sys.stderr)

    @property
    def is_met(self):
        """Whether no goal is missed."""
        return all(row.is_met is not False for row in self.rows)

    def as_dict(self):
        facts = machine.machine() | {"load_average": [self._load_before, machine.load_average()]}
        if self.gpu is not None:
            self._gpu_facts = self._gpu_facts or machine.gpu(self.gpu)
            facts["gpu"] = self._gpu_facts | {"device": self.gpu, "before": self._gpu_before,
                                              "after": machine.gpu_state(self.gpu)}
        return {"schema": SCHEMA, "command": self.command, "commit": self._commit, "date": self.date,
                "machine": facts, "versions": machine.versions() | plain(self.versions),
                "settings": plain(self.settings), "metadata": plain(self.metadata), "facts": plain(self.facts),
                "rows": [row.as_dict() for row in self.rows], "skipped": list(self.skipped),
                "incomplete": self.incomplete}


def load_document(path):
    """The document of an earlier run, checked. Raises BenchError with what is wrong, and where."""
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise BenchError(f"{path}: no JSON: {error}") from None
    check_document(document, path)
    return document


def rows_of(document):
    """The rows of a checked document."""
    return [Row.from_dict(row) for row in document["rows"]]


def check_document(document, name="document"):
    """Raises BenchError unless this is what Report.as_dict() writes."""
    _has(document, {"schema": int}, name)
    if document["schema"] != SCHEMA:
        raise BenchError(f"{name}: schema is {document['schema']}, expected {SCHEMA}")
    _has(document, {"command": str, "commit": (str, type(None)), "date": str, "machine": dict, "versions": dict,
                    "settings": dict, "metadata": dict, "facts": dict, "rows": list, "skipped": list,
                    "incomplete": (str, type(None))}, name)
    for place, skipped in enumerate(document["skipped"]):
        _has(skipped, {"what": str, "why": str}, f"{name}: skipped[{place}]")
    for place, row in enumerate(document["rows"]):
        where = f"{name}: rows[{place}]"
        _has(row, {"section": str, "name": str, "shape": dict, "stats": dict, "notes": list,
                   "goal": (dict, type(None))}, where)
        for key, stat in row["stats"].items():
            _has(stat, {"unit": str, "better": str, "samples": list}, f"{where}: stats[{key!r}]")
        if row["goal"] is not None:
            bound = (int, float, type(None))
            _has(row["goal"], {"stat": str, "at_least": bound, "at_most": bound}, f"{where}: goal")
        try:
            Row.from_dict(row)
        except (ValueError, TypeError) as error:
            raise BenchError(f"{where}: {error}") from None


def _has(value, fields, where):
    if not isinstance(value, dict):
        raise BenchError(f"{where}: is {type(value).__name__}, expected an object")
    for key, kind in fields.items():
        if key not in value:
            raise BenchError(f"{where}: {key!r} is missing")
        if not isinstance(value[key], kind) or isinstance(value[key], bool):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            names = " or ".join("null" if one is type(None) else one.__name__ for one in kinds)
            raise BenchError(f"{where}: {key!r} is {type(value[key]).__name__}, expected {names}")
