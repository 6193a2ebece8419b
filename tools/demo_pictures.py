"""The demo's pictures: coloured shapes on a light ground, and questions about them, from a seeded grammar.

A picture is cut into three by three places, and a place is empty or holds one shape. An item's colour, shape and place
together decide the split: one such combination in ten is held out, no training picture holds one, and every held-out
picture does (its questions are about that item). Sizes, aspect ratios, tints, and where in its place a shape lies, vary
from picture to picture.

    python -m tools.demo_pictures pictures/        # draws what demo/pictures holds: of held-out combinations

Needs Python and pillow only: the tests make the training pictures again to show that nothing held out is in them.
"""

import argparse
import math
import zlib
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from tools.demo_corpus import Grammar, capital, chat_document, turns, with_article

SEED = 60
N_TRAINING = 6_000
N_PRACTICE = 7_000
SHOWN = {"colour": "What colour is", "shape": "Which shape is", "place": "Where is", "all": "What do you see"}
HELD_OUT_ONE_IN = 10

COLOURS = {"red": (214, 38, 38), "orange": (247, 142, 24), "yellow": (243, 216, 40), "green": (44, 150, 62),
           "blue": (38, 82, 204), "purple": (122, 50, 160), "pink": (244, 142, 190), "black": (26, 26, 28)}
GROUNDS = [(252, 252, 250), (244, 238, 222), (222, 234, 244), (226, 240, 222), (232, 228, 236), (214, 214, 214)]
PLACES = {"at the top left": (0, 0), "at the top": (1, 0), "at the top right": (2, 0),
          "on the left": (0, 1), "in the middle": (1, 1), "on the right": (2, 1),
          "at the bottom left": (0, 2), "at the bottom": (1, 2), "at the bottom right": (2, 2)}     # (column, row)
SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars", "cross": "crosses"}
NUMBERS = ("no", "one", "two", "three", "four", "five")
SIDES = (96, 320)           # pixels, shortest and longest
LONGEST_TO_SHORTEST = 2


class Item(NamedTuple):
    colour: str
    shape: str
    place: str


class Scene(NamedTuple):
    """items of a picture, and exchanges: [(question, answer), ...] about it."""

    items: tuple
    exchanges: list

    def document(self):
        """What tools/train_demo.py trains on; the picture stands before the first question."""
        (question, answer), *more = self.exchanges
        return chat_document(turns([(f"<|image|>{question}", answer), *more]))


class Drawing(NamedTuple):
    """boxes: of each item (left, top, right, bottom), as parts of the picture's width and height."""

    picture: Image.Image
    boxes: list


def is_held_out(item):
    """Whether this combination of colour, shape and place is kept from training: a fixed tenth of all."""
    return zlib.crc32(" ".join(item).encode()) % HELD_OUT_ONE_IN == 0


def training_scenes(n=N_TRAINING):
    grammar = PictureGrammar(SEED, held_out=False)
    return [grammar.scene() for _ in range(n)]


def practice_scenes(n=N_PRACTICE):
    """More of the training split, half of them to be counted."""
    grammar = PictureGrammar(SEED + 3, held_out=False)
    return [grammar.alike() if number % 2 else grammar.different() for number in range(n)]


def held_out_scenes(n, seed=SEED + 1):
    """Each turns on an item that no training picture holds."""
    grammar = PictureGrammar(seed, held_out=True)
    return [grammar.scene() for _ in range(n)]


def shown():
    """{file name: (scene, drawing)} of demo/pictures: held out, of several shapes, each asked first as SHOWN says."""
    found = {}
    for name, question in SHOWN.items():
        grammar = PictureGrammar(f"{SEED} {name}", held_out=True)
        scene = grammar.scene()
        while len({item.shape for item in scene.items}) < 2 or not scene.exchanges[0][0].startswith(question):
            scene = grammar.scene()
        found[f"{name}.png"] = scene, grammar.draw(scene.items)
    return found


class PictureGrammar(Grammar):
    """Draws scenes of one split, and pictures of them."""

    def item(self, colours=COLOURS, shapes=SHAPES, places=PLACES, held_out=False):
        while True:
            item = Item(self.pick(colours), self.pick(shapes), self.pick(places))
            if is_held_out(item) == held_out:
                return item

    def scene(self):
        return self.pick([self.different, self.different, self.alike])()

    # ---- one to three different things ---------------------------------------------------------------------------
    def different(self):
        items = []
        for first in range(self.pick((1, 2, 2, 3))):
            colours, shapes, places = ([one for one in every if one not in [item[i] for item in items]]
                                       for i, every in enumerate((COLOURS, SHAPES, PLACES)))
            items.append(self.item(colours, shapes, places, self.held_out and not first))
        asked = [self.colour_of, self.shape_of, self.place_of, self.what_is_at]
        exchanges = [self.fills(ask(item)) for item in (items[:1] if self.held_out else items) for ask in asked]
        if len(items) < 3:
            read = sorted(items, key=lambda item: PLACES[item.place][::-1])     # as one reads: row by row
            exchanges.append(self.fills(self.seen([f"{with_article(item.colour)} {item.shape} {item.place}"
                                                   for item in read])))
        return Scene(tuple(items), self.some(exchanges))

    def colour_of(self, item):
        return f"What [colour is|is the colour of] the {item.shape}?", f"The {item.shape} is {item.colour}."

    def shape_of(self, item):
        return f"[What|Which] shape is {item.colour}?", f"The {item.shape} is {item.colour}."

    def place_of(self, item):
        return f"Where is the [|{item.colour} ]{item.shape}?", f"The {item.shape} is {item.place}."

    def what_is_at(self, item):
        return f"What is {item.place}?", f"{capital(with_article(item.colour))} {item.shape}."

    def seen(self, names):
        return "[What is in the picture?|What do you see?]", capital(" and ".join(names)) + "."

    # ---- one to five things alike, and some of another kind --------------------------------------------------------
    def alike(self):
        first = self.item(held_out=self.held_out)
        items = self.crowd(first, self.pick(range(1, 6)), [])
        groups = [items]
        if self.chance(0.5):
            used = [item.place for item in items]
            other = self.item([c for c in COLOURS if c != first.colour], [s for s in SHAPES if s != first.shape],
                              [p for p in PLACES if p not in used])
            groups.append(self.crowd(other, self.pick((1, 2, 3)), used))
        exchanges = [self.fills(ask(group)) for group in (groups[:1] if self.held_out else groups)
                     for ask in (self.how_many, self.how_many, self.colour_of_all)]
        if len(items) > 1:
            named = sorted(groups, key=lambda group: list(SHAPES).index(group[0].shape))
            exchanges.append(self.fills(self.seen([self.group(group) for group in named])))
        return Scene(tuple(item for group in groups for item in group), self.some(exchanges))

    def crowd(self, first, n, used):
        """n things like the first, each at another free place of the training split (fewer where there are none)."""
        crowd = [first]
        for _ in range(n - 1):
            free = [place for place in PLACES if place not in used and place not in [item.place for item in crowd]
                    and not is_held_out(first._replace(place=place))]
            if free:
                crowd.append(first._replace(place=self.pick(free)))
        return crowd

    def count(self, group):
        return f"{NUMBERS[len(group)]} {self.noun(group)}"

    def noun(self, group):
        return group[0].shape if len(group) == 1 else SHAPES[group[0].shape]

    def group(self, group):
        return f"{NUMBERS[len(group)]} {group[0].colour} {self.noun(group)}"

    def how_many(self, group):
        verb = "is" if len(group) == 1 else "are"
        return f"How many {SHAPES[group[0].shape]} are there?", f"There {verb} {self.count(group)}."

    def colour_of_all(self, group):
        verb = "is" if len(group) == 1 else "are"
        noun = self.noun(group)
        return f"What colour {verb} the {noun}?", f"The {noun} {verb} {group[0].colour}."

    # ---- helpers ---------------------------------------------------------------------------------------------------
    def fills(self, exchange):
        return tuple(self.fill(text, {}) for text in exchange)

    def some(self, exchanges, most=4):
        """Up to four exchanges in random order, no question twice."""
        exchanges, chosen = dict(exchanges), []
        while exchanges and len(chosen) < most:
            question = self.pick(exchanges)
            chosen.append((question, exchanges.pop(question)))
        return chosen

    # ---- drawing ---------------------------------------------------------------------------------------------------
    def between(self, low, high):
        return low + (high - low) * self.uniform()

    def tint(self, colour, by):
        return tuple(min(255, max(0, round(channel + self.between(-by, by)))) for channel in colour)

    def draw(self, items):
        """A Drawing of the items."""
        aspect = math.exp(self.between(-1, 1) * math.log(LONGEST_TO_SHORTEST))      # width / height
        shortest = self.between(SIDES[0], SIDES[1] / max(aspect, 1 / aspect))
        width, height = round(shortest * max(aspect, 1)), round(shortest * max(1 / aspect, 1))
        scale = 3           # drawn large and shrunk: soft edges
        picture = Image.new("RGB", (width * scale, height * scale), self.tint(self.pick(GROUNDS), 6))
        canvas = ImageDraw.Draw(picture)
        cell, boxes = (width * scale / 3, height * scale / 3), []
        for colour, shape, place in items:
            side = min(cell) * self.between(0.7, 0.95)
            centre = [(index + 0.5) * length + self.between(-0.5, 0.5) * (length - side) * 0.7
                      for index, length in zip(PLACES[place], cell, strict=True)]
            draw_shape(canvas, shape, *centre, side / 2, self.tint(COLOURS[colour], 10))
            boxes.append(tuple((middle + sign * side / 2) / (3 * length) for sign in (-1, 1)
                               for middle, length in zip(centre, cell, strict=True)))
        return Drawing(picture.reduce(scale), boxes)


def draw_shape(canvas, shape, x, y, radius, colour):
    if shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        return
    if shape == "square":
        corners = [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    elif shape == "triangle":
        corners = [(0, -1), (1, 0.85), (-1, 0.85)]
    elif shape == "star":
        corners = [(math.sin(math.pi * step / 5) * size, -math.cos(math.pi * step / 5) * size)
                   for step, size in enumerate((1.05, 0.42) * 5)]
    else:       # a cross: the corners of one quarter, and the same turned
        a, corners = 0.32, []
        for cos, sin in ((1, 0), (0, 1), (-1, 0), (0, -1)):
            corners += [(x_ * cos - y_ * sin, x_ * sin + y_ * cos) for x_, y_ in ((a, -1), (a, -a), (1, -a))]
    canvas.polygon([(x + radius * dx, y + radius * dy) for dx, dy in corners], fill=colour)


def write_shown(folder):
    for name, (scene, drawing) in shown().items():
        drawing.picture.save(folder / name, optimize=True)
        print(folder / name, *scene.exchanges[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    write_shown(args.folder)


if __name__ == "__main__":
    main()
