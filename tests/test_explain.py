"""LLM.explain(): what is special about a model and about its settings stands there."""

import pytest

from tests import tiny_models as tiny


@pytest.mark.parametrize("name, ple, lines", [
    ("gemma4", "device", ["  layers 0..1: sliding(5) attention, 4 query and 2 KV heads of 8; dense MLP 40",
                          "  layers 2..2: global attention, 4 query and 1 KV heads of 16, v is the k projection; dense "
                          "MLP 40"]),
    ("gemma4-moe", "device", ["  layers 0..1: sliding(5) attention, 4 query and 2 KV heads of 8; 8 experts of 12, 2 a "
                              "token by softmax, beside a dense MLP 40"]),
    ("gemma4-e", "device", ["  layers 2..2: sliding(5) attention, 4 query and 2 KV heads of 8, K and V of layer 0; "
                            "dense MLP 80",
                            "  layers from 2 on own no K and V: a prompt's positions whose states nobody asked for end "
                            "before layer 2 of 4",
                            "per-layer inputs: 8 values for each of 4 layers, table of 96 rows on the lane "
                            "(ple='device')"]),
    ("gemma4-e", "host", ["per-layer inputs: 8 values for each of 4 layers, table of 96 rows in the checkpoint's file; "
                          "a step's rows are copied with its inputs (ple='host')"]),
    ("llama4", "host", ["  layers 2..2: global attention, 4 query and 2 KV heads of 8, no positions (NoPE), queries "
                        "grow from position 4 on; dense MLP 40",
                        "  layers 3..3: chunked(8) attention, 4 query and 2 KV heads of 8; 8 experts of 24, 1 a token "
                        "by sigmoid, beside a dense MLP 24"]),
])
def test_explain_names_what_is_special(checkpoints, name, ple, lines):
    told = tiny.open_llm(checkpoints[name], ple=ple).explain().splitlines()
    assert not set(lines) - set(told)
    assert ("per-layer inputs" in "\n".join(told)) == (name == "gemma4-e")


def test_explain_names_the_tiles_of_the_experts(checkpoints, open_llm):
    told = open_llm(checkpoints["gemma4-moe"], max_seq_len=64, max_batch_tokens=64).explain()
    assert "8 experts of 12: tiles of " in told
