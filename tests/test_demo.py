"""The demo checkpoint through the whole engine: it has learned its English, and has not memorised it.

The training set is made again from the seeded grammar (tools/demo_corpus.py), the trigram model is fitted again on it.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from engine import LLM, SamplingParams
from tools import demo_corpus as corpus
from tools.demo_trigram import Trigram, perplexity

DEMO = Path(__file__).resolve().parent.parent / "demo"
PROMPTS = (DEMO / "prompts.txt").read_text().splitlines()
HELD_OUT = (DEMO / "heldout.txt").read_text().rstrip("\n").split("\n\n")
STATED_PERPLEXITY = 1.385       # 1.05 x what tools/train_demo.py measured with transformers (demo/metrics.json)
GREEDY = SamplingParams(max_tokens=300, temperature=0)


@pytest.fixture(scope="module")
def llm():
    return LLM(DEMO / "checkpoint", device="cpu", progress=False)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(DEMO / "checkpoint" / "tokenizer.json"))


@pytest.fixture(scope="module")
def training():
    return corpus.training_documents()


@pytest.fixture(scope="module")
def metrics():
    return json.loads((DEMO / "metrics.json").read_text())


@pytest.fixture(scope="module")
def measured(llm, tokenizer):
    """The engine's perplexity on the held-out documents."""
    return engine_perplexity(llm, encode(tokenizer, HELD_OUT))


def encode(tokenizer, documents):
    return [encoding.ids for encoding in tokenizer.encode_batch(documents)]


def engine_perplexity(llm, documents):
    """Of every token after <bos>, in one ragged batch."""
    log_probs = []
    for logits, ids in zip(llm.forward(documents, return_logits="all").logits, documents, strict=True):
        logits = logits[:-1].astype(np.float64)
        chosen = logits[np.arange(len(ids) - 1), ids[1:]]
        log_probs.append(chosen - np.log(np.exp(logits).sum(-1)))       # logits are capped at 30: no overflow
    return perplexity(log_probs)


def words_of(text):
    return re.findall(r"[A-Za-z]+", text)


def most_repeats(text, n=8):
    """How often the most frequent run of n words occurs."""
    words = words_of(text)
    runs = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
    return max(map(runs.count, runs), default=0)


def ask(llm, text):
    return llm.chat([{"role": "user", "content": text}], GREEDY).text


def test_the_demo_is_small():
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) <= 6_000_000


def test_the_files_are_what_the_grammar_says():
    assert corpus.held_out_documents() == HELD_OUT
    assert corpus.prompts() == PROMPTS


def test_nothing_shown_was_trained_on(training):
    everything = "\0".join(training)
    assert training[len(training) // 2] in everything       # a text that was trained on is found this way
    for text in PROMPTS + HELD_OUT:
        assert text not in everything


def test_perplexity_on_held_out_documents(measured, metrics):
    """Under the stated figure, and equal to what transformers measured on the same weights."""
    assert measured < STATED_PERPLEXITY
    assert measured == pytest.approx(metrics["held_out_perplexity"], rel=1e-3)


def test_the_model_beats_a_trigram_model(measured, tokenizer, training, metrics):
    trigram = Trigram(encode(tokenizer, training), tokenizer.get_vocab_size())
    its = perplexity([trigram.log_probs(document) for document in encode(tokenizer, HELD_OUT)])
    assert its == pytest.approx(metrics["held_out_perplexity_trigram"], rel=1e-3)
    assert measured < 0.7 * its


def test_it_knows_trained_documents_no_better_than_held_out_ones(llm, tokenizer, training):
    """Both stories only: the training set also has questions of general knowledge, which nothing holds out."""
    seen, unseen = ([text for text in texts if text.endswith("<eos>")][:60] for texts in (training, HELD_OUT))
    assert engine_perplexity(llm, encode(tokenizer, unseen)) < 1.05 * engine_perplexity(llm, encode(tokenizer, seen))


def test_prompts_become_whole_stories(llm, training):
    vocabulary = set(words_of(" ".join(training)))
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, GREEDY), strict=True):
        assert output.finish_reason == "stop" and output.token_ids[-1] in llm.eos_ids
        assert len(words_of(output.text)) >= 30 and output.text.endswith((".", '."'))
        assert set(words_of(output.text)) <= vocabulary
        assert most_repeats(prompt + output.text) <= 2
        hero = next(word for word in words_of(prompt) if word in corpus.words.GIRLS + corpus.words.BOYS)
        last_sentences = output.text[-200:]
        assert hero in last_sentences, f"the story of {hero} ends without {hero}: {last_sentences}"


def test_sampled_stories_are_readable(llm, training):
    """The checkpoint's own sampling settings (temperature 1): words of the language, one story each, all different."""
    vocabulary = set(words_of(" ".join(training)))
    params = [SamplingParams(max_tokens=300, temperature=1.0, top_k=64, top_p=0.95, seed=seed) for seed in range(8)]
    outputs = llm.generate([PROMPTS[0]] * len(params), params)
    words = [word for output in outputs for word in words_of(output.text)]
    assert np.mean([word in vocabulary for word in words]) > 0.99
    assert all(output.finish_reason == "stop" and most_repeats(output.text) <= 2 for output in outputs)
    assert len({output.text for output in outputs}) == len(outputs)


def test_chat_answers_from_what_it_learned(llm):
    assert ask(llm, "What does a rabbit eat?") == "A rabbit eats carrots."
    assert ask(llm, "What colour is snow?") == "Snow is white."


def test_chat_answers_about_held_out_stories(llm):
    """Word for word, about stories whose hero, thing and place it never saw together: 45 of 60 when it was made.
    Guessing a name, a place or a colour would be right one time in ten or less."""
    grammar = corpus.Grammar(corpus.SEED + 3, held_out=True)
    asked = [grammar.read_story()[0] for _ in range(60)]
    answers = llm.chat([[{"role": "user", "content": question}] for question, _ in asked], GREEDY)
    right = [output.text == wanted for output, (_, wanted) in zip(answers, asked, strict=True)]
    assert sum(right) >= 0.45 * len(right)


def test_a_trigram_models_probabilities_sum_to_one():
    documents, vocab = [[2, 5, 6, 5, 6, 7, 1], [2, 5, 7, 6, 1], [2, 6, 6, 6, 1]], 9
    trigram = Trigram(documents, vocab)
    for seen in ([2], [2, 5], [2, 5, 6], [2, 8, 8], [2, 6, 6]):
        total = sum(np.exp(trigram.log_probs([*seen, token])[-1]) for token in range(vocab))
        assert total == pytest.approx(1)
    unigram = (3 + 4 / vocab) / (14 + 4)        # by hand: 5 is 3 of 14 tokens of 4 kinds,
    bigram = (1 + 4 * unigram) / (6 + 4)        # 1 of the 6 tokens (4 kinds) after 6, 1 of the 2 (2 kinds) after 5 6
    assert np.exp(trigram.log_probs([2, 5, 6, 5])[-1]) == pytest.approx((1 + 2 * bigram) / (2 + 2))
