"""Engines on tiny checkpoints (tests/tiny.py) that also have a tokenizer and a chat template.

Their head is not tied to the embedding, so greedy text wanders instead of repeating itself.
"""

import json

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers

from engine import LLM, SamplingParams, plan
from tests import tiny

VOCAB = 96
EOS, BOS = 1, 2
KINDS = {"s": "sliding_attention", "g": "full_attention", "c": "chunked_attention"}
# Small heads: Gemma 4 does not scale q · k, and with wider ones its softmax is so sharp that it multiplies rounding.
GEMMA4 = {"head_dim": 8, "global_head_dim": 16}
FIELDS = {"gemma3": {"head_dim": 8}, "gemma4": GEMMA4, "gemma4-moe": GEMMA4, "llama4": {"head_dim": 8},
          "gemma4-e": {**GEMMA4, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCAB}}
LAYERS = {"gemma4-e": "sgsg", "llama4": "ccgc"}     # the others: "ssgs"
TEMPLATE = ("{{ bos_token }}{% for message in messages %}<turn>{{ message.role }} "
            "{% if message.content is string %}{{ message.content }}{% else %}"
            "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}<turn>model ")


def write(directory, family, seed=0, layers=None, generation=None, with_text=True, **fields):
    """A checkpoint of one of FIELDS in `directory`, which it returns.

    layers      a letter each: s for sliding, g for global (of Llama 4: without RoPE), c for chunked
    generation  what generation_config.json holds; None writes no such file
    with_text   with the files of a tokenizer and a chat template
    fields      further fields of config.json
    """
    layers = layers or LAYERS.get(family, "ssgs")
    if family == "llama4":
        fields = {"no_rope_layers": [int(kind != "g") for kind in layers], **fields}
    config = tiny.flat(family, tie_word_embeddings=False, num_hidden_layers=len(layers),
                       layer_types=[KINDS[kind] for kind in layers],
                       **{"vocab_size": VOCAB, **FIELDS[family], **fields})
    tiny.write_checkpoint(directory, config, seed=seed)
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    if with_text:
        _tokenizer().save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(json.dumps(
            {"bos_token": "<bos>", "add_bos_token": True, "chat_template": TEMPLATE}))
    return directory


def _tokenizer():
    """BPE of VOCAB tokens: letters, a few merges, and the three bytes of "€", so that characters cross tokens."""
    chars = [*"▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'\n"]
    merges = [*map(tuple, ("th", "▁t", "he", "ca", "in", "er", "an", "on", "re",
                           "ed", "▁a", "or", "es", "is", "at", "en", "ou")), ("▁t", "he"), ("ca", "t")]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<turn>", "<0xE2>", "<0x82>", "<0xAC>", *chars,
              *(left + right for left, right in merges)]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>",
                                   byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(pieces[:5])
    assert backend.get_vocab_size() == VOCAB
    return backend


def open_llm(path, **arguments):
    """An engine on the `cpu` lane; sequences up to 96 tokens unless told."""
    return LLM(path, **{"device": "cpu", "progress": False, "max_seq_len": 96, **arguments})


def kv_bytes_for(path, n_seqs, **arguments):
    """A kv_cache_bytes that holds n_seqs (a fraction counts) sequences of the largest length, and a largest picture."""
    pools = plan(path, **{"device": "cpu", "max_seq_len": 96, "max_seqs": 1, **arguments}).pools
    return int(sum((n_seqs * pool.seq_pages + pool.run_pages) * pool.page_bytes for pool in pools))


def free_pages(llm):
    return [allocator.n_free for allocator in llm.kv_cache.allocators]


def prompts(seed, *lengths):
    """Random token ids, no special tokens among them."""
    rng = np.random.default_rng(seed)
    return [rng.integers(8, VOCAB, n).tolist() for n in lengths]


def greedy(**fields):
    """SamplingParams of eight greedy tokens, unless told."""
    return SamplingParams(**{"temperature": 0, "max_tokens": 8, "ignore_eos": True, **fields})
