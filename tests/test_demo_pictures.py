"""The demo checkpoint sees: it answers questions about pictures of things that it never saw together, on the CPU lane.

The scenes of the training pictures are made again from the seeded grammar (tools/demo_pictures.py).
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine import LLM, SamplingParams
from tools import demo_pictures as pictures

DEMO = Path(__file__).resolve().parent.parent / "demo"
SHOWN = pictures.shown()
GREEDY = SamplingParams(max_tokens=40, temperature=0)
FRESH_SEED, N_FRESH = 1001, 64      # neither trains nor measures anything in tools/train_demo.py
STATED_ACCURACY = 0.75              # of 64 answers, word for word; demo/metrics.json has the share of 512: 0.85


@pytest.fixture(scope="module")
def llm():
    return LLM(DEMO / "checkpoint", device="cpu", progress=False)


@pytest.fixture(scope="module")
def fresh():
    """[(question, answer)], and a picture to each."""
    scenes = pictures.held_out_scenes(N_FRESH, seed=FRESH_SEED)
    grammar = pictures.PictureGrammar(FRESH_SEED, held_out=True)
    return [scene.exchanges[0] for scene in scenes], [grammar.draw(scene.items).picture for scene in scenes]


def share_right(llm, exchanges, sources):
    messages = [[about(source, question)] for (question, _), source in zip(exchanges, sources, strict=True)]
    return np.mean([output.text == answer
                    for output, (_, answer) in zip(llm.chat(messages, GREEDY), exchanges, strict=True)])


def about(source, question):
    return {"role": "user", "content": [{"type": "image", "image": source}, {"type": "text", "text": question}]}


@pytest.fixture(scope="module")
def measured(llm, fresh):
    return share_right(llm, *fresh)


def test_answers_about_fresh_pictures(measured):
    assert measured >= STATED_ACCURACY


def test_metrics_say_as_much(measured):
    """Within three standard errors: it is another sample of the same questions."""
    stated = json.loads((DEMO / "metrics.json").read_text())["held_out_pictures_right"]
    assert abs(measured - stated) < 3 * (stated * (1 - stated) / N_FRESH) ** 0.5


def test_answers_come_from_the_picture(llm, fresh):
    """With the next question's picture the answers are right about one time in ten."""
    exchanges, sources = fresh
    assert share_right(llm, exchanges, sources[1:] + sources[:1]) < 0.25


@pytest.mark.parametrize("name", SHOWN)
def test_shown_pictures_are_answered_rightly(llm, name):
    scene, _ = SHOWN[name]
    question, answer = scene.exchanges[0]
    assert llm.chat([about(DEMO / "pictures" / name, question)], GREEDY).text == answer


@pytest.mark.parametrize("name", SHOWN)
def test_shown_pictures_are_what_the_grammar_draws(name):
    drawn, kept = SHOWN[name][1].picture, Image.open(DEMO / "pictures" / name).convert("RGB")
    assert kept.size == drawn.size
    far = np.abs(np.asarray(kept, int) - np.asarray(drawn, int)).max(-1) > 8
    assert far.mean() < 0.02        # another Pillow may round an edge otherwise


def test_nothing_held_out_was_trained_on():
    trained = {item for scene in pictures.training_scenes() for item in scene.items}
    everything = [pictures.Item(colour, shape, place) for colour in pictures.COLOURS for shape in pictures.SHAPES
                  for place in pictures.PLACES]
    held_out = {item for item in everything if pictures.is_held_out(item)}
    assert trained == set(everything) - held_out        # so every other combination was
    assert 0.05 < len(held_out) / len(everything) < 0.2
    for scene in [*pictures.held_out_scenes(N_FRESH, seed=FRESH_SEED), *(scene for scene, _ in SHOWN.values())]:
        assert scene.items[0] in held_out


def test_questions_have_one_answer():
    """What a scene's answers say is true of its items: a place, a count and a colour by hand."""
    circle, cross = pictures.Item("red", "circle", "on the left"), pictures.Item("blue", "cross", "at the top")
    grammar = pictures.PictureGrammar(0, held_out=False)
    assert grammar.place_of(circle)[1] == "The circle is on the left."
    assert grammar.what_is_at(cross)[1] == "A blue cross."
    assert grammar.how_many([circle, circle._replace(place="at the top")])[1] == "There are two circles."
    for scene in pictures.training_scenes(300):
        asked = [question for question, _ in scene.exchanges]
        assert len(asked) == len(set(asked)) and len({item.place for item in scene.items}) == len(scene.items)


def test_what_was_learnt_from_texts_is_there_beside_pictures(llm):
    """One batch with a picture and without."""
    question, answer = SHOWN["colour.png"][0].exchanges[0]
    seen, told = llm.chat([[about(DEMO / "pictures" / "colour.png", question)],
                           [{"role": "user", "content": "What does a rabbit eat?"}]], GREEDY)
    assert (seen.text, told.text) == (answer, "A rabbit eats carrots.")
