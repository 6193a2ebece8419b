"""Sequence: one request as the scheduler and the cache see it. What becomes of its logits is its task's business."""


class Sequence:
    """Tokens known so far, and how many of them are in the KV cache.

    number      submission order; the newest is preempted first
    tokens      prompt and generated token ids
    n_cached    how many of them have their K and V committed
    next_logit  the next position whose logits the task still wants
    page_lists  pages held, one PageList a pool
    """

    def __init__(self, number, tokens, task, page_lists):
        self.number, self.tokens, self.task, self.page_lists = number, tokens, task, page_lists
        self.n_cached = 0
        self.next_logit = task.first_logit
        self.n_preemptions = 0

    @property
    def n_left(self):
        """Known tokens not computed yet; 1 while decoding."""
        return len(self.tokens) - self.n_cached
