"""The Hugging Face hub: fetches what a checkpoint needs and nothing else."""

from __future__ import annotations

from pathlib import Path

from maskclip_jax.checkpoints.files import shard_map
from maskclip_jax.checkpoints.folders import SMALL_FILES, candidates
from maskclip_jax.errors import UserError


def download(name: str, *, backbone: bool = False) -> Path:
    """The local folder of hub id `name`: its configs, its tokenizer, and one kind of weights.

    Raises UserError when the hub cannot be reached and the cache lacks it, or there is no such id.
    """
    folder = snapshot(name, SMALL_FILES)
    _, names = candidates(folder, backbone=backbone)
    for file in names:
        if not (folder / file).is_file() and not file.endswith(".json"):
            folder = snapshot(name, (*SMALL_FILES, file))
        if (folder / file).is_file():
            if file.endswith(".index.json"):
                shards = sorted(set(shard_map(folder / file).values()))
                folder = snapshot(name, (*SMALL_FILES, *shards))
            return folder
    if reason := _unreachable(name):
        raise UserError(
            f"the weights of {name!r} are not in the cache, and the hub cannot be reached ({reason}): download them "
            "where there is a network (unset HF_HUB_OFFLINE), or give the path of a downloaded folder"
        )
    raise UserError(f"{name} on the hub holds none of {', '.join(names)}: give another model")


def _unreachable(name: str) -> str | None:
    """Why the hub does not answer for `name`; None when it does. (What is fetched falls back on the cache unsaid.)"""
    from huggingface_hub import list_repo_files

    try:
        list_repo_files(name)
    except Exception as error:  # whatever the network is in
        return type(error).__name__
    return None


def snapshot(name: str, patterns: tuple[str, ...]) -> Path:
    """The cached folder of `name` with the files that match `patterns`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise UserError(
            f"{name!r} is neither a path here nor to be had from the hub ({type(error).__name__}): "
            "check the spelling and the network, or give the path of a downloaded folder"
        ) from error
