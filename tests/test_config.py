"""loaders/config.py: typed reads of config.json, each error with the file, the field's whole path, what came and what
was expected."""

import pytest

from loaders.config import Config
from loaders.errors import CheckpointError, ConfigError

CONFIG = Config({"n": 3, "zero": 0, "real": 0.5, "yes": True, "text": "linear", "items": ["a", "b"], "nothing": None,
                 "inner": {"n": "three", "deeper": {"x": []}}, "id": 5, "ids": [1, 106], "no_ids": []})


def refuses(read, *expected):
    with pytest.raises(ConfigError) as caught:
        read()
    for text in expected:
        assert text in str(caught.value)


@pytest.mark.parametrize(("read", "value"), [
    (lambda: CONFIG.int("n"), 3),
    (lambda: CONFIG.int("zero", least=0), 0),
    (lambda: CONFIG.float("real"), 0.5),
    (lambda: CONFIG.float("n"), 3.0),
    (lambda: CONFIG.bool("yes"), True),
    (lambda: CONFIG.str("text", one_of=("default", "linear")), "linear"),
    (lambda: CONFIG.list("items", length=2, one_of=("a", "b", "c")), ["a", "b"]),
    (lambda: CONFIG.ids("id"), (5,)),
    (lambda: CONFIG.ids("ids"), (1, 106)),
    (lambda: CONFIG.ids("no_ids"), ()),
    (lambda: CONFIG.ids("absent"), ()),
    (lambda: CONFIG.section("inner").section("deeper").list("x"), []),
])
def test_reads(read, value):
    came = read()
    assert came == value and type(came) is type(value)


@pytest.mark.parametrize("name", ["int", "float", "bool", "str", "list", "section"])
@pytest.mark.parametrize("key", ["absent", "nothing"])
def test_null_counts_as_absent(name, key):
    read = getattr(CONFIG, name)
    assert read(key, None) is None
    refuses(lambda: read(key), f"config.json: {key} is missing, expected ")
    assert key not in CONFIG and "inner" in CONFIG
    assert "nothing" not in list(CONFIG) and len(list(CONFIG)) == len(CONFIG.values) - 1


@pytest.mark.parametrize(("read", "expected"), [
    (lambda: CONFIG.int("real"), "config.json: real is 0.5, expected an int >= 1"),
    (lambda: CONFIG.int("yes"), "yes is true, expected an int"),
    (lambda: CONFIG.int("zero"), "zero is 0, expected an int >= 1"),
    (lambda: Config({"n": 2**63}).int("n"), "n is 9223372036854775808, expected an int"),
    (lambda: CONFIG.int("text"), 'text is "linear", expected an int'),
    (lambda: CONFIG.float("zero"), "zero is 0, expected a number from 1e-30 to 1e30"),
    (lambda: CONFIG.float("yes"), "yes is true, expected a number from 1e-30 to 1e30"),
    (lambda: CONFIG.bool("n"), "n is 3, expected true or false"),
    (lambda: CONFIG.str("n"), "n is 3, expected a string"),
    (lambda: CONFIG.str("text", one_of=("default", "yarn")), 'text is "linear", expected one of default, yarn'),
    (lambda: CONFIG.list("text"), 'text is "linear", expected a list'),
    (lambda: CONFIG.list("items", length=3), 'items is ["a", "b"], expected a list of 3'),
    (lambda: CONFIG.list("items", one_of=("a",)), 'items is ["a", "b"], expected a list from a'),
    (lambda: CONFIG.ids("items"), 'items is ["a", "b"], expected a token id >= 0 or a list of them'),
    (lambda: CONFIG.ids("yes"), "yes is true, expected a token id"),
    (lambda: CONFIG.section("text"), 'text is "linear", expected a JSON object'),
    (lambda: CONFIG.section("inner").int("n"), 'config.json: inner.n is "three", expected an int'),
    (lambda: CONFIG.section("inner").section("deeper").int("y"), "config.json: inner.deeper.y is missing"),
])
def test_refusals(read, expected):
    refuses(read, expected)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0, 10**400])
def test_numbers_that_no_float_holds(value):
    refuses(lambda: Config({"x": value}).float("x"), "config.json: x is ", "expected a number from 1e-30 to 1e30")


def test_long_values_are_cut():
    with pytest.raises(ConfigError) as caught:
        Config({"layer_types": ["sliding_attention"] * 1000}).int("layer_types")
    assert "..." in str(caught.value) and len(str(caught.value)) < 200


# --- the file

def test_load(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 8, "text": "\u00e9"}', encoding="utf-8")
    config = Config.load(tmp_path)
    assert (config.int("hidden_size"), config.str("text"), config.where) == (8, "\u00e9", "config.json")
    (tmp_path / "generation_config.json").write_text('{"top_k": "x"}')
    refuses(lambda: Config.load(tmp_path, "generation_config.json").int("top_k"), 'generation_config.json: top_k is "x')


@pytest.mark.parametrize("data", [
    b"", b"{", b'{"a": 1,}', b"[1]", b"null", b'"text"', b'{"a": "\xff"}', b'{"a": 1, "a": 2}', b"[" * 100_000],
    ids=lambda data: repr(data[:20]))
def test_files_that_are_not_a_json_object(tmp_path, data):
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Config.load(tmp_path)


def test_no_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json here"):
        Config.load(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json here"):
        Config.load(tmp_path)
