"""A command with a time limit: it runs in a process group of its own, and when it ends, or must, the whole group does.

Nothing here waits without a bound: not for the command, not for what it started, not for its output, which goes to a
file. A process that the kernel cannot end (a driver that hangs) is left behind and named.
"""

import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.05
MOST_BYTES = 256 << 20  # of output: the file of one that prints without end takes the room of the others'
GRACE_S = 10.0          # from being asked to end, so that what was measured is written, to being killed
ASKED_SHARE = 0.8       # of the grace: until SIGTERM follows SIGINT
GONE_S = 3.0            # for the kernel to end what was killed
OK, FAILED, TIMED_OUT, STALLED, INTERRUPTED = "ok", "failed", "timed out", "stalled", "interrupted"


@dataclass(frozen=True)
class Outcome:
    """How a command ended. code is its exit status, negative for a signal, None where it could not be ended."""

    status: str
    code: int | None
    seconds: float
    why: str = ""


def run(command, limit_s, log, cwd=None, stall_s=None, grace_s=GRACE_S, is_stopped=lambda: False, env=None):
    """Runs `command` with its output in the file `log`; returns an Outcome within limit_s + grace_s + GONE_S.

    stall_s     ends it also when the log has not grown for so long; it ends in any case when the log is too large
    is_stopped  asked again and again; when true the command is ended
    A command that must end gets SIGINT, late in the grace SIGTERM, then SIGKILL, with all it started.
    """
    began = time.monotonic()
    with open(log, "ab") as out:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                                       cwd=cwd, env=env, start_new_session=True, preexec_fn=_heed_sigint)
        except OSError as error:
            return Outcome(FAILED, None, time.monotonic() - began, f"{command[0]}: {error.strerror}")
    status, why = _watch(process, began, limit_s, Path(log), stall_s, is_stopped)
    if status != OK:
        for number, seconds in ((signal.SIGINT, ASKED_SHARE * grace_s),
                                (signal.SIGTERM, (1 - ASKED_SHARE) * grace_s)):
            _signal(process.pid, number)
            if _ended(process.pid, seconds):
                break
    _signal(process.pid, signal.SIGKILL)        # the group outlives its leader: what it started and left running
    if not _ended(process.pid, GONE_S):
        return Outcome(status, None, time.monotonic() - began, f"{why}; process {process.pid} does not end even so")
    code = process.wait()                       # has ended: returns at once
    if status == OK and code:
        status, why = FAILED, f"exit status {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"
    return Outcome(status, code, time.monotonic() - began, why)


def _heed_sigint():
    """In the child: a shell's background job, which this process may be, ignores SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _watch(process, began, limit_s, log, stall_s, is_stopped):
    """(status, why) when the command has ended (OK, whatever its exit status) or must end."""
    size, grew = 0, began
    while not _ended(process.pid, 0):
        now = time.monotonic()
        if is_stopped():
            return INTERRUPTED, "interrupted"
        if now - began >= limit_s:
            return TIMED_OUT, f"not done after {round(limit_s, 1):g} s"
        if log.stat().st_size != size:
            size, grew = log.stat().st_size, now
        elif stall_s is not None and now - grew >= stall_s:
            return STALLED, f"printed nothing for {stall_s:g} s"
        if size > MOST_BYTES:
            return FAILED, f"printed more than {MOST_BYTES >> 20} MiB"
        time.sleep(POLL_S)
    return OK, ""


def _ended(pid, seconds):
    """Whether the child ends within `seconds`. It is not reaped: until then no other process can get its number."""
    until = time.monotonic() + seconds
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() >= until:
            return False
        time.sleep(min(POLL_S, max(0.0, until - time.monotonic())))
    return True


def _signal(group, number):
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def tail(log, n_lines=40, n_bytes=16_000):
    """The last lines of a log file, [] where there is none."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.path.getsize(log) - n_bytes))
            return file.read().decode(errors="replace").splitlines()[-n_lines:]
    except OSError:
        return []
