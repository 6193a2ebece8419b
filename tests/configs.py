"""What tests of config.json share: changed copies, and refusals that name the field."""

import pytest

from engine.errors import ConfigError
from engine.models import describe
from loaders.config import Config

ABSENT = object()
LINEAR = {"rope_type": "linear", "factor": 8.0}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
QUARTER = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}


def without(values, *keys):
    return {key: value for key, value in values.items() if key not in keys}


def spec_of(config):
    return describe(Config(config))


def refuses(config, *expected, by=describe):
    """`by` raises a ConfigError that holds every text of `expected`."""
    with pytest.raises(ConfigError) as caught:
        by(Config(config))
    for text in expected:
        assert text in str(caught.value)
