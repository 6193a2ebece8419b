"""tools/measure/cases.py: cases of a step and lists of numbers as text."""


import pytest
from measure.cases import Case, Part, int_list, parse_case, parse_cases, whole
from measure.report import BenchError


@pytest.mark.parametrize("text, values", [
    ("8", [8]), ("1,8,64", [1, 8, 64]), ("1-4", [1, 2, 3, 4]), ("5-5", [5]), ("1-9+2", [1, 3, 5, 7, 9]),
    ("1-8+3", [1, 4, 7]), ("1-64*2", [1, 2, 4, 8, 16, 32, 64]), ("3-20*2", [3, 6, 12]),
    ("1,2-4,8-32*2", [1, 2, 3, 4, 8, 16, 32]), ("1, 2", [1, 2]),
])
def test_lists_and_ranges(text, values):
    assert int_list(text) == values


@pytest.mark.parametrize("text, message", [
    ("", "'' is none, expected such as 8, 1-4"), ("1,,2", "'' is none"), ("a", "'a' is none"), ("-1", "'-1' is none"),
    ("1.5", "'1.5' is none"), ("0", "at least 1"), ("0-4", "at least 1"), ("4-1", "'4-1' falls"),
    ("1-4+0", "never ends"), ("1-4*1", "never ends"), ("0-4*2", "never ends"), ("1-4-2", "'1-4-2' is none"),
    ("1-100000", "more than 1000 values"),
])
def test_what_is_no_list_is_named(text, message):
    with pytest.raises(BenchError) as error:
        int_list(text)
    assert f"numbers {text!r}: " in str(error.value) and message in str(error.value)


@pytest.mark.parametrize("text, label, parts", [
    ("decode=32*1@8192", "decode", [(32, 1, 8192)]),
    ("prefill=8192", "prefill", [(1, 8192, 8192)]),
    ("prefill=4*512", "prefill", [(4, 512, 512)]),
    ("chunk=512@4096", "chunk", [(1, 512, 4096)]),
    ("mix=2048,16*1@4096", "mix", [(1, 2048, 2048), (16, 1, 4096)]),
    ("verify.k-4_a=16*5@4096", "verify.k-4_a", [(16, 5, 4096)]),
    ("first=1", "first", [(1, 1, 1)]),
])
def test_a_case_is_read_and_written(text, label, parts):
    case = parse_case(text)
    assert case == Case(label, tuple(Part(*part) for part in parts))
    assert (str(case), case.rows) == (text, parts)
    assert parse_cases(text) == [case]


def test_plain_counts_are_left_out_of_the_text():
    assert str(parse_case("a=1*7@7,1*1@9")) == "a=7,1@9"


@pytest.mark.parametrize("text", [
    "", "decode", "=1", "decode=", "decode=32*", "decode=*1", "decode=1@", "decode=1@8@9", "decode=1,,2", "decode=1,",
    "decode=-1", "decode=1.5", "two words=1", "decode=1 @8", "decode=1=2", "decode=\N{SUPERSCRIPT TWO}",
])
def test_what_is_no_case_is_refused_with_the_grammar(text):
    with pytest.raises(BenchError) as error:
        parse_case(text)
    assert f"case {text!r}: " in str(error.value) and "expected LABEL=[N*]QUERY[@CONTEXT],..." in str(error.value)


@pytest.mark.parametrize("text, message", [
    ("decode=0*1@8", "'0*1@8' is empty"), ("decode=0", "'0' is empty"), ("decode=1,2*0@8", "'2*0@8' is empty"),
    ("decode=9@8", "context 8 is less than the query, 9"), ("decode=1@0", "context 0 is less than the query, 1"),
    ("decode={1,2}", "braces make several cases"), ("decode=1-8*1@64", "several cases stands in braces: decode={1,8-"),
])
def test_a_case_that_cannot_be_is_refused(text, message):
    with pytest.raises(BenchError, match="case ") as error:
        parse_case(text)
    assert message in str(error.value)


def test_counts_of_a_case():
    case = parse_case("mix=2048,16*1@4096,2*5@64")
    assert (case.n_seqs, case.n_tokens, case.max_context) == (19, 2048 + 16 + 10, 4096)


@pytest.mark.parametrize("text, is_decode, is_prompt", [
    ("a=8*1@9", True, False), ("a=8*1@9,1@2", True, False), ("a=512", False, True), ("a=512,2*3", False, True),
    ("a=2@9", False, False), ("a=512,1@9", False, False), ("a=1", False, True)])
def test_kinds_of_a_case(text, is_decode, is_prompt):
    case = parse_case(text)
    assert (case.is_decode, case.is_prompt) == (is_decode, is_prompt)


def test_braces_expand_as_in_a_shell():
    assert list(map(str, parse_cases("decode={1-64*4}*1@{1024,32768}"))) == [
        f"decode={n}*1@{context}".replace("=1*", "=") for n in (1, 4, 16, 64) for context in (1024, 32768)]
    assert list(map(str, parse_cases("prefill={2048,8192}"))) == ["prefill=2048", "prefill=8192"]
    assert list(map(str, parse_cases("a={1-3,8}@9"))) == ["a=1@9", "a=2@9", "a=3@9", "a=8@9"]
    assert list(map(str, parse_cases("{decode,verify}={1,2}*{1,5}@{64}")))[::3] == [
        "decode=1@64", "decode=2*5@64", "verify=2*1@64"]
    assert list(map(str, parse_cases("mix=2048,{1,16}*1@4096"))) == ["mix=2048,1@4096", "mix=2048,16*1@4096"]


@pytest.mark.parametrize("text, message", [
    ("decode={}", "an empty choice in {}"), ("decode={1,}", "an empty choice in {1,}"),
    ("decode={1,2", "braces"), ("decode=1}", "braces"), ("decode={1,{2,3}}", "braces"),
    ("decode={4-1}", "'4-1' falls"), ("decode={8,16}@8", "context 8 is less than the query, 16"),
    ("decode={1-100}*1@{1-100}", "10000 cases, expected at most 1000"),
])
def test_braces_that_cannot_be_are_refused(text, message):
    with pytest.raises(BenchError) as error:
        parse_cases(text)
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["0", "-1", "1.0", "x", ""])
def test_whole_numbers_have_a_least(text):
    assert whole(1)("12") == 12
    with pytest.raises(BenchError, match="is not a whole number >= 1"):
        whole(1)(text)
