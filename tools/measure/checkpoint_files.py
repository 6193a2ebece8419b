"""Random checkpoints as files, in the released layout: safetensors shards, an index, config.json."""

import json
import os
import shutil
import tempfile
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np

from loaders.safetensors import INDEX_FILE, SINGLE_FILE
from measure.report import BenchError

FOLDER = Path(tempfile.gettempdir()) / f"rawgem-bench-{os.getuid()}"    # where they are kept for the next run
SHARD_BYTES = 4_000_000_000     # about what released shards have
PART = 1 << 24                  # elements drawn at a time
SPARE_BYTES = 1 << 28           # of the disk, to leave


def written(model, folder, seed, shard_bytes=SHARD_BYTES, update=lambda n_bytes: None):
    """The directory under `folder` with a Model's random weights; written unless it is there, whole.

    update  called with the bytes written, as they are
    Raises BenchError where the disk has no room.
    """
    slice_name = f"-{model.n_layers}-layers" if model.n_layers else ""
    directory = Path(folder) / f"{model.name}{slice_name}-seed-{seed}"
    if not is_written(directory, model.config):
        write(directory, model, seed, shard_bytes, update)
    return directory


def is_written(directory, config):
    """Whether a directory holds a checkpoint of that config.json, which is written last."""
    path = Path(directory) / "config.json"
    try:
        return json.loads(path.read_text()) == json.loads(json.dumps(config))
    except (OSError, ValueError):
        return False


def write(directory, model, seed, shard_bytes=SHARD_BYTES, update=lambda n_bytes: None):
    """Writes shards of at most shard_bytes (a larger tensor has one to itself), an index where there are several, and
    last config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in (directory / "config.json", directory / INDEX_FILE, *directory.glob("*.safetensors")):
        file.unlink(missing_ok=True)                    # of a write that did not end, or of another shape
    with model.checkpoint(seed) as checkpoint:
        n_bytes = sum(tensor.n_bytes for tensor in checkpoint.tensors.values())
        free = shutil.disk_usage(directory).free
        if n_bytes + SPARE_BYTES > free:
            raise BenchError(f"{directory}: {model.name} takes {n_bytes} bytes, {free} are free there; --layers N "
                             "writes less, --folder DIR elsewhere")
        shards = split({name: tensor.n_bytes for name, tensor in checkpoint.tensors.items()}, shard_bytes)
        weight_map = {}
        for number, names in enumerate(shards, 1):
            file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            write_shard(directory / file, checkpoint, names, update)
            weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": n_bytes}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=1))
    (directory / "config.json").write_text(json.dumps(model.config, indent=1))


def split(sizes, most_bytes):
    """[[name]] in order, the sizes of each list together at most most_bytes where they have more than one name."""
    shards, left = [], 0
    for name, n_bytes in sizes.items():
        if not shards or n_bytes > left:
            shards.append([])
            left = most_bytes
        shards[-1].append(name)
        left -= n_bytes
    return shards


def write_shard(path, checkpoint, names, update):
    """One safetensors file with the tensors `names` in bfloat16, drawn and written part by part."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        tensor = checkpoint.tensors[name]
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + tensor.n_bytes]}
        at += tensor.n_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                     # the data is aligned, as the format's own writer has it
    buffer = np.empty(PART, ml_dtypes.bfloat16)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            size = prod(checkpoint.tensors[name].shape)
            for begin in range(0, size, PART):
                part = buffer[:min(PART, size - begin)]
                checkpoint.read_range(name, begin, begin + part.size, part)
                file.write(part.view(np.uint8))
                update(part.nbytes)
