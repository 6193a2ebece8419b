"""MemoryPlan: what fits where, computed from shapes alone, before a byte is allocated."""

import os
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from engine.assistant import Assistant
from engine.assistant_weights import weights_bytes as draft_weights_bytes
from engine.backend import DTYPES, ops_of
from engine.draft_inputs import DraftStager
from engine.errors import ConfigError, MemoryPlanError
from engine.floor import floor
from engine.kv_cache import PoolSpec, pool_specs
from engine.speculative import Speculation
from engine.step_inputs import Stager
from engine.tensors import n_weights
from engine.vision.encoder import VisionEncoder
from engine.vision.encoder_cache import EncoderCache
from engine.workspace import Workspace

HOST_SHARE = 4      # by default the KV cache takes a quarter of the host memory that is left: other programs live there
# Control groups, version 2 and 1: the root, files with a group's limit and use, and what memory.stat calls the part of
# the use that is file cache, which the kernel drops when asked for memory.
CGROUPS = (("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
           ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))


@dataclass(frozen=True)
class PoolPlan:
    """One KV pool. page_bytes counts K and V of all its layers; seq_pages is what one longest sequence holds, and
    run_pages what it takes more for as long as a step computes its longest picture."""

    spec: PoolSpec
    n_pages: int
    page_size: int
    page_bytes: int
    seq_pages: int
    run_pages: int = 0

    @property
    def kind(self):
        return self.spec.kind

    @property
    def n_bytes(self):
        return self.n_pages * self.page_bytes

    @property
    def token_bytes(self):
        return self.page_bytes // self.page_size

    @property
    def n_tokens(self):
        return self.n_pages * self.page_size


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of weights, KV pools and workspace in `memory_bytes`; the longest sequence accepted is max_seq_len, and at
    most max_seqs run at once.

    step_bytes, full_step_bytes  what a step reads that decodes a token of one sequence of that length, and of all
                                 n_full_seqs: the weights it touches, K and V
    max_step_tokens              tokens of a step at most: max_batch_tokens, or more where a picture is never split
    longest_run                  soft tokens of the largest picture that is never split; 1 where pictures may be
    vision_bytes                 buffers of the vision encoder
    draft_bytes                  weights of the draft model; draft_workspace_bytes: its buffers
    n_soft_rows                  soft tokens that the encoder cache has room for, of soft_row_bytes each
    """

    memory_bytes: int
    weights_bytes: int
    workspace_bytes: int
    pools: tuple
    max_seq_len: int
    max_seqs: int
    step_bytes: int = 0
    full_step_bytes: int = 0
    max_step_tokens: int = 0
    longest_run: int = 1
    vision_bytes: int = 0
    n_soft_rows: int = 0
    soft_row_bytes: int = 0
    draft_bytes: int = 0
    draft_workspace_bytes: int = 0

    @property
    def encoder_cache_bytes(self):
        return self.n_soft_rows * self.soft_row_bytes

    @property
    def kv_bytes(self):
        return sum(pool.n_bytes for pool in self.pools)

    @property
    def free_bytes(self):
        return (self.memory_bytes - self.weights_bytes - self.workspace_bytes - self.vision_bytes
                - self.encoder_cache_bytes - self.draft_bytes - self.draft_workspace_bytes - self.kv_bytes)

    @property
    def n_full_seqs(self):
        """How many sequences of max_seq_len tokens run side by side."""
        return min(self.max_seqs, *((pool.n_pages - pool.run_pages) // pool.seq_pages for pool in self.pools))

    def __str__(self):
        rows = [("weights", self.weights_bytes, "")]
        for pool in self.pools:
            rows.append((f"KV {pool.kind}", pool.n_bytes, f"{pool.n_pages} pages of {pool.page_size}: {pool.n_tokens} "
                         f"tokens, {pool.token_bytes} bytes a token in {len(pool.spec.layers)} layers "
                         f"({pool.spec.n_kv_heads} KV heads of {pool.spec.head_dim})"
                         + (f", which {len(pool.spec.shared)} more read" if pool.spec.shared else "")))
        rows.append(("workspace", self.workspace_bytes, ""))
        if self.n_soft_rows:
            rows += [("vision encoder", self.vision_bytes, ""),
                     ("encoder cache", self.encoder_cache_bytes, f"{self.n_soft_rows} soft tokens of pictures")]
        if self.draft_bytes:
            rows += [("draft model", self.draft_bytes, ""), ("drafting", self.draft_workspace_bytes, "")]
        rows.append(("free", self.free_bytes, ""))
        lines = [f"{name:<18}{n_bytes / 2**20:>12.1f} MiB  {note}".rstrip() for name, n_bytes, note in rows]
        lines.append(f"longest sequence {self.max_seq_len} tokens; {self.n_full_seqs} of that length at once")
        lines.append(f"a step of 1 token reads at most {self.step_bytes / 2**20:.1f} MiB of weights, K and V; a step "
                     f"of all {self.n_full_seqs} sequences {self.full_step_bytes / 2**20:.1f} MiB")
        return "\n".join(lines)


def plan_memory(spec, config, kind, memory_bytes=None, draft=None):
    """The MemoryPlan of a ModelSpec under an EngineConfig on the lane named `kind`.

    memory_bytes  what there is to plan with, of which `memory_fraction` is used; None is this host's memory, of which
                  the KV cache takes at most a quarter by default
    draft         the AssistantSpec of the model that drafts, or None
    Raises MemoryPlanError when weights, workspace and one sequence do not fit, ConfigError for an impossible length.
    """
    limit = config.max_seq_len or spec.max_positions
    if limit > spec.max_positions:
        raise ConfigError(f"max_seq_len is {limit}, the model's max_position_embeddings is {spec.max_positions}")
    itemsize, specs = DTYPES[kind].itemsize, pool_specs(spec)
    weights_bytes, ops = n_weights(spec, config.ple) * itemsize, ops_of(kind, config.gemm)
    longest_run, max_step_tokens = step_limits(spec, config, limit)
    others = [Assistant.scratch_size(draft, config.max_seqs, ops)] if draft else ()
    workspace_bytes = Workspace.n_bytes(spec, max_step_tokens, config.max_slots, itemsize, ops, others)
    max_slots, rules = min(config.max_slots, max_step_tokens), (config.draft_sampling == "sample",
                                                                config.relaxed_acceptance)
    if kind != "cpu":
        attentions = dict.fromkeys(layer.attention for layer in draft.seen_layers) if draft else ()
        drafts = DraftStager(dict(enumerate(attentions)), config.page_size, limit, *rules)
        workspace_bytes += Stager.n_bytes(specs, max_step_tokens, config.max_seqs, limit, config.page_size,
                                          spec.per_layer_width * itemsize if config.ple == "host" else 0, longest_run,
                                          max_slots, drafts.n_bytes(config.max_seqs, max_slots) if draft else 0)
    vision_bytes = n_soft_rows = 0
    if spec.media:
        vision_bytes = VisionEncoder.n_bytes(spec, itemsize)
        n_soft_rows = EncoderCache.n_rows(spec, max_step_tokens, min(spec.media.tower.most_tokens, limit),
                                          config.encoder_cache_bytes, itemsize)
    draft_bytes = draft_workspace_bytes = 0
    if draft:
        draft_bytes = draft_weights_bytes(draft, itemsize)
        draft_workspace_bytes = Assistant.n_bytes(draft, config.max_seqs, itemsize, rules[0])
        draft_workspace_bytes += Speculation.n_bytes(draft.vocab, config.max_seqs, max_slots, config.most_drafts,
                                                     rules[0])
    memory = host_memory_left() if memory_bytes is None else int(memory_bytes * config.memory_fraction)
    working_bytes = workspace_bytes + draft_workspace_bytes + vision_bytes + n_soft_rows * spec.hidden * itemsize
    left = memory - weights_bytes - draft_bytes - working_bytes
    kv_bytes = config.kv_cache_bytes or (left // HOST_SHARE if memory_bytes is None else left)
    if left <= 0 or kv_bytes > left:
        came = f"kv_cache_bytes of {kv_bytes}" if config.kv_cache_bytes else "nothing of it left for the KV cache"
        n_weight_bytes = weights_bytes + draft_bytes
        raise MemoryPlanError(f"{memory} bytes cannot hold {n_weight_bytes} of weights and {working_bytes} "
                              f"of workspace{' and encoder cache' if spec.media else ''} with {came}; lower "
                              f"kv_cache_bytes, {'encoder_cache_bytes, ' if spec.media else ''}max_batch_tokens"
                              f"{', n_draft_tokens' if draft else ''} or max_seqs, or use a larger memory")
    page_bytes = [pool.token_bytes(itemsize) * config.page_size for pool in specs]
    fits = _longest_that_fits(specs, config.page_size, page_bytes, kv_bytes, limit, longest_run)
    if fits < (config.max_seq_len or 1):
        raise MemoryPlanError(f"a KV cache of {kv_bytes} bytes holds one sequence of {fits} tokens, max_seq_len is "
                              f"{config.max_seq_len or 'at least 1'}; raise kv_cache_bytes, or lower max_seq_len "
                              "or page_size")
    seq_pages, run_pages = ([pool.pages_needed(fits, config.page_size, n) for pool in specs] for n in (1, longest_run))
    n_pages = _size_pools(specs, config, page_bytes, kv_bytes, fits, seq_pages, run_pages, max_step_tokens)
    pools = tuple(PoolPlan(pool, n, config.page_size, n_bytes, held, at_once - held) for pool, n, n_bytes, held, at_once
                  in zip(specs, n_pages, page_bytes, seq_pages, run_pages, strict=True))
    plan = MemoryPlan(memory, weights_bytes, workspace_bytes, pools, fits, config.max_seqs,
                      max_step_tokens=max_step_tokens, longest_run=longest_run, vision_bytes=vision_bytes,
                      n_soft_rows=n_soft_rows, soft_row_bytes=spec.hidden * itemsize if spec.media else 0,
                      draft_bytes=draft_bytes, draft_workspace_bytes=draft_workspace_bytes)
    one, full = (floor(spec, [(n, 1, fits)], itemsize, itemsize).bytes for n in (1, plan.n_full_seqs))
    return replace(plan, step_bytes=one, full_step_bytes=full)


def step_limits(spec, config, max_seq_len):
    """(soft tokens of the longest run that is never split, or 1; tokens of a step at most).

    Where a picture is never split, it may come to a step beside decodes of all other sequences.
    """
    if not spec.has_blocks:
        return 1, config.max_batch_tokens
    longest_run = min(spec.media.tower.most_tokens, max_seq_len)
    return longest_run, max(config.max_batch_tokens, config.max_seqs + longest_run)


def _longest_that_fits(specs, page_size, page_bytes, kv_bytes, limit, longest_run):
    """The largest n <= limit such that one sequence of n tokens, pictures in it, fits kv_bytes; 0 if none."""
    def fits(n):
        pages = [pool.pages_needed(n, page_size, longest_run) for pool in specs]
        return sum(n_pages * size for n_pages, size in zip(pages, page_bytes, strict=True)) <= kv_bytes
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _size_pools(specs, config, page_bytes, kv_bytes, max_seq_len, seq_pages, base, max_step_tokens):
    """Pages of each pool: `base`, one longest sequence and its longest picture, first, then up to max_seqs of them.
    Where that is more than there is, local pools get at most half of the rest: short sequences need as many pages of
    one kind as of the other."""
    size = config.page_size
    # Beyond its window or chunk a local pool also holds, for a moment, the tokens of the step at hand.
    most = [min(config.max_seqs * -(-max_seq_len // size),
                config.max_seqs * (pages + 1) + -(-max_step_tokens // size)) if pool.is_local else
            config.max_seqs * pages for pool, pages in zip(specs, seq_pages, strict=True)]
    pages, rest = list(base), kv_bytes - sum(n * b for n, b in zip(base, page_bytes, strict=True))
    local = [i for i, pool in enumerate(specs) if pool.is_local]
    others = [i for i, pool in enumerate(specs) if not pool.is_local]
    for group, share in ((local, rest // 2 if others else rest), (others, None), (local, None)):
        wanted = sum((most[i] - pages[i]) * page_bytes[i] for i in group)
        granted = min(wanted, rest if share is None else share)
        for i in group:
            more = (most[i] - pages[i]) * granted // wanted if wanted else 0
            pages[i] += more
            rest -= more * page_bytes[i]
    return pages


def host_memory_left():
    """Bytes this process may still take: what the machine has available, within what its control groups leave."""
    meminfo = dict(line.split()[:2] for line in _read("/proc/meminfo").splitlines())
    if "MemAvailable:" in meminfo:
        left = int(meminfo["MemAvailable:"]) * 1024
    elif hasattr(os, "sysconf"):                        # not Linux: sysconf knows the total
        left = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        raise MemoryPlanError("this system does not say how much memory it has; plan(..., memory_bytes=...) works, and "
                              "the engine runs on Linux and macOS")
    groups = {"/"}                                      # in a container the own group is often mounted as the root
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            groups.update(map(str, (PurePosixPath(path), *PurePosixPath(path).parents)))
    for group in groups:
        for root, limit_file, used_file, cached_key in CGROUPS:
            limit, used = (_read(f"{root}{group}/{file}").strip() for file in (limit_file, used_file))
            if limit.isdecimal() and used.isdecimal():          # "max" is no limit
                stat = _read(f"{root}{group}/memory.stat")
                cached = dict(line.split() for line in stat.splitlines()).get(cached_key, 0)
                left = min(left, int(limit) - int(used) + int(cached))
    return left


def _read(path):
    try:
        return Path(path).read_text()
    except OSError:
        return ""
