"""What the comment above a kernel declares, for tests that hold it to that."""

import re
from itertools import pairwise

from engine.kernels.source import COMMENT, ENTRY, folder


def traffic_line(file, entry):
    """The expression of the `traffic` line above `entry` in cuda/<file>."""
    for comment, kernel in pairwise((folder() / file).read_text().split('extern "C"')):
        if ENTRY.match('extern "C"' + COMMENT.sub(" ", kernel))[1] == entry:
            return re.findall(r"^//   traffic  (.+)$", comment, re.MULTILINE)[-1]
    raise AssertionError(f"{file} has no kernel {entry}")


def least_bytes(file, entry, **names):
    """Its value over the names of its dimensions."""
    return eval(traffic_line(file, entry), {}, names)


def assert_least_traffic(traffic, least, cost):
    """The launch touches what the comment and the cost model say, moves at most a tenth more, and has no bank
    conflict."""
    assert traffic.distinct_bytes == least == cost.traffic_bytes
    assert traffic.moved_bytes - traffic.small_reread_bytes <= 1.1 * least
    assert traffic.bank_conflicts == 0
