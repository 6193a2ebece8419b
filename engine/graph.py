"""CUDA graphs of decode steps: one for each bucket of batch sizes and of drafts, captured once, then replayed.

A graph repeats the same launches with the same arguments, so whatever differs from step to step must be in device
memory at fixed addresses. A batch is padded to the bucket's size.
"""

from bisect import bisect_left


def bucket_sizes(max_seqs):
    """Batch sizes that get a graph: 1, 2, 4, then multiples of 8 below max_seqs, and max_seqs itself. Numbers of drafts
    that do are the same, and 0."""
    return (*(n for n in (1, 2, 4) if n < max_seqs), *range(8, max_seqs, 8), max_seqs)


class GraphCache:
    """Runs steps, by graph where it can.

    enabled   False runs every step eagerly
    failures  {bucket: why it could not be captured}; such a bucket runs eagerly for good
    """

    def __init__(self, lane, max_seqs, enabled=True, most_drafts=0):
        self.sizes, self.enabled, self.failures = bucket_sizes(max_seqs), enabled, {}
        self._draft_sizes = (0, *bucket_sizes(most_drafts)) if most_drafts else (0,)
        self._lane, self._warm, self._captured = lane, set(), {}

    def bucket(self, n_seqs):
        """The smallest size that holds n_seqs sequences."""
        return self.sizes[bisect_left(self.sizes, n_seqs)]

    def draft_bucket(self, n_drafts):
        """The smallest number of drafts a sequence, among those that get a graph, that is n_drafts at least."""
        return self._draft_sizes[bisect_left(self._draft_sizes, n_drafts)]

    def run(self, bucket, launch):
        """Does what launch() does.

        bucket  what the graph is kept under: anything under which launch() always launches the same
        launch  launches kernels on the lane's stream and nothing else: no copy from the host, no allocation

        The first run of a bucket is eager: kernels compile, modules load. The second captures, and from then on the
        graph is replayed.
        """
        if bucket not in self._captured:
            if not self.enabled or bucket not in self._warm or bucket in self.failures:
                launch()
                self._warm.add(bucket)
                return
            try:
                self._captured[bucket] = self._lane.capture(launch)
            except Exception as error:                      # the step must go on, and eagerly it can
                self.failures[bucket] = f"{type(error).__name__}: {error}"
                launch()
                return
        self._captured[bucket].launch(self._lane.stream)

    def __str__(self):
        """For explain(): which buckets are captured, which are not and why."""
        if not self.enabled:
            return "CUDA graphs: off"
        captured = ", ".join(map(str, self._captured)) or "none yet"
        return (f"CUDA graphs: {captured} of {', '.join(map(str, self.sizes))} sequences captured"
                + "".join(f"; {bucket} runs eagerly ({reason})" for bucket, reason in self.failures.items()))
