"""Fixtures of the tests of a long report's parts."""

import pytest
from measure.runs import parts, watchdog

from tests.tools.part_runs import Hours


@pytest.fixture
def hours(monkeypatch):
    """Every command of the watchdog has Hours."""
    def run(command, limit_s, log, *args, run=watchdog.run, **options):
        monkeypatch.setattr(watchdog, "time", Hours(log))
        return run(command, limit_s, log, *args, **options)
    monkeypatch.setattr(watchdog, "run", run)


@pytest.fixture
def quick_end(monkeypatch):
    """Parts that do not end are killed soon, and pytest starts without plugins."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(parts, "END_S", 1.0)
    run = watchdog.run
    monkeypatch.setattr(watchdog, "run", lambda *args, **options: run(*args, **{"grace_s": 0.5, **options}))
