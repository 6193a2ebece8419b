"""The files of demo/checkpoint but its weights: configs in the layout of the released Gemma 4 models, tokenizer, chat
template. tools/train_demo.py writes them, and the weights.
"""

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from engine.models.vision_spec import Gemma4TowerSpec
from tools import demo_corpus as corpus

VOCAB = 1536
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"]        # ids 0 to 5, found by name everywhere else
PICTURE_TOKENS = ["<|image>", "<|image|>", "<image|>", "<|video|>"]         # the last ids
BEGIN_IMAGE, IMAGE, END_IMAGE, VIDEO = range(VOCAB - 4, VOCAB)
PATCH, POOL, SOFT_TOKENS = 8, 3, 70         # pixels of a patch, patches of a soft token's side, soft tokens a picture

TEXT_CONFIG = {     # the schema of the released config.json; small numbers, and a window that most stories outgrow
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_k_eq_v": True,
    "bos_token_id": 2,
    "dtype": "bfloat16",
    "enable_moe_block": False,
    "eos_token_id": 1,
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
    "use_bidirectional_attention": "vision",
    "use_cache": True,
    "use_double_wide_mlp": False,
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
}
VISION_CONFIG = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "default_output_length": SOFT_TOKENS,
    "dtype": "bfloat16",
    "global_head_dim": 32,
    "head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "max_position_embeddings": 131072,
    "model_type": "gemma4_vision",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "patch_size": PATCH,
    "pooling_kernel_size": POOL,
    "position_embedding_size": POOL * SOFT_TOKENS,      # the longest strip that 70 soft tokens can be
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
    "standardize": False,
    "use_clipped_linears": False,
}
CONFIG = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "audio_config": None,
    "boi_token_id": BEGIN_IMAGE,
    "dtype": "bfloat16",
    "eoi_token_id": END_IMAGE,
    "eos_token_id": [1, 5],
    "image_token_id": IMAGE,
    "initializer_range": 0.02,
    "model_type": "gemma4",
    "text_config": TEXT_CONFIG,
    "tie_word_embeddings": True,
    "video_token_id": VIDEO,
    "vision_config": VISION_CONFIG,
    "vision_soft_tokens_per_image": SOFT_TOKENS,
}
_IMAGES = {"do_convert_rgb": True, "do_normalize": False, "do_rescale": True, "do_resize": True,
           "image_mean": [0.0] * 3, "image_std": [1.0] * 3, "max_soft_tokens": SOFT_TOKENS, "patch_size": PATCH,
           "pooling_kernel_size": POOL, "resample": 3, "rescale_factor": 1 / 255}
PROCESSOR_CONFIG = {
    "image_processor": {**_IMAGES, "image_processor_type": "Gemma4ImageProcessor", "image_seq_length": SOFT_TOKENS},
    "image_seq_length": SOFT_TOKENS,
    "processor_class": "Gemma4Processor",
    "video_processor": {**_IMAGES, "do_normalize": True, "do_sample_frames": True, "num_frames": 32,
                        "return_metadata": False, "video_processor_type": "Gemma4VideoProcessor"},
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
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'text' -%}
                {{- part['text'] | trim -}}
            {%- elif part['type'] == 'image' -%}
                {{- '<|image|>' -}}
            {%- elif part['type'] == 'video' -%}
                {{- '<|video|>' -}}
            {%- endif -%}
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

    tree = json.loads(tokenizer.to_str())
    tree["added_tokens"] = []                       # the byte tokens are ordinary entries of the vocabulary
    tree["pre_tokenizer"] = json.loads(pre_tokenizers.Split(" ", "merged_with_previous").__getstate__())
    return finished(tree, SPECIAL)


def with_pictures(tokenizer):
    """The tokenizer with PICTURE_TOKENS in the place of the tokens that were merged last, and rarest."""
    tree = json.loads(tokenizer.to_str())
    tree["added_tokens"], tree["post_processor"] = [], None
    model, n = tree["model"], len(PICTURE_TOKENS)
    model["merges"] = model["merges"][:-n]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < VOCAB - n}
    return finished(tree, SPECIAL + PICTURE_TOKENS)


def finished(tree, special):
    tokenizer = Tokenizer.from_str(json.dumps(tree))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", SPECIAL.index("<bos>"))])
    return tokenizer


def write_tokenizer(tokenizer, folder):
    assert tokenizer.get_vocab_size() == VOCAB, f"the tokenizer has {tokenizer.get_vocab_size()} tokens, not {VOCAB}"
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    write_json(folder / "tokenizer_config.json", {
        "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False, "model_max_length": TEXT_CONFIG["max_position_embeddings"],
        "padding_side": "left", "tokenizer_class": "PreTrainedTokenizerFast"})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " Hello! "},
                {"role": "assistant", "content": [{"type": "text", "text": "Hi."}]}]
    rendered = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False)
    wanted = corpus.chat_document([("system", "Be kind."), ("user", "Hello!"), ("model", "Hi.")])
    assert rendered == f"<bos>{wanted}\n", f"the chat template renders {rendered!r}, the corpus spells {wanted!r}"


def write_configs(folder):
    for name, content in (("config", CONFIG), ("generation_config", GENERATION_CONFIG),
                          ("processor_config", PROCESSOR_CONFIG)):
        write_json(folder / f"{name}.json", content)


def tower():
    """The tower as the engine describes it, for its picture processor."""
    config = VISION_CONFIG
    return Gemma4TowerSpec(config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"],
                           config["num_attention_heads"], config["head_dim"], config["patch_size"],
                           config["pooling_kernel_size"], config["position_embedding_size"])
