"""Shapes in signatures are checked while testing (jaxtyping + beartype), and only then."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no network in tests

from jaxtyping import install_import_hook

install_import_hook("maskclip_jax", "beartype.beartype")
