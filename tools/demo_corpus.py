"""The demo's English: a seeded grammar of short stories and small talk, cut into a training set and a held-out set.

A template is English with two marks: `[one|two|]` is a choice (choices nest, one may be empty) and `{slot}` is filled
from the scene. A scene is what a document is about: a hero, a thing and a place, and all that follows from them. That
triple decides the split: one triple in ten is held out, and no training document tells of it.

Documents are plain text with the special tokens spelled out, ready for the tokenizer (which adds <bos>):

    story   text<eos>
    chat    <|turn>user\\ntext<turn|>\\n<|turn>model\\ntext<turn|>

Needs nothing but Python: the tests make the training set again to show that nothing held out is in it.
"""

import random
import re
import zlib
from typing import NamedTuple

from tools import demo_stories as stories
from tools import demo_words as words

SEED = 20
N_LESSONS = 4_000       # short reading lessons, before the stories: a small model learns to look back from them
N_TRAINING = 15_000     # with the lessons
N_HELD_OUT = 160
N_PROMPTS = 4
HELD_OUT_ONE_IN = 10
CHOICE = re.compile(r"\[([^\[\]]*)\]")       # the innermost choices of a template


def is_held_out(hero, thing, place):
    """Whether documents about this triple are kept from training: a fixed tenth of all triples."""
    return zlib.crc32(f"{hero} {thing} {place}".encode()) % HELD_OUT_ONE_IN == 0


def training_documents(n=N_TRAINING):
    """The lessons, then stories and chats of all kinds."""
    grammar = Grammar(SEED, held_out=False)
    return [grammar.lesson() for _ in range(N_LESSONS)] + [grammar.document() for _ in range(n - N_LESSONS)]


def held_out_documents(n=N_HELD_OUT):
    grammar = Grammar(SEED + 1, held_out=True)
    return [grammar.document() for _ in range(n)]


def prompts(n=N_PROMPTS):
    """How n held-out stories begin, each of another plot: up to where hero, thing and place have been named."""
    grammar, found = Grammar(SEED + 2, held_out=True), {}
    while len(found) < n:
        story = grammar.story()
        end = max(re.search(rf"\b{word}\b", story.text).start() for word in story.triple)
        end = re.compile(r"[.!?]\"?(?= |$)").search(story.text, end).end()
        if end < 250:
            found.setdefault(story.plot, story.text[:end])
    return list(found.values())


def chat_document(messages):
    """The text that demo/checkpoint/chat_template.jinja renders, less <bos> and the last newline."""
    return "\n".join(f"<|turn>{role}\n{text}<turn|>" for role, text in messages)


def turns(exchanges):
    return [turn for user, model in exchanges for turn in (("user", user), ("model", model))]


def capital(text):
    return text[:1].upper() + text[1:]


def with_article(noun):
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


class Story(NamedTuple):
    """triple: (hero, thing, place); title: what it may be called; questions: [(question, answer), ...] about it."""

    plot: str
    triple: tuple
    text: str
    title: str
    questions: list


class Grammar:
    """Draws documents of one split. The same seed and split give the same documents, on every Python."""

    def __init__(self, seed, held_out):
        self.held_out = held_out
        self.uniform = random.Random(seed).random       # the one draw whose sequence Python promises to keep

    # ---- words -------------------------------------------------------------------------------------------------
    def chance(self, probability):
        return self.uniform() < probability

    def pick(self, options, but=()):
        """One of the options, not one of those in `but`."""
        options = [option for option in options if option not in but] if but else list(options)
        return options[int(self.uniform() * len(options))]

    def fill(self, template, scene):
        """The template with choices made (innermost first), slots filled and white space tidied."""
        while "[" in template or "{" in template:       # a slot may hold choices and slots of its own
            while "[" in template:
                template = CHOICE.sub(lambda match: self.pick(match[1].split("|")), template)
            template = template.format_map(scene)
        return " ".join(template.split())

    def triple(self, things, but=()):
        """A hero, a thing and a place of this split, none of them in `but`."""
        while True:
            triple = (self.pick(words.GIRLS + words.BOYS, but), self.pick(things, but), self.pick(words.PLACES, but))
            if is_held_out(*triple) == self.held_out:
                return triple

    # ---- stories -----------------------------------------------------------------------------------------------
    def scene(self, plot):
        """{slot: text} of one story: its triple, and all that follows from it or is free."""
        kind = stories.PLOTS[plot].about
        hero, thing, place = self.triple(words.ABOUT[kind])
        weather = self.pick(words.WEATHER)
        if plot == "lost" and weather == "windy" and thing not in words.LIGHT:
            weather = "rainy"                           # no wind carries off a drum
        colour = self.pick(words.COLOURS)
        colour2 = self.pick(words.COLOURS, but=[colour])
        thing2 = self.pick(words.THINGS, but=[thing])
        preposition, *spots = words.PLACES[place]
        spot = self.pick(spots)
        relative, trouble, fur = self.pick(words.RELATIVES), self.pick(words.TROUBLES), self.pick(words.PET_NAMES)
        scene = {
            **words.PRONOUNS["girl" if hero in words.GIRLS else "boy"], **words.WEATHER[weather], "weather": weather,
            "hero": hero, "friend": self.pick(words.GIRLS + words.BOYS, but=[hero]), "trait": self.pick(words.TRAITS),
            "place": place, "at_place": f"{preposition} the {place}", "to_place": f"to the {place}",
            "spot": spot, "spot2": self.pick(spots, but=[spot]),
            "relative": relative, "a_relative": with_article(relative), "rel_she": words.RELATIVES[relative],
            "colour": colour, "a_colour": with_article(colour), "colour2": colour2, "a_colour2": with_article(colour2),
            "number": self.pick(words.NUMBERS), "treat": self.pick(words.FOODS),
            "fur": fur, "pet": words.PET_NAMES[fur], "trouble": trouble, "rescue": words.TROUBLES[trouble],
            kind: thing, **words.ABOUT[kind][thing], "a_thing": with_article(f"{colour} {thing}"),
            "thing2": thing2, "used2": words.THINGS[thing2]["used"], "a_thing2": with_article(f"{colour2} {thing2}"),
            "opening": stories.OPENING,
        }
        mine, theirs = f"{colour} {thing}", f"{colour2} {thing2}"
        scene.update(self.pick([{"end": stories.SWAPPED, "now": theirs, "now2": mine},
                                {"end": stories.SWAPPED_BACK, "now": mine, "now2": theirs}]))
        return {**scene, **{capital(slot): capital(text) for slot, text in scene.items()}}

    def story(self):
        plot = self.pick(stories.PLOTS)
        about, title, text, questions = stories.PLOTS[plot]
        scene = self.scene(plot)
        return Story(plot, (scene["hero"], scene[about], scene["place"]), self.fill(text, scene),
                     self.fill("[{hero}|" + title + "|{hero} and " + title + "]", scene),
                     [(self.fill(question, scene), capital(self.fill(answer, scene)))
                      for question, answer in questions])

    # ---- chats: each returns [(user's text, model's text), ...] -------------------------------------------------
    def told_story(self):
        story = self.story()
        exchanges = [(self.fill(words.REQUEST, {"title": story.title}), story.text)]
        return [*exchanges, self.pick(story.questions)] if self.chance(0.5) else exchanges

    def read_story(self):
        story = self.story()
        question, answer = first = self.pick(story.questions)
        exchanges = [(f"{story.text}\n{question}", answer)]
        return [*exchanges, self.pick(story.questions, but=[first])] if self.chance(0.6) else exchanges

    def read_facts(self):
        """Who left what where, for two or three people, and a question about one of them."""
        facts, used = [], []
        for _ in range(self.pick((2, 3))):
            hero, thing, place = self.triple(words.THINGS, but=used)
            colour = self.pick(words.COLOURS)
            used += hero, thing, place
            facts.append({"hero": hero, "thing": thing, "at_place": f"{words.PLACES[place][0]} the {place}",
                          "colour": colour, "a_thing": with_article(f"{colour} {thing}")})
        told = " ".join(self.fill(words.FACT, fact) for fact in facts)
        first = self.pick(facts)
        asked = [(first, self.pick(words.FACT_QUESTIONS))]
        if self.chance(0.5):
            asked.append((self.pick(facts, but=[first]), self.pick(words.FACT_QUESTIONS)))
        (question, answer), *more = [(self.fill(question, fact), capital(self.fill(answer, fact)))
                                     for fact, (question, answer) in asked]
        return [(f"{told} {question}", answer), *more]

    def knowledge(self):
        return [tuple(self.fill(part, {}) for part in self.pick(words.KNOWLEDGE))]

    def small_talk(self):
        return [tuple(self.fill(part, {}) for part in self.pick(words.SMALL_TALK))]

    def lesson(self):
        return chat_document(turns(self.read_facts()))

    def chat(self):
        kinds = [self.told_story] * 5 + [self.read_story] * 5 + [self.read_facts] * 5
        if not self.held_out:                           # what everybody knows cannot be held out
            kinds += [self.knowledge] * 3 + [self.small_talk] * 2
        exchanges = self.pick(kinds)()
        if len(exchanges) == 1 and self.chance(0.3):
            exchanges += self.pick(kinds)()
        system = [("system", self.pick(words.SYSTEM))] if self.chance(0.1) else []
        return system + turns(exchanges)

    def document(self):
        return self.story().text + "<eos>" if self.chance(0.5) else chat_document(self.chat())
