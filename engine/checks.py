"""What counts as a number at the door: Python's own and NumPy's, never bools."""

import numbers

LARGEST = 1e30      # of any magnitude a caller gives: float32 arithmetic on it stays finite


def is_int(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value):
    """A real number of sane size; NaN and infinity are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and bool(-LARGEST <= value <= LARGEST)
