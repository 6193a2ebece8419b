"""A tiny model of random weights on a Core with room for cases."""

from measure.cases import parse_case
from measure.random_weights import RandomCheckpoint
from measure.report import Report
from measure.step.seats import Needs, open_core

from engine.backend import open_lane
from engine.models import describe
from loaders.config import Config
from tests import tiny

CPU = open_lane("cpu", "auto")


def spec_of(family, **fields):
    return describe(Config(tiny.flat(family, **fields)))


def core_of(spec, *texts, lane=CPU, n_steps=4, max_batch_tokens=64, report=None):
    """(Core, [Needs]) of the cases that `texts` say."""
    needs = [Needs(parse_case(text), n_steps, spec.max_positions, max_batch_tokens) for text in texts]
    return open_core("tiny", spec, needs, lane, RandomCheckpoint(spec, 3), report or Report(), {}, 3)
