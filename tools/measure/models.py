"""Which model a command measures: a preset's shape with random weights, or a checkpoint directory."""

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from measure.cases import whole
from measure.report import BenchError


@dataclass(frozen=True)
class Model:
    """A ModelSpec, and where its weights come from.

    name      of the preset, or of the directory
    n_layers  where it is a slice: how many layers, else None
    config    what its config.json holds
    path      the checkpoint directory, None for random weights
    """

    name: str
    spec: object
    n_layers: int | None
    config: dict
    path: Path | None = None

    def checkpoint(self, seed):
        """The context of what Core.open takes."""
        from loaders.safetensors import Checkpoint
        from measure.random_weights import RandomCheckpoint
        return nullcontext(RandomCheckpoint(self.spec, seed)) if self.path is None else Checkpoint.open(self.path)


def kind_of(attention):
    """How rows name the kind of an AttentionSpec."""
    if attention.chunk is not None:
        return "chunked"
    return "global" if attention.window is None else "local"


def add_model_arguments(parser):
    parser.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint, in the place of a preset")
    parser.add_argument("--layers", type=whole(1), metavar="N", help="only the first N layers of each preset")


def add_ple(parser):
    parser.add_argument("--ple", choices=["device", "host"], default="device",
                        help="where the table of per-layer inputs is, of models that have one")


def models_of(args, default):
    """[Model] of --preset, --model and --layers; without any the presets `default`. Raises BenchError."""
    from engine.models import describe
    from loaders.config import Config
    if args.model is not None:
        if args.preset or args.layers:
            raise BenchError("--model DIR came with --preset or --layers, which choose a shape for random weights")
        config = Config.load(args.model)
        return [Model(args.model.resolve().name, describe(config), None, {}, args.model)]
    models = []
    for name in args.preset or default:
        config, spec = text_of(name)
        if args.layers:
            config, spec = sliced(name, config, spec, args.layers)
        models.append(Model(name, spec, args.layers, config))
    return models


def text_of(preset_name):
    """(config.json, ModelSpec) of a preset without its vision part: what is measured here reads text."""
    from engine.models import describe
    from engine.models.presets import PRESETS
    from loaders.config import Config
    config = {key: value for key, value in PRESETS[preset_name].items() if key != "vision_config"}
    return config, describe(Config(config, preset_name))


def sliced(name, config, spec, n_layers):
    """(config.json, ModelSpec) of the first n_layers, of true width."""
    from engine.models import describe
    from loaders.config import Config
    from measure.random_weights import slice_of
    spec, config = slice_of(spec, n_layers), deepcopy(config)
    text = config.get("text_config", config)
    text["num_hidden_layers"] = n_layers
    if "layer_types" in text:
        text["layer_types"] = text["layer_types"][:n_layers]
    if text.get("num_kv_shared_layers"):
        text["num_kv_shared_layers"] = sum(layer.kv_from is not None for layer in spec.layers)
    if describe(Config(config, name)) != spec:
        raise BenchError(f"{name}: its config.json cannot say {n_layers} layers of it")
    return config, spec
