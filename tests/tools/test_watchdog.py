"""tools/measure/runs/watchdog.py: whatever a command does, it ends, and all that it started."""

import sys
import time
from pathlib import Path

import pytest
from measure.runs import watchdog

from tests.tools.part_runs import HANG_S, HANGS, STUBBORN


def run(code, tmp_path, limit_s=HANG_S, **options):
    return watchdog.run([sys.executable, "-c", code], limit_s, tmp_path / "log", **{"grace_s": 0.5, **options})


def is_alive(pid):
    """A process that was killed may wait as a zombie for a parent that is not there."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("code, status, why", [
    ("print('hello')", watchdog.OK, ""),
    ("import sys; sys.exit(3)", watchdog.FAILED, "exit status 3"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", watchdog.FAILED, "ended by SIGSEGV"),
])
def test_how_a_command_ends_is_told(tmp_path, code, status, why):
    outcome = run(code, tmp_path)
    assert (outcome.status, outcome.why) == (status, why)


def test_a_command_that_is_not_there_fails(tmp_path):
    assert watchdog.run(["/no/such/program"], 5, tmp_path / "log").status == watchdog.FAILED


def test_a_command_past_its_limit_is_asked_to_end_and_may_write(tmp_path, hours):
    outcome = run(f"try:\n    {HANGS}\nexcept KeyboardInterrupt:\n    print('written')", tmp_path, grace_s=300)
    assert outcome.status == watchdog.TIMED_OUT and outcome.code == 0
    assert watchdog.tail(tmp_path / "log") == ["it hangs", "written"]


@pytest.mark.parametrize("seconds, status", [(HANG_S, watchdog.INTERRUPTED), (0, watchdog.OK)])
def test_what_a_command_started_ends_with_it(tmp_path, seconds, status):
    """Also where it ignores every signal that can be ignored, and where its parent has ended by itself."""
    outcome = run(STUBBORN.format(seconds=seconds), tmp_path, grace_s=0.2,
                  is_stopped=lambda: seconds and watchdog.tail(tmp_path / "log"))
    assert outcome.status == status and outcome.seconds < HANG_S
    [child] = map(int, watchdog.tail(tmp_path / "log"))
    until = time.monotonic() + 60
    while is_alive(child) and time.monotonic() < until:
        time.sleep(0.02)
    assert not is_alive(child)


def test_a_command_that_prints_too_much_is_ended(tmp_path, monkeypatch):
    """It stops by itself at 2 MB: else a watchdog that lets it go on fills the disk."""
    monkeypatch.setattr(watchdog, "MOST_BYTES", 1 << 20)
    outcome = run(f"print('x' * 2_000_000, flush=True); {HANGS}", tmp_path)
    assert (outcome.status, outcome.why) == (watchdog.FAILED, "printed more than 1 MiB")


def test_a_command_ends_when_the_report_is_stopped(tmp_path):
    assert run(HANGS, tmp_path, is_stopped=lambda: True).status == watchdog.INTERRUPTED
