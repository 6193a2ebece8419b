"""Measurements behind tools/bench.py and tools/gpu_report.py, a module a subcommand."""
