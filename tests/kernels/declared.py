"""What the comment above a kernel declares, for tests that hold it to that."""

import re
from itertools import pairwise

from engine.kernels.source import ENTRY, folder


def least_bytes(file, entry, **names):
    """The value of the `traffic` line above `entry` in cuda/<file>, over the names of its dimensions."""
    for comment, kernel in pairwise((folder() / file).read_text().split('extern "C"')):
        if ENTRY.match('extern "C"' + kernel)[1] == entry:
            return eval(re.findall(r"^//   traffic  (.+)$", comment, re.MULTILINE)[-1], {}, names)
    raise AssertionError(f"{file} has no kernel {entry}")


def assert_least_traffic(traffic, least):
    """The launch touches what the comment says, moves at most a tenth more, and has no bank conflict."""
    assert traffic.distinct_bytes == least
    assert traffic.moved_bytes - traffic.small_reread_bytes <= 1.1 * least
    assert traffic.bank_conflicts == 0
