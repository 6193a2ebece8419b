"""VisionEncoder: pictures to the soft tokens that stand for them among a model's embeddings."""

from engine.models.vision_spec import BlockEmbedderSpec, Gemma4TowerSpec, SiglipSpec
from engine.vision.block_embedder import BlockEmbedder
from engine.vision.gemma4_tower import Gemma4Tower
from engine.vision.inputs import VisionStager
from engine.vision.patches import grid
from engine.vision.runs import run_patches, whole_pages
from engine.vision.siglip import SiglipTower
from engine.vision.workspace import VisionWorkspace
from engine.workspace import Scratch

KINDS = {Gemma4TowerSpec: Gemma4Tower, SiglipSpec: SiglipTower, BlockEmbedderSpec: BlockEmbedder}


class VisionEncoder:
    """Runs pictures, any number and size as one ragged batch, through the tower of a ModelSpec and its projector. All
    that it allocates it has after __init__. Called within lane.running().

    scratch      of a Workspace of the same model, as the two take turns; None takes one of its own
    max_patches  of a run, each picture counted in whole pages; more pictures take several runs
    """

    def __init__(self, spec, weights, lane, scratch=None, max_patches=None):
        tower = spec.media.tower
        kind = _kind(tower)
        self.spec, self.tower, self.weights, self.ops = spec, tower, weights, lane.ops
        self.max_patches = whole_pages(max_patches) if max_patches else run_patches(tower)
        if scratch is None:
            scratch = Scratch.of(lane.ops.vision_scratch_size(tower, spec.hidden, self.max_patches), lane)
        self._workspace = VisionWorkspace(tower, spec.hidden, self.max_patches, scratch, lane)
        self._stager = VisionStager(kind, tower, self.max_patches, lane)
        self._layers = kind(tower, weights, self._workspace, lane)
        self._norm_offset = 0.0 if lane.folds_norm_offset else spec.norm_offset
        self._soft_eps = tower.soft_eps if type(tower) is BlockEmbedderSpec else tower.norm_eps

    @staticmethod
    def n_bytes(spec, itemsize):
        """What a VisionEncoder takes beside its weights and scratch: activations of `itemsize` bytes, its inputs."""
        tower = spec.media.tower
        max_patches = run_patches(tower)
        return VisionWorkspace.n_bytes(tower, spec.hidden, max_patches, itemsize) \
            + VisionStager.n_bytes(_kind(tower), tower, max_patches, itemsize)

    def use(self, ops):
        """Launches the ops of that table from now on: the lane's, or one that watches them."""
        self.ops = ops
        self._layers.use(ops)

    def encode(self, pictures, soft, rows, observe=None):
        """Writes the soft tokens of pictures[i] to soft[rows[i]].

        soft  [n, hidden] on the lane; rows not named stay as they are
        rows  a host int32 array [n_tokens] for each picture; no row twice
        observe(name, array)  called with intermediate states, arrays on the lane that later ops overwrite: "hidden"
                              before the first layer and after each, "features" behind the last and its norm or pooling
        """
        for run in self._runs(pictures):
            self.run(self._stager(pictures[run], rows[run]), soft, observe)

    def run(self, inputs, soft, observe=None):
        """Writes the soft tokens of one run, a VisionInputs of up to max_patches patches, to soft[inputs.rows]."""
        ops, rows = self.ops, self._workspace.rows
        states = self._layers(inputs, observe or _ignore)
        normed, projected = rows("normed", *states.shape), rows("projected", len(states), self.spec.hidden)
        ops.rms_norm(states, self.weights.soft_norm, self._soft_eps, self._norm_offset, normed)
        ops.linear(normed, self.weights.projection, projected, self._workspace.scratch)
        ops.place_rows(projected, inputs.source, inputs.rows, soft)

    def _runs(self, pictures):
        """Slices of `pictures`, as many as fit max_patches each."""
        begin, n = 0, 0
        for i, picture in enumerate(pictures):
            n_rows, n_columns = grid(picture.pixels, self.tower.patch_side)
            size = whole_pages(n_rows * n_columns)
            assert 0 < size <= self.max_patches, f"{n_rows} x {n_columns} patches in runs of {self.max_patches}"
            if n + size > self.max_patches:
                yield slice(begin, i)
                begin, n = i, 0
            n += size
        if n:
            yield slice(begin, len(pictures))


def _kind(tower):
    """The class that runs a tower."""
    if type(tower) not in KINDS:
        raise TypeError(f"no branch for {type(tower).__name__}")
    return KINDS[type(tower)]


def _ignore(name, array):
    """Observes nothing."""
