"""Model name → directory: a local one as it is, a Hugging Face repository through its download cache."""

import os
import re
import sys
from pathlib import Path

from loaders.errors import CheckpointError

WHAT_WE_READ = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
REPO = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@\s]+))?")      # owner/name or owner/name@revision


def resolve(model, *, files=WHAT_WE_READ, progress=True):
    """The checkpoint directory of `model`, downloaded first where that is needed.

    model       an existing directory, or "owner/name" or "owner/name@revision" on the Hugging Face hub. HF_HUB_OFFLINE,
                HF_HOME and HF_TOKEN work as that library documents them
    files       patterns of the files wanted; a plan needs config.json only
    progress    show download bars, if stderr is a terminal
    Raises CheckpointError, which says what to do.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise CheckpointError(f"model is of type {type(model).__name__}, expected a directory or a repo id")
    name = os.fspath(model)
    path = Path(name).expanduser()
    if name and path.is_dir():          # Path("") is the working directory
        return path
    if path.is_file():
        raise CheckpointError(f"{name}: is a file, expected a checkpoint directory; try {path.parent}")
    repo = REPO.fullmatch(name)
    if repo is None:
        raise CheckpointError(f"{name!r}: no such directory, nor a name like owner/name or owner/name@revision, "
                              "which would be downloaded from huggingface.co")
    return _download(repo["id"], repo["revision"], list(files), quiet=not (progress and sys.stderr.isatty()))


def _download(repo_id, revision, files, quiet):
    """snapshot_download, with each way it fails turned into a CheckpointError."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    was_quiet = are_progress_bars_disabled()
    if quiet and not was_quiet:
        disable_progress_bars()
    try:
        # By HF_HUB_OFFLINE alone, version 1.33 asks the hub for the files of a commit all the same.
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files, ignore_patterns=["*/*"],
                                      local_files_only=constants.HF_HUB_OFFLINE))
    except GatedRepoError as error:
        raise CheckpointError(f"{repo_id}: asks for a licence to be accepted; do that on "
                              f"https://huggingface.co/{repo_id}, then `hf auth login` or set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{repo_id}: no such directory here, and no such repository on huggingface.co, or a "
                              "private one; check the name, or `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repo_id}: has no revision {revision}; expected a branch, a tag or a commit") from error
    except LocalEntryNotFoundError as error:
        why = ("HF_HUB_OFFLINE is set; unset it to download" if constants.HF_HUB_OFFLINE
               else f"huggingface.co cannot be reached; check the network ({_first_line(error)})")
        raise CheckpointError(f"{repo_id}: no such directory here, not whole in the download cache "
                              f"({constants.HF_HUB_CACHE}), and {why}") from error
    except Exception as error:      # the library, its HTTP client and the disk each raise kinds of their own
        raise CheckpointError(f"{repo_id}: the download failed: {type(error).__name__}: {_first_line(error)}; "
                              "what has arrived is kept, so trying again goes on from there") from error
    finally:
        if quiet and not was_quiet:
            enable_progress_bars()


def _first_line(error):
    return str(error).strip().partition("\n")[0]
