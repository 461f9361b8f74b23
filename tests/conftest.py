"""Shapes in signatures are checked while testing (jaxtyping + beartype), and only then."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no network in tests

import pytest
from jaxtyping import install_import_hook

install_import_hook("maskclip_jax", "beartype.beartype")


@pytest.fixture
def checkpoints():
    """The module of tiny CLIPs and their folders: `checkpoints.write_folder(…)`."""
    import clip_checkpoints

    return clip_checkpoints
