"""Core: a model's weights, KV cache and step on one lane, ready to be scheduled; knows nothing of prompts or text."""

from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

from engine.assistant import Assistant
from engine.assistant_weights import load_assistant
from engine.config import EngineConfig
from engine.draft_inputs import DraftStager
from engine.draft_length import DraftControl, StepTimes
from engine.graph import GraphCache
from engine.kv_cache import KVCache
from engine.layer_scheduler import LayerScheduler
from engine.loop import Loop
from engine.memory_plan import MemoryPlan, plan_memory
from engine.models.spec import ModelSpec
from engine.scheduler import Scheduler
from engine.speculative import Speculation
from engine.step import Step
from engine.step_inputs import Stager
from engine.tensors import account_assistant, checked, checked_account, without_missing_media
from engine.vision.encoder import VisionEncoder
from engine.vision.encoder_cache import EncoderCache
from engine.weights import Weights, load
from engine.workspace import Workspace


@contextmanager
def no_bar(n_bytes):
    """A bar that shows nothing."""
    yield SimpleNamespace(update=lambda n_bytes: None)


@dataclass
class Core:
    """What a ModelSpec becomes under an EngineConfig on a lane.

    spec           of a checkpoint without a vision part, one of text alone
    encoder_cache  None for a model of text
    draft          the Assistant, or None; `control` says how many tokens it drafts
    """

    spec: ModelSpec
    config: EngineConfig
    lane: object
    plan: MemoryPlan
    weights: Weights
    kv_cache: KVCache
    workspace: Workspace
    graphs: GraphCache
    step: Step
    scheduler: Scheduler
    loop: Loop
    encoder_cache: EncoderCache | None = None
    draft: Assistant | None = None
    control: DraftControl | None = None

    @classmethod
    def open(cls, spec, config, lane, checkpoint, bar=no_bar, draft=None):
        """Plans the memory, loads the weights, takes KV cache and workspace.

        checkpoint  what has `tensors` and `read_range`, as loaders.safetensors.Checkpoint
        bar         bar(n_bytes) is a context of something with update(n_bytes), as tqdm's, for the loading
        draft       (AssistantSpec, its checkpoint), where `config` names a draft model
        Raises ConfigError, CheckpointError, MemoryPlanError.
        """
        spec = without_missing_media(spec, checkpoint.tensors)
        draft_spec, draft_checkpoint = draft or (None, None)
        with lane.running():
            if lane.stages:
                lane.ops.check(spec)
                if draft:
                    lane.ops.check(draft_spec)
            accounts = checked_account(spec, checkpoint.tensors, config.ple)       # before anything large is allocated
            n_bytes = sum(checkpoint.tensors[name].n_bytes for name in accounts.names.values())
            if draft:
                tensors = draft_checkpoint.tensors
                names = checked(account_assistant(draft_spec, tensors)).names
                n_bytes += sum(tensors[name].n_bytes for name in names.values())
            plan = plan_memory(spec, config, lane.name, lane.memory_bytes(), draft_spec)
            with bar(n_bytes) as loading:
                weights = load(spec, checkpoint, accounts, lane, loading.update)
                draft_weights = draft and load_assistant(draft_spec, draft_checkpoint, lane, loading.update)
            kv_cache = KVCache([pool.spec for pool in plan.pools], [pool.n_pages for pool in plan.pools],
                               config.page_size, lane)
            others = [Assistant.scratch_size(draft_spec, config.max_seqs, lane.ops)] if draft else ()
            workspace = Workspace(spec, plan.max_step_tokens, config.max_slots, lane, others)
            encoder_cache = None
            if spec.media:
                encoder = VisionEncoder(spec, weights.vision, lane, workspace.scratch)
                encoder_cache = EncoderCache(encoder, plan.n_soft_rows, spec.hidden, lane)
            layers = LayerScheduler(spec, weights, kv_cache, workspace, lane, encoder_cache and encoder_cache.soft)
            assistant = control = speculation = draft_stager = None
            if draft:
                rules = config.draft_sampling == "sample", config.relaxed_acceptance
                assistant = Assistant(draft_spec, draft_weights, layers, config.max_seqs, lane, rules[0],
                                      workspace.scratch)
                control = DraftControl(config.n_draft_tokens, StepTimes(spec, draft_spec, lane.name,
                                                                        lane.dtype.itemsize))
                speculation = Speculation(assistant, config.max_seqs, workspace.max_logit_rows, config.most_drafts,
                                          lane, *rules)
                draft_stager = DraftStager(assistant.attentions, config.page_size, plan.max_seq_len, *rules)
            stager = None
            if lane.stages:
                stager = Stager(spec, kv_cache, plan.max_seq_len, plan.max_step_tokens, config.max_seqs, lane,
                                has_rows=weights.per_layer_rows is not None, longest_run=plan.longest_run,
                                max_slots=workspace.max_logit_rows, drafts=draft_stager)
            can_capture = lane.has_graphs and config.gemm == "own"
            graphs = GraphCache(lane, min(config.max_seqs, plan.max_step_tokens), can_capture and bool(config.graphs),
                                config.most_drafts)
            step = Step(layers, workspace, lane, stager, graphs, encoder_cache, speculation)
        scheduler = Scheduler(kv_cache, config.max_seqs, config.max_batch_tokens, plan.max_step_tokens, encoder_cache)
        lookup = (spec.media.pad, spec.media.unread) if spec.media else (0, ())
        loop = Loop(step, scheduler, kv_cache, *lookup, control)
        return cls(spec, config, lane, plan, weights, kv_cache, workspace, graphs, step, scheduler, loop, encoder_cache,
                   assistant, control)
