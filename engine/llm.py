"""LLM: the public interface. Opens a checkpoint, turns prompts into sequences, and runs the loop until they end."""

from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path

from engine import prompts as prompt_input
from engine.backend import lane_of, open_lane
from engine.checks import is_int, is_number
from engine.config import EngineConfig
from engine.core import Core
from engine.draft_checkpoint import describe_draft, draft_path
from engine.errors import ConfigError, ParamsError, PromptError, RawgemError
from engine.explain import explain
from engine.media_prompts import MediaPrompts
from engine.memory_plan import plan_memory
from engine.models import describe
from engine.models.presets import PRESETS, preset
from engine.outputs import ForwardOutput, RequestMetrics, RequestOutput, StreamPiece
from engine.random import request_seed
from engine.sampler import MAX_VOCAB
from engine.sampling_params import SamplingParams
from engine.tasks import Generation, Probe
from engine.tensors import without_missing_media
from engine.thinking import CLOSE, OPEN, ThinkingMarks
from engine.vision.picture import PictureProcessor
from loaders.chat_template import ChatTemplate
from loaders.config import Config
from loaders.generation_config import load_generation_config
from loaders.hub import resolve
from loaders.safetensors import Checkpoint
from loaders.tokenizer import Detokenizer, Tokenizer


class LLM:
    """A model, ready to run.

    model             checkpoint directory, or a Hugging Face repo id (downloaded; HF_HUB_OFFLINE is respected)
    device            auto | cuda | cuda:N | cpu | emulated
    dtype             auto (bfloat16 on cuda and emulated, float32 on cpu) | bfloat16 | float32
    draft             checkpoint of a draft model made for this one (Gemma 4's assistants), named as `model` is
    n_draft_tokens    tokens drafted for a sequence in a step: 0 to 16, or "auto": up to 8, as many as a request's
                      acceptance and the number of sequences in a step pay for, none where drafting loses
    draft_sampling    argmax | sample: the likeliest tokens are drafted, and sampled text is the same text as without a
                      draft; or they are drawn, which more often accepts them: the same distribution, other text,
                      which with "auto", or in a step without room for all drafts, depends on other requests too
    relaxed_acceptance  None | {"top_k": 10, "delta": 0.6}: LOSSY. While the model thinks, a drafted token of a request
                      that is not greedy is accepted where it is among the top_k likeliest and its probability at most
                      delta below the largest. The text is another than without a draft
    max_seq_len       tokens of the longest sequence; None takes what the model and the memory allow
    max_seqs          sequences computed at once
    max_batch_tokens  tokens computed in one step
    page_size         tokens of one KV page
    kv_cache_bytes    None takes what max_seqs of max_seq_len need, at most a quarter of the host memory that is left,
                      or on cuda what memory_fraction leaves
    encoder_cache_bytes  for soft tokens of pictures, at least what one step can need; None is room for eight of the
                      largest pictures
    memory_fraction   share of the GPU's free memory (or of plan's memory_bytes) to use
    prefix_caching    accepted; has no effect yet
    graphs            True and "auto" replay decode steps as CUDA graphs on cuda; False launches every kernel
    ple               device | host: where the table of per-layer inputs lies (Gemma 4 E-series; without effect on
                      others); host leaves it in the file and copies the rows that a step's tokens need
    gemm              own | cublas: matrix products on cuda; with cublas a row's bits may depend on its batch and on
                      drafts beside it, and steps are no graphs
    seed              64-bit; requests without a seed of their own draw from (seed, submission counter)
    progress          bars while loading and generating, where stderr is a terminal
    Raises ConfigError, CheckpointError, MemoryPlanError. Threads may share one LLM; their requests run as one batch.
    """

    def __init__(self, model, device="auto", dtype="auto", draft=None, n_draft_tokens=4, max_seq_len=None, max_seqs=64,
                 max_batch_tokens=2048, page_size=16, kv_cache_bytes=None, memory_fraction=0.9, prefix_caching=True,
                 graphs="auto", ple="device", gemm="own", draft_sampling="argmax", relaxed_acceptance=None, seed=0,
                 progress=True, encoder_cache_bytes=None):
        arguments = dict(locals())
        self.config = EngineConfig(**{field.name: arguments[field.name] for field in fields(EngineConfig)})
        self.lane = open_lane(device, dtype, gemm)
        self.path = Path(resolve(model, progress=progress))
        described = describe(Config.load(self.path))
        self.tokenizer = Tokenizer.load(self.path)
        self.chat_template = ChatTemplate.load(self.path)
        if described.vocab > MAX_VOCAB:
            raise ConfigError(f"config.json: vocab_size is {described.vocab}, the sampler takes at most {MAX_VOCAB}")
        self.generation = load_generation_config(self.path)
        eos_ids = self.generation.eos_token_ids or described.eos_ids
        self.eos_ids = tuple(i for i in eos_ids if i < described.vocab)     # a shrunk vocabulary cannot emit the others
        self.default_params = _default_params(self.generation.sampling)
        self._marks = self._thinking_marks() if self.config.relaxed_acceptance else None
        with ExitStack() as files:
            checkpoint = files.enter_context(Checkpoint.open(self.path))
            self.spec = without_missing_media(described, checkpoint.tensors)
            self.pictures = PictureProcessor.load(self.path, self.spec.media.tower) if self.spec.media else None
            assistant = None
            if draft is not None:
                path = draft_path(draft, progress=progress)
                assistant = describe_draft(path, self.spec), files.enter_context(Checkpoint.open(path))
            self._core = Core.open(self.spec, self.config, self.lane, checkpoint, self._loading, assistant)
        self._prompts = MediaPrompts(self.spec, self.tokenizer, self.pictures,
                                     "the checkpoint has no vision tensors" if described.media else
                                     "this engine knows no vision part of the model: it takes text only")
        self._n_requests = 0
        self._counts = dict.fromkeys(("requests", "finished", "errors", "aborted", "prompt_tokens",
                                      "generated_tokens"), 0)

    @property
    def max_seq_len(self):
        return self._core.plan.max_seq_len

    @property
    def weights(self):
        return self._core.weights

    @property
    def kv_cache(self):
        return self._core.kv_cache

    @property
    def encoder_cache(self):
        return self._core.encoder_cache

    @property
    def scheduler(self):
        return self._core.scheduler

    @property
    def graphs(self):
        return self._core.graphs

    def generate(self, prompts, params=None):
        """Completes prompts; returns a RequestOutput each, in order, or one for a single prompt.

        prompts  str, list of ids, or dict {"prompt" | "token_ids": ..., "images": [...], "videos": [...],
                 "image_tokens": n, "video_tokens": n}; or a list of those
        params   one SamplingParams, or a list with one a prompt; None takes the checkpoint's generation_config.json
        An image is a path, the bytes of a file, a PIL image, a uint8 array or an Image; a video a file, a list of
        images or a Video. They stand, in order, where a text has the checkpoint's placeholders (<|image|>, <|video|>;
        Gemma 3: <start_of_image>), or token ids the id of soft tokens, once or for each of them. image_tokens and
        video_tokens are how many soft tokens a picture and a frame may take (Gemma 4: 70, 140, 280, 560 or 1120).
        A bad item of a list gives an output with finish_reason "error" and .error in its place while the rest finish;
        a single bad prompt raises PromptError or ParamsError.
        """
        prompts = prompt_input.as_prompts(prompts)
        if prompt_input.is_single(prompts):
            return self._run([self._admit(prompts, params, prompt_input.as_prompt)])[0]
        return self._run(self._admit_all(prompts, params, prompt_input.as_prompt))

    def chat(self, messages, params=None, image_tokens=None, video_tokens=None):
        """Answers a conversation, or a list of them, through the checkpoint's chat template; returns as generate does.

        messages  [{"role": "system" | "user" | "assistant", "content": text or a list of parts}, ...]; a part is
                  {"type": "text", "text": ...}, {"type": "image", "image": ...} or {"type": "video", "video": ...},
                  with images and videos, image_tokens and video_tokens as generate takes them
        """
        as_prompt = partial(self._rendered, image_tokens=image_tokens, video_tokens=video_tokens)
        if not isinstance(messages, (list, tuple)) or not messages or isinstance(messages[0], dict):
            return self._run([self._admit(messages, params, as_prompt)])[0]
        return self._run(self._admit_all(messages, params, as_prompt))

    def chat_prompt(self, messages, image_tokens=None, video_tokens=None):
        """Token ids of a conversation rendered by the chat template, ready for the model's turn, soft tokens of its
        images and videos included. Raises PromptError."""
        return self._prompts.ids(self._rendered(messages, image_tokens, video_tokens))[0]

    def stream(self, prompt, params=None):
        """Yields a StreamPiece for every step that adds something to one prompt's text; the last has a finish_reason.

        The prompt is checked at the call. Closing the generator aborts the request; other requests may run meanwhile.
        """
        return self._stream(self._admit(prompt, params, prompt_input.as_prompt))

    def stream_chat(self, messages, params=None, image_tokens=None, video_tokens=None):
        """Answers one conversation, given as chat takes it, and yields the answer as stream does."""
        as_prompt = partial(self._rendered, image_tokens=image_tokens, video_tokens=video_tokens)
        return self._stream(self._admit(messages, params, as_prompt))

    def forward(self, token_ids, images=None, videos=None, return_logits="last", return_hidden_states=False,
                image_tokens=None, video_tokens=None):
        """Runs token ids through the model without sampling, as one ragged batch, through the same scheduler, chunks,
        pages and ops as generate.

        token_ids             list of lists of ids
        images, videos        None, or for each row None or the list of those it holds; image_tokens, video_tokens: as
                              generate takes them. Logits and states are of the row's positions once expanded
        return_logits         "last" | "all" | n: logits of the last position, all of them, the last n of each row
        return_hidden_states  False | True (after the final norm) | "layers" (embeddings, then after every layer)
        Returns ForwardOutput. Raises PromptError, ConfigError.
        """
        if return_hidden_states not in (False, True, "layers"):
            raise ConfigError(f"return_hidden_states is {return_hidden_states!r}, expected False, True or 'layers'")
        if return_logits not in ("last", "all") and not (is_int(return_logits) and return_logits >= 1):
            raise ConfigError(f"return_logits is {return_logits!r}, expected 'last', 'all' or an int >= 1")
        rows = prompt_input.as_list(token_ids, "token_ids", "a list of lists of ids")
        images, videos = (prompt_input.media_rows(media, what, len(rows))
                          for media, what in ((images, "images"), (videos, "videos")))
        admitted = []
        for row, *media in zip(rows, images, videos, strict=True):
            ids = prompt_input.checked_ids(row, self.spec.vocab)
            ids, runs = self._prompts.ids(prompt_input.Prompt(ids, *media, image_tokens, video_tokens))
            prompt_input.check_length(len(ids), self.max_seq_len, media=runs)
            n_returned = {"last": 1, "all": len(ids)}.get(return_logits) or min(return_logits, len(ids))
            admitted.append((ids, Probe(len(ids), len(ids) - n_returned, self.spec, return_hidden_states), runs))
        tasks = [task for _, task, _ in admitted]
        with self._running(admitted) as sequences:
            while not all(sequence.task.is_finished for sequence in sequences):
                self._core.loop.step()
        return ForwardOutput([task.logits for task in tasks],
                             [task.hidden for task in tasks] if return_hidden_states else None)

    def plan(self):
        """The MemoryPlan this engine runs under."""
        return self._core.plan

    def explain(self):
        """What runs where and why, as text: lane, layers, pools and their ledgers, tensors left unread."""
        return explain(self)

    def stats(self):
        """Counters since the engine opened, as a dict."""
        pools = [{"kind": spec.kind, "n_pages": pages.n_pages, "n_free": pages.n_free}
                 for spec, pages in zip(self.kv_cache.specs, self.kv_cache.allocators, strict=True)]
        pictures = self._core.encoder_cache
        return {**self._counts, "steps": self.scheduler.n_steps, "preemptions": self.scheduler.n_preemptions,
                "running": len(self.scheduler.running), "waiting": len(self.scheduler.waiting), "pools": pools,
                **({"encoder_cache": pictures.stats()} if pictures else {}),
                **({"drafts": self._core.control.health.stats()} if self._core.control else {})}

    def _admit_all(self, prompts, params, as_prompt):
        """What _admit returns for each prompt; one that it refuses becomes an error output."""
        if params is None or isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        if not isinstance(params, (list, tuple)):
            raise ParamsError(f"params is of type {type(params).__name__}, expected SamplingParams or a list of them")
        if len(params) != len(prompts):
            raise ParamsError(f"{len(params)} SamplingParams for {len(prompts)} prompts, expected one, or one a prompt")
        admitted = []
        for prompt, one in zip(prompts, params, strict=True):
            try:
                admitted.append(self._admit(prompt, one, as_prompt))
            except RawgemError as error:
                self._counts["requests"] += 1
                self._counts["errors"] += 1
                admitted.append(RequestOutput(finish_reason="error", error=error, metrics=RequestMetrics()))
        return admitted

    def _rendered(self, messages, image_tokens=None, video_tokens=None):
        """The Prompt that the chat template makes of a conversation."""
        if self.chat_template is None or self.tokenizer is None:
            raise PromptError(f"{self.path} has no chat template or no tokenizer; use generate with a plain prompt")
        messages, images, videos = prompt_input.without_media(messages)
        return prompt_input.Prompt(self.chat_template.render(messages, self.tokenizer.special_tokens), images, videos,
                                   image_tokens, video_tokens, "the conversation as its template writes it",
                                   is_rendered=True)

    def _admit(self, prompt, params, as_prompt):
        """Checks one request, whose Prompt is as_prompt(prompt); returns (token ids, Generation, MediaRuns). Raises
        PromptError, ParamsError."""
        self._n_requests += 1
        params = self.default_params if params is None else params
        self._check_params(params)
        ids, runs = self._prompts.ids(as_prompt(prompt))
        prompt_input.check_length(len(ids), self.max_seq_len - 1, "the prompt, before the first generated token,", runs)
        seed = request_seed(self.config.seed, self._n_requests) if params.seed is None else params.seed
        detokenizer = Detokenizer(self.tokenizer) if self.tokenizer else None
        return ids, Generation(ids, params, seed, self.eos_ids, detokenizer, self.max_seq_len, self._marks), runs

    def _check_params(self, params):
        if not isinstance(params, SamplingParams):
            raise ParamsError(f"params is of type {type(params).__name__}, expected SamplingParams")
        vocab = self.spec.vocab
        for name, ids in (("logit_bias", params.logit_bias or ()), ("stop_token_ids", params.stop_token_ids)):
            if outside := [i for i in ids if i >= vocab]:
                raise ParamsError(f"SamplingParams: {name} has token {outside[0]}, outside the vocabulary of {vocab}")
        for name in ("n_logprobs", "prompt_logprobs"):
            if getattr(params, name) > vocab:
                raise ParamsError(f"SamplingParams: {name} is {getattr(params, name)}, the vocabulary has {vocab}")
        if params.stop and self.tokenizer is None:
            raise ParamsError("SamplingParams: stop strings need a tokenizer, and the checkpoint has none; use "
                              "stop_token_ids")

    def _run(self, admitted):
        """Runs admitted requests to their end; returns the outputs, those refused already in their places."""
        waiting = [one for one in admitted if not isinstance(one, RequestOutput)]
        with self._running(waiting) as sequences, self._bar(len(admitted), "generating", unit="prompt") as bar:
            bar.update(len(admitted) - len(waiting))
            tasks = [sequence.task for sequence in sequences]
            n_done = 0
            while n_done < len(tasks):
                self._core.loop.step()
                n_now = sum(task.is_finished for task in tasks)
                if not bar.disable:
                    n_tokens = sum(len(task.output.token_ids) for task in tasks)
                    speed = n_tokens / max(bar.format_dict["elapsed"], 1e-9)
                    bar.set_postfix_str(f"{speed:.1f} tokens/s", refresh=False)
                    bar.update(n_now - n_done)
                n_done = n_now
        return [one if isinstance(one, RequestOutput) else one[1].output for one in admitted]

    def _stream(self, admitted):
        task = admitted[1]
        with self._running([admitted]):
            while True:
                if not task.is_finished:
                    self._core.loop.step()
                text, token_ids = task.piece()
                is_last = task.is_finished                      # while a piece is out, other calls may end the task
                if text or token_ids or is_last:
                    yield StreamPiece(text, token_ids, task.output.finish_reason)
                if is_last:
                    return

    @contextmanager
    def _running(self, admitted):
        """Submits (ids, task, media) each; whatever way the block is left, what has not ended by then is aborted."""
        sequences = []
        try:
            for one in admitted:
                sequences.append(self._core.loop.submit(*one))
            yield sequences
        finally:
            for sequence in sequences:
                self._core.loop.withdraw(sequence)
                if isinstance(sequence.task, Generation):
                    self._count(sequence)

    def _count(self, sequence):
        task, output = sequence.task, sequence.task.output
        if not task.is_finished:
            task.finish("abort")
        output.metrics.n_preemptions = sequence.n_preemptions
        self._counts["requests"] += 1
        self._counts["aborted" if output.finish_reason == "abort" else "finished"] += 1
        self._counts["prompt_tokens"] += len(output.prompt_token_ids)
        self._counts["generated_tokens"] += len(output.token_ids)

    def _thinking_marks(self):
        marks = ThinkingMarks.of(self.tokenizer)
        if marks is None:
            raise ConfigError(f"relaxed_acceptance holds while the model thinks, between {OPEN} and {CLOSE}: the "
                              + ("tokenizer lacks these tokens" if self.tokenizer else "checkpoint has no tokenizer")
                              + "; leave it None")
        return marks

    def _loading(self, n_bytes):
        return self._bar(n_bytes, "loading", unit="B", unit_scale=True)

    def _bar(self, total, what, **options):
        from tqdm import tqdm  # not needed to import the engine
        return tqdm(total=total, desc=what, disable=None if self.config.progress else True, leave=False, **options)


def _default_params(sampling):
    """SamplingParams from what generation_config.json sets; where it sets no limit, room for the least it asks for."""
    try:
        most = max(SamplingParams.max_tokens, sampling.get("min_tokens", 0))
        return SamplingParams(**{"max_tokens": most, **sampling})
    except ParamsError as error:
        raise ConfigError(f"generation_config.json: {error}") from error


def plan(model, memory_bytes=None, **arguments):
    """The MemoryPlan of a model under LLM arguments, from its config.json alone, and that of `draft` if there is one:
    needs no GPU and no weights.

    model         as LLM's, or the name of a preset ("gemma-4-31b"; engine/models/presets.py has all)
    memory_bytes  memory to plan with; None is this host's. device="cuda" plans bfloat16 and needs it given
    """
    config = EngineConfig(**arguments)
    if memory_bytes is not None and not (is_number(memory_bytes) and memory_bytes > 0):
        raise ConfigError(f"memory_bytes is {memory_bytes!r}, expected a number of bytes > 0")
    if model in PRESETS and not Path(model).exists():
        spec = preset(model)
    else:
        spec = describe(Config.load(resolve(model, files=("config.json",), progress=config.progress)))
    kind = lane_of(config.device, config.dtype)
    if kind == "cuda" and memory_bytes is None:
        raise ConfigError(f"plan for device {config.device!r} needs memory_bytes, the memory of the GPU planned for")
    draft = None
    if config.draft is not None:
        path = draft_path(config.draft, files=("config.json", "generation_config.json"), progress=config.progress)
        draft = describe_draft(path, spec)
    return plan_memory(spec, config, kind, memory_bytes, draft)
