"""How images are read: one frozen dataclass that keywords, command-line flags, the page's JSON and protocols share.

No JAX or NumPy is needed to import this: `maskclip --help` is made from the fields.
"""

# ruff: noqa: RUF009  (`_option` makes a field)
from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from maskclip_jax.data.whole_files import cut
from maskclip_jax.errors import UserError

BACKGROUND = "background"
BATCH_SIZE = 8
MOST_PAMR = 1000
MOST_SCALE = 16
MOST_LOGIT_SCALE = 1e6  # float32's exponentials of more are one class's or none's
MOST_OVERLAP = 8  # windows over one pixel, along one axis


def _option(default: Any, help: str, /, **flag: Any) -> Any:
    """A field: what it does, and the keywords of its command-line flag (none: it has no flag).

    A flag's `type` is "probability" (above 0, up to 1), "count" (a whole number of at least 1), "number" or "integer".
    """
    return dataclasses.field(default=default, metadata={"help": help, "flag": flag})


@dataclasses.dataclass(frozen=True)
class Options:
    """How images are read; checked when it is made (UserError, one line)."""

    templates: Any = _option(
        None, "maskclip (85), imagenet (80), scene (5), tcl (9), single, or a template with {}", type="text"
    )
    short_side: int | None = _option(None, "pixels the short side is resized to (long side at most 2048)", type="count")
    within: Sequence[int] | None = _option(
        None, "instead: the largest size that fits", type="count", nargs=2, metavar=("HEIGHT", "WIDTH")
    )
    method: Any = _option(
        "maskclip",
        "how CLIP's last blocks are read: maskclip, sclip, clearclip, naclip, gem, … (clip: the paper's baseline)",
        type="text",
    )
    affinity: Any = _option(
        None,
        "second backbone, whose patches' likeness proxyclip, clip_dinoiser and lposs use: a hub id or folder",
        type="text",
        metavar="NAME",
    )
    prompt_denoising: float | int | None = _option(
        None, "drop classes that are nowhere more probable than T (paper: 0.5)", type="probability", metavar="T"
    )
    key_smoothing: float | int | None = _option(
        None, "smooth positions less sure than T (1)", type="probability", nargs="?", const=1.0, metavar="T"
    )
    window: int | None = _option(None, "side of sliding windows in pixels of the resized image", type="count")
    stride: int | None = _option(None, "distance of sliding windows (half the window)", type="count")
    background: Any = _option(None, "words that compete and become one class, background", type="text")
    background_threshold: float | int | None = _option(
        None, "less sure pixels become background", type="probability", metavar="P"
    )
    synonyms: str = _option("mean", "a class is its synonyms' mean, or the best of them", choices=("mean", "max"))
    probability_scale: float | int | None = _option(
        None, "what cosines are multiplied by before a softmax (the model's own)", type="number", metavar="S"
    )
    probability: str = _option(
        "softmax",
        "classes compete, or (SigLIP) each is judged by itself: masks may overlap, or none be there",
        choices=("softmax", "sigmoid"),
    )
    window_mean: str = _option("logits", "what windows that overlap average", choices=("logits", "probabilities"))
    pamr: int = _option(0, "steps that pull masks to the image's edges (paper: 10); slow", type="integer", metavar="N")
    spread: int = _option(
        0, "steps that spread masks over pixels of like colours (LPOSS+: 10); very slow", type="integer", metavar="N"
    )
    scales: Sequence[float | int] = _option(
        (1.0,), "sizes whose probabilities are averaged (1.0); slow", type="number", nargs="+"
    )
    flip: bool = _option(False, "average with the mirrored image", action="store_true")
    batch_size: int = _option(BATCH_SIZE, "images or windows at once, at most", type="count", default=BATCH_SIZE)
    return_probabilities: bool = _option(False, "keep the probability of every class at every pixel, in float32")
    cache: Any = _option(True, "whether (or in which folder) the text classifier is kept for the next time")

    def __post_init__(self):
        from maskclip_jax.data.preprocess import check_size  # only here: --help needs neither NumPy nor JAX
        from maskclip_jax.data.schema import check_choices
        from maskclip_jax.encoders.dense import check_affinity, check_method

        if isinstance(self.key_smoothing, bool):
            object.__setattr__(self, "key_smoothing", 1.0 if self.key_smoothing else None)
        flags = {f.name: f.metadata["flag"] for f in dataclasses.fields(self) if "flag" in f.metadata}
        check_choices(self, {name: flag["choices"] for name, flag in flags.items() if "choices" in flag})
        check_method(self.method)
        check_affinity(self.method, self.affinity)
        for name, steps in (("PAMR takes", self.pamr), ("masks spread in", self.spread)):
            if not _is_whole(steps, 0) or steps > MOST_PAMR:
                raise UserError(f"{name} 0 to {MOST_PAMR} steps, a whole number, got {cut(steps)}: try 10")
        check_scales(self.scales)
        object.__setattr__(self, "scales", tuple(map(float, self.scales)))
        scale = self.probability_scale
        if scale is not None and not (_is_number(scale) and 0 < scale <= MOST_LOGIT_SCALE):
            raise UserError(f"a probability scale is above 0 and up to {MOST_LOGIT_SCALE:g}, got {cut(scale)}: try 40")
        for name, value in (
            ("prompt denoising", self.prompt_denoising),
            ("key smoothing", self.key_smoothing),
            ("a background threshold", self.background_threshold),
        ):
            if value is not None and not (_is_number(value) and 0 < value <= 1):
                raise UserError(f"{name} takes a probability above 0 and up to 1, got {value!r}: try 0.5")
        if not _is_whole(self.batch_size, 1):
            raise UserError(f"a batch holds at least one image, got {self.batch_size!r}: use 1 or more")
        check_windows(self.window, self.stride)
        check_size(self.short_side, self.within)
        if self.within is not None:
            object.__setattr__(self, "within", tuple(map(int, self.within)))

    @property
    def windows(self) -> tuple[int, int] | None:
        """(window, stride) in pixels of the resized image; None is whole images."""
        return None if self.window is None else (self.window, self.stride or max(1, self.window // 2))

    @property
    def views(self) -> list[tuple[float, bool]]:
        """(scale, mirrored) of every view."""
        return [(scale, flipped) for scale in self.scales for flipped in ((False, True) if self.flip else (False,))]

    def changed(self) -> dict[str, Any]:
        """The fields that are not at their defaults."""
        return {f.name: v for f in FIELDS if (v := getattr(self, f.name)) is not f.default and v != f.default}


FIELDS = dataclasses.fields(Options)
Options.__doc__ = f"{Options.__doc__}\n\nFields:\n" + "\n".join(f"  {f.name}: {f.metadata['help']}" for f in FIELDS)


def with_overrides(options: Options | None, overrides: dict[str, Any]) -> Options:
    """`options` (None: the defaults) with other values of some fields. Raises TypeError for what is no field."""
    return dataclasses.replace(Options() if options is None else options, **overrides)


def check_scales(scales: Any) -> None:
    """Raises UserError unless there are scales, of a size that an image may have."""
    fits = isinstance(scales, list | tuple) and all(_is_number(s) and 1 / MOST_SCALE <= s <= MOST_SCALE for s in scales)
    if not scales or not fits:
        least = 1 / MOST_SCALE
        raise UserError(f"scales are {least} to {MOST_SCALE}, got {cut(scales)}: try 0.75 1 1.25")


def check_windows(window: int | None, stride: int | None) -> None:
    """Raises UserError for windows that are no whole pixels, leave gaps, or overlap too often."""
    if window is None:
        if stride is not None:
            raise UserError(f"a stride ({stride}) belongs to a window, got no window: give both or neither")
        return
    if not _is_whole(window, 1) or not (stride is None or (_is_whole(stride, 1) and stride <= window)):
        raise UserError(
            f"windows are at least 1 pixel and the stride at most the window, got {window!r} and {stride!r}: "
            "try --window 224 --stride 112"
        )
    if stride is not None and stride * MOST_OVERLAP < window:
        raise UserError(
            f"at most {MOST_OVERLAP} windows overlap, so a window of {window} has a stride of at least "
            f"{-(-window // MOST_OVERLAP)}, got {stride}: use a larger stride"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least
