"""Small images and masks as files, for data sets that are made up."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

H, W = 6, 9


def image_bytes(seed: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (H, W, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def mask_bytes(values, mode: str = "L") -> bytes:
    """A mask whose first pixels are `values`, the others the last of them: indexed, 8-bit or 16-bit grey."""
    labels = np.full(H * W, values[-1], np.uint16 if mode == "I;16" else np.uint8)
    labels[: len(values)] = values
    image = Image.fromarray(labels.reshape(H, W))
    if mode == "P":
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root
