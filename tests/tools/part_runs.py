"""What tests of a long report's parts share: scripts that hang, a clock for them, parts, a Runner."""

import json
import re
import sys
import time
from pathlib import Path

from measure.report import Report, Row, Stat
from measure.runs import watchdog
from measure.runs.parts import Part, Runner

ROOT = Path(__file__).resolve().parents[2]
HANG_S = 600            # a limit, and a sleep, that no test waits for: see Hours
HANGS = f"import time; print('it hangs', flush=True); time.sleep({HANG_S})"


class Hours:
    """The watchdog's clock: two hours on as soon as the log says that its command hangs, and the watchdog has seen it.
    What hangs is found out at once, and what works may take as long as a busy machine needs."""

    def __init__(self, log):
        self.log, self.n_seen = log, 0

    def monotonic(self):
        return time.monotonic() + 7200 * (self.n_seen > 1)

    def sleep(self, seconds):
        time.sleep(seconds)
        self.n_seen += any(re.search(r"it hangs|::test_hang ?$", line) for line in watchdog.tail(self.log))


STUBBORN = """
import signal, subprocess, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
time.sleep({seconds})
"""


def part(name, least_s=1.0, most_s=100.0, **fields):
    return Part(name, ("-c", ""), least_s, most_s, **fields)


def document(name, **facts):
    """The JSON of a part that measured one row."""
    report = Report(name, {"lane": "cpu"})
    report.add(Row("ceilings", name, {}, {"rate": Stat("bytes/s", 1e9, "higher")}))
    report.skip("something", "a reason")
    report.facts.update(facts)
    return json.dumps(report.as_dict())


def script(tmp_path, name, code, **facts):
    """A Part that writes its document, then runs `code`."""
    (tmp_path / f"{name}.json").write_text(document(name, **facts))
    (tmp_path / f"{name}.py").write_text(
        f"import shutil, sys, time\nshutil.copy({str(tmp_path / name)!r} + '.json', sys.argv[1])\n"
        f"print('begun', *sys.argv[2:], flush=True)\n{code}\n")
    return (str(tmp_path / f"{name}.py"), "{out}")


def runner(tmp_path, seconds=86400.0, **fields):
    folder = tmp_path / "run"
    folder.mkdir()
    return Runner(Report("gpu_report", {"lane": "cpu"}), folder, time.monotonic() + seconds, (sys.executable,), ROOT,
                  **fields)
