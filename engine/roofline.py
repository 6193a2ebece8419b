"""What work costs, in bytes and operations, and how long a machine with two ceilings needs for it at least."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Ceilings:
    """What a machine reaches at best.

    bytes_per_s  to and from its memory
    flops_per_s  in matrix products, two operations a multiply-add
    source       where both come from: "measured", "given", ...
    """

    bytes_per_s: float
    flops_per_s: float
    source: str


@dataclass(frozen=True)
class Cost:
    """Work. Costs add up.

    bytes        that any implementation must move: its inputs once, its outputs once
    extra_bytes  that our kernels move besides: partial sums, bins, work lists, further passes over an input
    flops        of matrix products and attention, two a multiply-add; elementwise arithmetic is not counted, because no
                 machine is bound by it where it has to fetch the element
    """

    bytes: float = 0
    extra_bytes: float = 0
    flops: float = 0

    def __add__(self, other):
        return Cost(self.bytes + other.bytes, self.extra_bytes + other.extra_bytes, self.flops + other.flops)

    @property
    def traffic_bytes(self):
        """What our kernels move, each byte once: the `traffic` line of their headers."""
        return self.bytes + self.extra_bytes

    @property
    def intensity(self):
        """Operations for each byte that must move; infinite for work on nothing."""
        return self.flops / self.bytes if self.bytes else float("inf")

    def time_s(self, ceilings):
        """The least time: bytes and operations overlap in full."""
        return max(self.bytes / ceilings.bytes_per_s, self.flops / ceilings.flops_per_s)

    def bound(self, ceilings):
        """Which ceiling time_s() comes from, "memory" or "compute"."""
        is_memory = self.bytes / ceilings.bytes_per_s >= self.flops / ceilings.flops_per_s
        return "memory" if is_memory else "compute"
