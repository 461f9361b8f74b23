"""MaskCLIP and MaskCLIP+ in JAX: name what you want to see, and get a mask for it.

Data flows one way, and so do the imports (held by `tests/test_import_rule.py`):

    ops -> data -> encoders -> checkpoints -> segment -> label, evaluate -> students -> distill -> export -> web -> cli

Shapes are written in signatures, `Float[Array, "B h w E"]`:

    B batch · H W image (pixels) · h w patch grid · L = h·w tokens · D width of the image tower
    E width of the joint embedding · C classes · N prompts · T text tokens
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskclip_jax.checkpoints.load import load_clip as load_clip
    from maskclip_jax.checkpoints.pretrained import Pretrained as Pretrained
    from maskclip_jax.distill.student_folder import load_student as load_student
    from maskclip_jax.encoders.config import Fidelity as Fidelity
    from maskclip_jax.errors import UserError as UserError
    from maskclip_jax.segment.options import Options as Options
    from maskclip_jax.segment.predict import Segmentation as Segmentation
    from maskclip_jax.segment.predict import segment_images as segment_images
    from maskclip_jax.version import __version__ as __version__

_HOMES = {
    "Fidelity": "encoders.config",
    "Pretrained": "checkpoints.pretrained",
    "load_clip": "checkpoints.load",
    "UserError": "errors",
    "Options": "segment.options",
    "Segmentation": "segment.predict",
    "segment_images": "segment.predict",
    "__version__": "version",
    "load_student": "distill.student_folder",
}
_MODULES = ("checkpoints", "data", "encoders", "errors", "evaluate", "ops", "segment", "visualize")


def __getattr__(name: str) -> Any:
    """The public names, imported when first used: JAX takes seconds, and `maskclip --help` needs none of it."""
    if name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif name in _MODULES:
        import_module(f"{__name__}.segment.predict")  # brings the folders' modules as attributes too
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, value)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
