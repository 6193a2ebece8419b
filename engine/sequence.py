"""Sequence: one request as the scheduler and the cache see it. What becomes of its logits is its task's business."""

from dataclasses import dataclass

from engine.draft_length import DraftStats


@dataclass(frozen=True)
class MediaRun:
    """Where the soft tokens of a picture, or of one frame of a video, stand in a sequence.

    begin    position of the first; the sequence's tokens hold placeholders there
    picture  engine.vision.picture.Picture: its pixels, n_tokens and key
    """

    begin: int
    picture: object

    @property
    def end(self):
        return self.begin + self.picture.n_tokens


class Sequence:
    """Tokens known so far, and how many of them are in the KV cache.

    number      submission order; the newest is preempted first
    tokens      prompt and generated token ids
    n_cached    how many of them have their K and V committed
    next_logit  the next position whose logits the task still wants
    page_lists  pages held, one PageList a pool
    media       MediaRuns by position, all of them in the prompt
    drafts      token ids that a draft model expects behind `tokens`; there are some only while decoding
    draft_rows  where drafts are drawn: the row of each in the probabilities that they were drawn from
    draft_stats DraftStats: how drafts have fared
    """

    def __init__(self, number, tokens, task, page_lists, media=()):
        self.number, self.tokens, self.task, self.page_lists = number, tokens, task, page_lists
        self.media = tuple(media)
        self.n_cached = 0
        self.next_logit = task.first_logit
        self.n_preemptions = 0
        self.drafts, self.draft_rows, self.draft_stats = [], (), DraftStats()

    @property
    def n_left(self):
        """Known tokens not computed yet, drafts not counted; 1 while decoding."""
        return len(self.tokens) - self.n_cached
