"""The cost of a request (windows, cells, bytes), estimated and refused before anything is allocated."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import jax

from maskclip_jax.data.buckets import Shape
from maskclip_jax.encoders.config import ViTConfig
from maskclip_jax.errors import UserError
from maskclip_jax.ops import round_up
from maskclip_jax.ops.compile_count import count_compiles
from maskclip_jax.ops.memory import resident_bytes, trim
from maskclip_jax.segment.grid import attention_bytes
from maskclip_jax.segment.settings import PredictionSettings
from maskclip_jax.segment.windows import plan_windows, window_side

MOST_WINDOWS = 256  # of one image: others wait meanwhile
MOST_SIDE = 8192  # pixels of the resized image's long side
MOST_CELLS = 8192  # of an image or a window: smoothing compares each with each
MOST_BYTES = 2**30  # of one layer's attention, or of the matrix that brings windows to pixels
MOST_FLOATS = 2**26  # words × pixels, where each is kept: 256 MB
MOST_READ = 2**22  # pixels of an image, by a student
MOST_PROGRAMS = 128  # compiled and kept
PROGRAM_BYTES = 2**29  # that they may take


def check_cost(size: Shape, settings: PredictionSettings, keep: int) -> None:
    """Raises UserError where the features of an image of that size would take too long or too much memory.

    Args:
      size: height and width of the image as it came.
      keep: bytes that features may take.
    """
    config, valid = settings.config, settings.resized(size)
    if max(valid) > MOST_SIDE:
        raise UserError(
            f"the page resizes images to at most {MOST_SIDE} pixels, but this one of {size[1]} × {size[0]} would "
            f"become {valid[1]} × {valid[0]}: cut it"
        )
    shape, count, remedy = valid, 1, "cut the image"
    if settings.options.windows is not None:
        plan = plan_windows(size, settings)
        count, remedy = plan.count, "take a smaller window, or cut the image"
        if count > MOST_WINDOWS:
            raise UserError(
                f"the page reads at most {MOST_WINDOWS} windows, got {count}: make the stride "
                "larger, or use `python run.py segment`, which has no limit"
            )
        shape = (window_side(plan, config.stride),) * 2
        if max(4 * original * resized for original, resized in zip(size, valid, strict=True)) > MOST_BYTES:
            raise UserError(f"windows are for images of usual shapes, got {size[1]} × {size[0]}: cut the image")
    cells = round_up(shape[0], config.multiple) * round_up(shape[1], config.multiple) // config.stride**2
    if cells > MOST_CELLS or attention_bytes(config, shape, settings.method) > MOST_BYTES:
        raise UserError(
            f"the page reads at most {MOST_CELLS} positions at once, and fewer with large models, but these would be "
            f"{cells}: {remedy}"
        )
    width = config.embed_dim + config.vision.width * (1 if isinstance(config.vision, ViTConfig) else 32)
    room = max(keep, 2**27)  # a little --memory is no reason to refuse a photo
    if (needed := 4 * cells * count * width) > room:
        raise UserError(
            f"the page keeps {room / 2**20:.0f} MB of features, but these would be {needed / 2**20:.0f} MB: {remedy}, "
            "or start it with more --memory"
        )


def check_every_pixel(size: Shape, words: int) -> None:
    """Raises UserError where the probability of every word at every pixel would take too much memory."""
    if size[0] * size[1] * words > MOST_FLOATS:
        raise UserError(
            f"the page keeps every word at every pixel of PAMR and views, at most {MOST_FLOATS:,} numbers, got "
            f"{size[1]} × {size[0]} × {words}: use fewer words, a smaller image or `python run.py segment`"
        )


def check_student(size: Shape, student: Any) -> None:
    """Raises UserError where a student would read an image of that size as too many pixels."""
    from maskclip_jax.distill.evaluation import student_reader  # only where there is a student: it imports optax

    height, width = student_reader(student.config).preprocess.resized(size)
    if height * width > MOST_READ:
        raise UserError(
            f"a student on the page reads at most {MOST_READ:,} pixels, got {width} × {height}: use a smaller image or "
            "`python run.py segment`"
        )


class Programs:
    """Frees all compiled programs when there are too many, by their number or by the memory that came with them.

    Words, sizes, methods and models make ever new programs, and JAX keeps each: visitors' questions have no end. What
    one takes is not to be had from XLA (15 to 30 MB for the embedded models, their code a hundredth of that), so it is
    what this process has grown by, less what is kept on purpose.

    Args:
      most: programs.
      room: bytes.
      kept: what is kept on purpose at the moment, in bytes.
    """

    def __init__(self, most: int = MOST_PROGRAMS, room: int = PROGRAM_BYTES, kept: Callable[[], int] = lambda: 0):
        self.most, self.room, self.cleared, self._before, self._kept = most, room, 0, 0, kept
        self._base = self._others()
        self._stack = contextlib.ExitStack()
        self._compiled = self._stack.enter_context(count_compiles())

    @property
    def count(self) -> int:
        """Programs compiled since all were freed."""
        return self._compiled.programs - self._before

    def _others(self) -> int:
        """Bytes of this process that are not `kept`; 0 where they cannot be known."""
        resident = resident_bytes()
        return 0 if resident is None else resident - self._kept()

    def make_room(self) -> None:
        """Call it between questions."""
        if self.count > self.most or (self.count and self._others() - self._base > self.room):
            jax.clear_caches()
            gc.collect()
            trim()
            self._before, self.cleared, self._base = self._compiled.programs, self.cleared + 1, self._others()

    def close(self) -> None:
        """Stops counting."""
        self._stack.close()
