"""Makes demo/: trains a tiny Gemma 4 dense model on the seeded grammar of tools/demo_corpus.py.

    pip install -e '.[train]'
    python -m tools.train_demo [--out demo]

Runs on one CPU core, in ten to fifteen minutes. Writes the checkpoint in the layout of the released Gemma 4
models, the prompts, the held-out documents, and metrics.json: what tests/test_demo.py holds the engine to.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, Gemma4ForCausalLM, Gemma4TextConfig
from transformers.utils import logging

from tools import demo_corpus as corpus
from tools.demo_trigram import Trigram, perplexity

SEED = 4
VOCAB = 1536
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"]        # ids 0 to 5, found by name everywhere else
TOKENS_PER_BATCH = 1024
MUON_LR, ADAM_LR, WARMUP_STEPS = 0.02, 5e-3, 60

CONFIG = {      # the schema of the released config.json; small numbers, and a window that most stories outgrow
    "architectures": ["Gemma4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_k_eq_v": True,
    "bos_token_id": 2,
    "dtype": "bfloat16",
    "enable_moe_block": False,
    "eos_token_id": [1, 5],
    "final_logit_softcapping": 30.0,
    "global_head_dim": 64,
    "head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 128,
    "hidden_size_per_layer_input": 0,
    "initializer_range": 0.02,
    "intermediate_size": 384,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "max_position_embeddings": 1024,
    "model_type": "gemma4_text",
    "moe_intermediate_size": None,
    "num_attention_heads": 4,
    "num_experts": None,
    "num_global_key_value_heads": 1,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 0,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "sliding_window": 32,
    "tie_word_embeddings": True,
    "top_k_experts": None,
    "use_bidirectional_attention": None,
    "use_cache": True,
    "use_double_wide_mlp": False,
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
}
GENERATION_CONFIG = {"bos_token_id": 2, "do_sample": True, "eos_token_id": [1, 5], "pad_token_id": 0,
                     "temperature": 1.0, "top_k": 64, "top_p": 0.95}
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] | trim -}}
    {%- else -%}
        {%- for part in message['content'] if part['type'] == 'text' -%}
            {{- part['text'] | trim -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
{%- endif -%}
"""


def write_json(path, data):
    path.write_text(json.dumps(data, indent=2) + "\n")


# ---- tokenizer -----------------------------------------------------------------------------------------------------
def train_tokenizer(documents):
    """A byte-fallback BPE built like Gemma's: spaces become ▁, no merge crosses a word, <bos> is put in front."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # While training only: words and runs of marks, each with the space before it. The merges remember these borders.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?(\w+|[^\w▁\n]+)|\n|▁"), "isolated")
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    alphabet = [chr(code) for code in range(33, 127)] + ["\n", "▁"]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=SPECIAL + bytes_, initial_alphabet=alphabet,
                                  show_progress=False)
    plain = (document.replace("<eos>", "").replace("<|turn>", "").replace("<turn|>", "") for document in documents)
    tokenizer.train_from_iterator(plain, trainer)

    tree = json.loads(tokenizer.to_str())           # the byte tokens are ordinary entries of the vocabulary
    tree["added_tokens"] = []
    tree["pre_tokenizer"] = json.loads(pre_tokenizers.Split(" ", "merged_with_previous").__getstate__())
    tokenizer = Tokenizer.from_str(json.dumps(tree))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", SPECIAL.index("<bos>"))])
    return tokenizer


def write_tokenizer(tokenizer, folder):
    assert tokenizer.get_vocab_size() == VOCAB, f"the tokenizer has {tokenizer.get_vocab_size()} tokens, not {VOCAB}"
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    write_json(folder / "tokenizer_config.json", {
        "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False, "model_max_length": CONFIG["max_position_embeddings"],
        "padding_side": "left", "tokenizer_class": "PreTrainedTokenizerFast"})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " Hello! "},
                {"role": "assistant", "content": [{"type": "text", "text": "Hi."}]}]
    rendered = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False)
    wanted = corpus.chat_document([("system", "Be kind."), ("user", "Hello!"), ("model", "Hi.")])
    assert rendered == f"<bos>{wanted}\n", f"the chat template renders {rendered!r}, the corpus spells {wanted!r}"


# ---- model ---------------------------------------------------------------------------------------------------------
def new_model():
    """Random weights, scaled so that the residual stream, the attention scores and the logits begin of order 1."""
    model = Gemma4ForCausalLM(Gemma4TextConfig(**CONFIG, attn_implementation="sdpa")).float()
    for name, weight in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.constant_(weight, 0.6)        # q · k is not divided by sqrt(head_dim): its std is 2 or 3
        elif name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            torch.nn.init.constant_(weight, 0.5)
        elif weight.ndim == 2:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model


def batches(documents, rng):
    """Batches of about TOKENS_PER_BATCH tokens, documents of like length together, in random order."""
    order = rng.permutation(len(documents))
    pools = [sorted(order[start:start + 1024], key=lambda i: len(documents[i])) for start in range(0, len(order), 1024)]
    result = []
    for pool in pools:
        batch = []
        for i in pool:
            if batch and len(documents[i]) * (len(batch) + 1) > TOKENS_PER_BATCH:
                result.append(batch)
                batch = []
            batch.append(documents[i])
        result.append(batch)
    return [result[i] for i in rng.permutation(len(result))]


def token_losses(model, batch):
    """-log P of every token after <bos>, and which of them are real: both [n_documents, longest - 1]."""
    ids = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.long)       # padded on the right: nothing sees it
    for row, document in zip(ids, batch, strict=True):
        row[:len(document)] = torch.tensor(document)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(batch), -1), ids[:, 1:] != SPECIAL.index("<pad>")


def train(model, documents):
    """One pass: first the lessons, then the rest. Muon for the matrices inside the layers, AdamW for the rest."""
    rng = np.random.default_rng(SEED)
    lessons, rest = documents[:corpus.N_LESSONS], documents[corpus.N_LESSONS:]
    steps = batches(lessons, rng) + batches(rest, rng)
    parameters = dict(model.named_parameters())
    inner = [weight for name, weight in parameters.items() if weight.ndim == 2 and "embed" not in name]
    outer = [weight for name, weight in parameters.items() if weight.ndim != 2 or "embed" in name]
    optimizers = [torch.optim.Muon(inner, lr=MUON_LR, weight_decay=0.0),
                  torch.optim.AdamW(outer, lr=ADAM_LR, weight_decay=0.0, betas=(0.9, 0.98), fused=True)]

    def rate(step):     # of the peak: a short warm-up, then a cosine down to 2 %
        return min((step + 1) / WARMUP_STEPS, 0.02 + 0.49 * (1 + math.cos(math.pi * step / len(steps))))
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    started, shown = time.monotonic(), []
    for step, batch in enumerate(steps, start=1):
        losses, real = token_losses(model, batch)
        loss = losses[real].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        shown.append(loss.item())
        if step % 100 == 0 or step == len(steps):
            seconds = time.monotonic() - started
            print(f"step {step}/{len(steps)}  loss {np.mean(shown):.3f}  {seconds:.0f} s", flush=True)
            shown = []


def write_model(model, folder):
    """bfloat16, the released tensor names; the head is tied to the embedding and not stored."""
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()
               if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "generation_config.json", GENERATION_CONFIG)


@torch.no_grad()
def model_log_probs(model, documents):
    losses = (token_losses(model, [document])[0][0] for document in documents)
    return [-loss.double().numpy() for loss in losses]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "demo")
    args = parser.parse_args()
    checkpoint = args.out / "checkpoint"
    checkpoint.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    torch.set_num_threads(1)        # the order of every sum is then the same on any number of cores
    torch.use_deterministic_algorithms(True)
    logging.set_verbosity_error()

    texts, held_out_texts = corpus.training_documents(), corpus.held_out_documents()
    tokenizer = train_tokenizer(texts)
    write_tokenizer(tokenizer, checkpoint)
    documents, held_out = ([encoding.ids for encoding in tokenizer.encode_batch(t)] for t in (texts, held_out_texts))
    n_tokens = sum(len(document) - 1 for document in documents)
    model = new_model()
    print(f"{len(documents)} documents, {n_tokens} tokens, longest {max(map(len, documents))}; "
          f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    train(model, documents)
    write_model(model, checkpoint)

    model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)     # measure what was written
    trigram = Trigram(documents, VOCAB)
    seen = documents[-len(held_out):]
    metrics = {
        "training_documents": len(documents), "training_tokens": n_tokens, "held_out_documents": len(held_out),
        "held_out_tokens": sum(len(document) - 1 for document in held_out),
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_perplexity": round(perplexity(model_log_probs(model, held_out)), 4),
        "training_perplexity": round(perplexity(model_log_probs(model, seen)), 4),
        "held_out_perplexity_trigram": round(perplexity([trigram.log_probs(document) for document in held_out]), 4),
    }
    write_json(args.out / "metrics.json", metrics)
    (args.out / "prompts.txt").write_text("\n".join(corpus.prompts()) + "\n")
    (args.out / "heldout.txt").write_text("\n\n".join(held_out_texts) + "\n")
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
