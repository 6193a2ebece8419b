"""Inline SVG for the page: a roofline plot, a bar split into what it is made of, bars for the cells of a table.

Colours are CSS classes of page.css: one a family of ops. Bars have coordinates in percent, so they stretch while their
text does not; the plot has pixels, so it is drawn once for wide windows and once for narrow ones.
"""

import html
import re
from dataclasses import dataclass
from math import cos, log10, pi, sin

from measure.tables import figure, scale_of

# Of an op's name. A name that is not here is of "other".
FAMILIES = {"linear": "matrix", "gated_linear": "matrix", "moe_gated_linear": "expert", "moe_linear": "expert",
            "moe_route": "expert", "moe_combine": "expert", "scale_rows": "expert", "attention": "attention",
            "add_norm": "norm", "rms_norm": "norm", "add_norms": "norm", "router_norm": "norm", "mix_per_layer": "norm",
            "gate_per_layer": "norm", "layer_norm": "norm", "add_bias": "norm", "clamp": "norm", "pool_rows": "norm",
            "add_rows": "move", "place_rows": "move", "qk_norm_rope_cache": "rope", "rope_angles": "rope",
            "attention_temperature": "rope", "embed": "move", "select_rows": "move", "logit_softcap": "sample",
            "sample": "sample", "top_logprobs": "sample", "apply_edits": "sample",
            "sample_drafts": "sample", "sample_with_drafts": "sample", "relax_drafts": "sample",
            "accept_drafts": "sample", "pick_centroids": "sample", "candidate_argmax": "sample",
            "candidate_logits": "sample"}
FAMILY_NAMES = {"matrix": "matrix products", "expert": "experts", "attention": "attention", "norm": "norms and gates",
                "rope": "QK norm, RoPE, cache", "move": "gathers", "sample": "logits and sampling", "other": "other"}
MARGIN = 3                      # a plot's axes end a factor beyond its figures
CHAR, LINE = 7, 13              # px of a character and a line of a plot's text; no font is wider at 11 px
RADIUS = 4                      # px of a point
RINGS = (11, 17, 25, 35, 47, 61, 77, 95, 115)           # px from a point to its number, tried in order
ANGLES = 16
WIDE, NARROW = 1000, 330        # px a bar has at least, in a window that page.css calls wide, and in any
_BAD = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")    # XML has no such characters

# The pattern of .hatched in page.css; once a page.
HATCH = ('<svg class="defs" width="0" height="0" aria-hidden="true"><defs><pattern id="hatch" width="6" height="6" '
         'patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="2.5" height="6"/></pattern></defs>'
         '</svg>')


def escaped(text):
    """Any text as content or attribute of HTML."""
    return html.escape(_BAD.sub("\ufffd", str(text)))


def family(name):
    """The family of a row's name, which begins with its op: "linear: qkv local", "linear qkv local"."""
    return FAMILIES.get(re.match(r"\w*", name)[0], "other")


@dataclass(frozen=True)
class Point:
    """intensity in FLOP a byte; title is what hovering shows."""

    number: int
    family: str
    intensity: float
    flops_per_s: float
    title: str


@dataclass(frozen=True)
class Segment:
    """Part of a bar. kind: "floor", "rest" (the lighter part of an op), "gap" or "host"; label: "" for none."""

    size: float
    family: str
    kind: str
    title: str
    label: str = ""


def roofline(points, bytes_per_s, flops_per_s, width, height):
    """FLOP/s over FLOP a byte, both logarithmic; the roof is the lower of bytes_per_s * intensity and flops_per_s.

    points  at least one, of intensity and flops_per_s above 0
    """
    ridge = flops_per_s / bytes_per_s
    plot = _Axes(width, height, [ridge, *(point.intensity for point in points)],
                 [flops_per_s, *(point.flops_per_s for point in points)])
    unit, divisor = scale_of([flops_per_s], "flop/s")
    parts = [f'<svg class="roofline" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
             f'aria-label="roofline of {len(points)} kernels">', plot.grid(unit, divisor)]
    left = max(plot.x_range[0], plot.y_range[0] / bytes_per_s)
    corners = [(left, left * bytes_per_s), (ridge, flops_per_s), (plot.x_range[1], flops_per_s)]
    line = " ".join(f"{plot.x(x):.1f},{plot.y(y):.1f}" for x, y in corners)
    parts.append(f'<polyline class="roof" points="{line}"/>')
    middle = left ** 0.6 * ridge ** 0.4
    slope = figure(bytes_per_s, "bytes/s")
    roof_labels = [_Label(slope, max(plot.x(middle) - 6, plot.left + CHAR * len(slope)),
                          plot.y(middle * bytes_per_s) - 4, "end"),
                   _Label(figure(flops_per_s, "flop/s"), plot.right - 4, plot.y(flops_per_s) - 6, "end")]
    parts += [label.svg("note") for label in roof_labels]
    spots = [(plot.x(p.intensity), plot.y(p.flops_per_s)) for p in points]
    labels = _placed(points, spots, [label.box for label in roof_labels], plot)
    parts += [f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{label.x:.1f}" y2="{label.y - LINE / 3:.1f}"/>'
              for (x, y), label in zip(spots, labels, strict=True) if label]
    for point, (x, y), label in zip(points, spots, labels, strict=True):
        text = label.svg("number") if label else ""
        parts.append(f'<g class="point {point.family}" data-n="{point.number}"><title>{escaped(point.title)}</title>'
                     f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}"/>{text}</g>')
    return "".join([*parts, "</svg>"])


class _Axes:
    """Where a figure lies: logarithmic axes inside a frame with room for the ticks' text."""

    def __init__(self, width, height, xs, ys):
        self.left, self.right, self.top, self.bottom = 48, width - 22, 24, height - 38
        self.x_range = min(xs) / MARGIN, max(xs) * MARGIN
        self.y_range = min(ys) / MARGIN, max(ys) * MARGIN

    def x(self, value):
        return self.left + (self.right - self.left) * self._share(value, self.x_range)

    def y(self, value):
        return self.bottom - (self.bottom - self.top) * self._share(value, self.y_range)

    @staticmethod
    def _share(value, of):
        return log10(value / of[0]) / log10(of[1] / of[0])

    def holds(self, box):
        return self.left <= box[0] and box[2] <= self.right and self.top <= box[1] and box[3] <= self.bottom

    def grid(self, unit, divisor):
        """Frame, powers of ten with their text, what the axes are."""
        parts = [f'<rect class="frame" x="{self.left}" y="{self.top}" width="{self.right - self.left}" '
                 f'height="{self.bottom - self.top}"/>']
        for value in _powers(self.x_range):
            x = f"{self.x(value):.1f}"
            parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{self.top}" y2="{self.bottom}"/>'
                         f'<text x="{x}" y="{self.bottom + 15}" text-anchor="middle">{value:g}</text>')
        for value in _powers([bound / divisor for bound in self.y_range]):
            y = self.y(value * divisor)
            parts.append(f'<line class="grid" x1="{self.left}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
                         f'<text x="{self.left - 5}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        return "".join([*parts, f'<text x="{self.left}" y="14">{unit}</text><text x="{self.right}" '
                                f'y="{self.bottom + 31}" text-anchor="end">FLOP a byte</text>'])


def _powers(bounds):
    """The powers of ten within bounds, every second one or fewer where there are many."""
    low, high = (log10(bound) for bound in bounds)
    powers = [power for power in range(-30, 31) if low <= power <= high]
    return [10.0 ** power for power in powers if power % (1 + len(powers) // 9) == 0]


class _Label:
    """Text that starts, ends or is centred at x, its baseline at y."""

    def __init__(self, text, x, y, anchor="middle"):
        self.text, self.x, self.y, self.anchor = text, x, y, anchor
        size = len(text) * CHAR
        left = x - {"start": 0, "middle": size / 2, "end": size}[anchor]
        self.box = left, y - LINE + 3, left + size, y + 3

    def svg(self, style):
        return (f'<text class="{style}" x="{self.x:.1f}" y="{self.y:.1f}" text-anchor="{self.anchor}">'
                f'{escaped(self.text)}</text>')


def _placed(points, spots, taken, plot):
    """A _Label for each point's number, on no other and on no point; None where there is no room."""
    taken = taken + [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in spots]
    labels = []
    for point, (x, y) in zip(points, spots, strict=True):
        tries = (_Label(str(point.number), x + radius * cos(angle * 2 * pi / ANGLES),
                        y - radius * sin(angle * 2 * pi / ANGLES) + LINE / 3)
                 for radius in RINGS for angle in range(ANGLES))
        label = next((label for label in tries
                      if plot.holds(label.box) and not any(_overlap(label.box, box) for box in taken)), None)
        if label:
            taken.append(label.box)
        labels.append(label)
    return labels


def _overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def strip(segments, total, unit="s"):
    """One bar of `total`, its segments side by side from the left, and round figures below it."""
    parts = ['<svg class="strip" width="100%" height="50" role="img" aria-label="a bar split by op">']
    begin = 0.0
    for segment in segments:
        share = 100 * segment.size / total
        place = f'x="{begin:.3f}%" width="{share:.3f}%" y="0" height="28"'
        title = f"<title>{escaped(segment.title)}</title>"
        parts.append(f'<rect class="segment {segment.family} {segment.kind}" {place}>{title}</rect>')
        if segment.kind in ("gap", "host"):
            parts.append(f'<rect class="hatched" {place}>{title}</rect>')
        room = len(segment.label) * CHAR + 2
        style = "" if share * NARROW / 100 >= room else " wide" if share * WIDE / 100 >= room else None
        if segment.label and style is not None:
            parts.append(f'<text class="{segment.kind}{style}" x="{begin + share / 2:.3f}%" y="18" '
                         f'text-anchor="middle">{escaped(segment.label)}</text>')
        begin += share
    step = _round_step(total)
    scale = scale_of([total], unit)
    for count in range(int(total / step) + 1):
        place, is_last = 100 * count * step / total, 100 * count * step / total > 90
        anchor = "start" if not count else "end" if is_last else "middle"
        text = f"{count * step / scale[1]:g}" if count else f"0 {scale[0]}"
        parts.append(f'<line class="tick" x1="{place:.3f}%" x2="{place:.3f}%" y1="28" y2="32"/>'
                     f'<text x="{place:.3f}%" y="44" text-anchor="{anchor}">{text}</text>')
    return "".join([*parts, "</svg>"])


def _round_step(total):
    """1, 2 or 5 times a power of ten, so that there are 2 to 5 steps."""
    power = 10.0 ** int(log10(total) // 1)
    return next(power * by for by in (0.2, 0.5, 1, 2) if total / (power * by) <= 5)


def percent_bar(value, most=100.0, goal=None, style="value"):
    """A bar of value in most, both in percent; a mark at the goal, and at 100 where most is more."""
    marks = "" if most <= 100 else _mark(10000 / most, "even")
    marks += "" if goal is None else _mark(100 * goal / most, "goal")
    return _bar(0, 100 * max(0.0, min(value / most, 1)), style, marks)


def ratio_bar(value, most, goal=None, style="value"):
    """A bar from 1, at the middle, to value: logarithmic, from 1 / most to most; a mark at the goal."""
    def place(ratio):
        return 50 + 50 * max(-1.0, min(1.0, log10(ratio) / log10(most))) if ratio > 0 else 0.0
    begin, end = sorted([50, place(value)])
    return _bar(begin, end - begin, style, _mark(50, "even") + ("" if goal is None else _mark(place(goal), "goal")))


def _bar(begin, size, style, marks):
    return (f'<svg class="bar" width="96" height="12"><rect class="{style}" x="{begin:.2f}%" y="1" width="{size:.2f}%" '
            f'height="10"/>{marks}</svg>')


def _mark(place, style):
    return f'<line class="{style}" x1="{place:.2f}%" x2="{place:.2f}%" y1="0" y2="12"/>'


def family_key(families, more=""):
    """What the colours mean, of those that are used."""
    spans = "".join(f'<span class="{family}">{FAMILY_NAMES[family]}</span>' for family in dict.fromkeys(families))
    return f'<p class="key">{spans}{more}</p>'
