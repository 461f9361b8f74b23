"""transformers, imported when first needed (0.8 s) and without its notice that PyTorch is absent."""

from __future__ import annotations

import os
from types import ModuleType


def transformers() -> ModuleType:
    """The `transformers` module."""
    key = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        import transformers as module
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before
    return module
