"""What the public interface returns."""

from dataclasses import dataclass, field


@dataclass
class RequestMetrics:
    """Seconds from submission, and counts. A time is None when the request ended before reaching it."""

    first_token_s: float | None = None
    total_s: float | None = None
    n_prompt_tokens: int = 0
    n_generated_tokens: int = 0
    n_preemptions: int = 0


@dataclass
class RequestOutput:
    """The result of one prompt.

    text              generated text without special tokens, up to a stop string; "" when there is no tokenizer
    token_ids         generated ids, an end-of-text or stop id included
    finish_reason     "stop" (end-of-text, stop id or string) | "length" | "abort" | "error"
    error             the RawgemError when finish_reason is "error", else None
    logprobs          per generated token {token id: log-probability} of the chosen token and the n_logprobs likeliest,
                      of the model's own distribution (before penalties, temperature and filters); None if not asked for
    prompt_logprobs   the same per prompt token, None for the first; None if not asked for
    """

    text: str = ""
    token_ids: list = field(default_factory=list)
    prompt_token_ids: list = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    logprobs: list | None = None
    prompt_logprobs: list | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)


@dataclass
class StreamPiece:
    """What a stream has to add: text and ids since the last piece; finish_reason is None until the last one."""

    text: str
    token_ids: list
    finish_reason: str | None


@dataclass
class ForwardOutput:
    """What LLM.forward computed, one entry a row, float32.

    logits         [n_returned, vocab], after softcapping
    hidden_states  None, [n_tokens, hidden] after the final norm, or with "layers" [n_layers + 1, n_tokens, hidden]
    """

    logits: list
    hidden_states: list | None
