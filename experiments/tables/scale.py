"""A billion images on a pod, on paper: bytes, operations, hours, and what is the bottleneck (docs/scale.md).

    python -m experiments.tables.scale --measure experiments/results/scale.json   (a minute: times the host's work)
    python -m experiments.tables.scale                                              (prints the table from it)
    python -m experiments.tables.scale --write                                      (into docs/scale.md)

What a host does per image is measured, as CPU time of one thread, so that other load counts little; what a chip does
is counted in operations and divided by its peak and an assumed share of it. Nothing here was run on a TPU.
"""

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results" / "scale.json"
DOC = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- table: written by `python -m experiments.tables.scale --write` -->", "<!-- end of table -->"


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be done. An image is a photo of COCO's size; the model is ViT-B/16 at a short side of 512."""

    images: float = 1e9
    height: int = 480
    width: int = 640
    jpeg_bytes: float = 160e3  # COCO train2017: 18 GB in 118,287 files
    short_side: int = 512
    patch: int = 16
    width_model: int = 768
    layers: int = 12
    embed: int = 512
    classes: int = 171

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        scale = self.short_side / min(self.height, self.width)
        return tuple(math.ceil(round(side * scale) / self.patch) for side in (self.height, self.width))

    @property
    def tiles(self) -> int:
        """Calls of `upsample.label_pixels`' program: tiles of 128 × 256 pixels and at most 24 × 24 cells."""
        from maskclip_jax.data.preprocess import upsample_matrix
        from maskclip_jax.segment.pixels import strips, tile_shape

        count = 1
        for cells, side, most in zip(self.grid, (self.height, self.width), tile_shape(self.classes), strict=True):
            matrix = upsample_matrix(cells, self.patch, cells * self.patch, side, aligned=False)
            count *= len(list(strips(matrix, most)))
        return count


@dataclasses.dataclass(frozen=True)
class Pod:
    """A v5e-256: https://cloud.google.com/tpu/docs/v5e; VMs of a multi-host slice have 4 chips and 112 vCPUs."""

    chips: int = 256
    hosts: int = 64
    vcpus: int = 112
    peak: float = 197e12  # bfloat16 operations a second and chip
    share: float = 0.4  # of the peak that the tower reaches: assumed, not measured
    network: float = 6.4e12 / 8  # bytes a second of the pod, as documented
    storage: float = 200e9 / 8  # bytes a second of a bucket: a default quota to check, and to raise


def tower_operations(job: Job) -> float:
    """Multiplications and additions of the dense image tower for one image (padding and class token left out).

    Eleven whole blocks (12 D² a token, and attention), and of the last one v, out and the MLP only (10 D²).
    """
    tokens, width = job.grid[0] * job.grid[1], job.width_model
    blocks = (job.layers - 1) * (24 * width**2 * tokens + 4 * tokens**2 * width)
    last = 20 * width**2 * tokens
    ends = 2 * tokens * (3 * job.patch**2 * width + width * job.embed + job.embed * job.classes)
    return blocks + last + ends


def pixel_operations(job: Job) -> float:
    """The two products of a tile's upsampling, in full precision: six bfloat16 passes on a TPU."""
    from maskclip_jax.segment.pixels import CELLS, tile_shape

    height, width = tile_shape(job.classes)
    return 6 * job.tiles * 2 * job.classes * (height * CELLS * CELLS + height * width * CELLS)


def stages(job: Job, pod: Pod, measured: dict[str, float]) -> dict[str, float]:
    """Hours of each stage if it were the only one; they overlap, so the longest is the whole."""
    cells = job.grid[0] * job.grid[1] * job.classes * 4
    pixels = job.height * job.width * 8  # label and confidence, 32 bits each
    operations = tower_operations(job) + pixel_operations(job)
    seconds = {
        "images from storage": job.images * job.jpeg_bytes / min(pod.storage, pod.network),
        "decode, resize (all vCPUs)": job.images * (measured["decode"] + measured["resize"]) / pod.hosts / pod.vcpus,
        "chips: image tower and pixels": job.images * operations / (pod.chips * pod.peak * pod.share),
        "scores back, tiles out and back (PCIe 16 GB/s)": job.images * (2 * cells + pixels) / pod.hosts / 16e9,
        "calls of the tiles' program, 1 process a host": job.images * job.tiles * measured["call"] / pod.hosts,
        "calls of the tiles' program, 1 process a chip": job.images * job.tiles * measured["call"] / pod.chips,
        "PNG and SHA-256 (all vCPUs)": job.images * measured["encode"] / pod.hosts / pod.vcpus,
        "masks to storage": job.images * measured["mask bytes"] / min(pod.storage, pod.network),
    }
    return {name: value / 3600 for name, value in seconds.items()}


def table(measured: dict[str, float], job: Job | None = None, pod: Pod | None = None) -> str:
    """The figures as markdown."""
    job, pod = job or Job(), pod or Pod()
    hours = stages(job, pod, measured)
    per_host = pod.vcpus / (measured["decode"] + measured["resize"])
    chip = pod.peak * pod.share / (tower_operations(job) + pixel_operations(job))
    facts = {
        "bytes in": f"{job.images * job.jpeg_bytes / 1e12:.0f} TB",
        "bytes out (label PNGs)": f"{job.images * measured['mask bytes'] / 1e12:.1f} TB",
        "operations an image": f"{tower_operations(job) / 1e9:.0f} G tower, {pixel_operations(job) / 1e9:.0f} G pixels",
        "images a second and chip": f"{chip:.0f}",
        "images a second the chips of a host take": f"{chip * pod.chips / pod.hosts:.0f}",
        "decoded and resized a second and vCPU here": f"{1 / (measured['decode'] + measured['resize']):.0f}",
        "… by the vCPUs of a host": f"{per_host:.0f}",
    }
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items()), ""]
    lines += ["| stage, if it were alone | hours |", "|---|---|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in hours.items()]
    slowest = max(hours, key=hours.get)
    return "\n".join([*lines, "", f"Bottleneck: **{slowest}**, {hours[slowest]:.1f} hours."])


def with_table(text: str, found: str) -> str:
    """A document with the table between its marks."""
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{found}\n{END}{after}"


def measure(repeats: int = 20) -> dict[str, float]:
    """Seconds of CPU per image of one thread: decoding, resizing, a compiled call, PNG; and bytes of a mask."""
    import hashlib
    import io

    import jax
    from PIL import Image

    from maskclip_jax.data.images import label_png, read_image, read_label_png
    from maskclip_jax.data.preprocess import Preprocess, prepare
    from maskclip_jax.data.vocabulary import palette

    job, scenes = Job(), ROOT / "maskclip_jax" / "assets" / "scenes"
    size = (job.width, job.height)
    with Image.open(scenes / "images" / "0005.jpg") as image:
        pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC)).astype(np.float32)
    noise = np.random.default_rng(0).normal(size=pixels.shape)
    for strength in range(0, 40, 2):  # texture until the file is as large as a photo's
        buffer = io.BytesIO()
        Image.fromarray((pixels + strength * noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        if len(buffer.getvalue()) >= job.jpeg_bytes:
            break
    data = buffer.getvalue()
    masks = [read_label_png(path) for path in sorted((scenes / "labels").iterdir())[:repeats]]
    masks = [np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for mask in masks]
    colours, preprocess = palette(66), Preprocess((0.5,) * 3, (0.2,) * 3, short_side=job.short_side)
    arguments = [np.zeros((24, 24, 171), np.float32), np.zeros((128, 24), np.float32), np.zeros((256, 24), np.float32)]
    program = jax.jit(lambda cells, rows, columns: (rows[0, 0], columns[0, 0], cells[0, 0, 0]))

    def encode(mask: np.ndarray) -> int:
        content = label_png(mask, colours)
        hashlib.sha256(content).digest()
        return len(content)

    image = read_image("photo.jpg", data)
    found = {
        "decode": _cpu(lambda i: read_image("photo.jpg", data), repeats),
        "resize": _cpu(lambda i: prepare(image, preprocess, job.patch), repeats),
        "call": _cpu(lambda i: program(*arguments), 50 * repeats),
        "encode": _cpu(lambda i: encode(masks[i % len(masks)]), repeats),
        "mask bytes": float(np.mean([encode(mask) for mask in masks])),
        "jpeg bytes": float(len(data)),
    }
    return found


def _cpu(work, repeats: int) -> float:
    work(0)
    start = time.thread_time()
    for i in range(repeats):
        work(i)
    return (time.thread_time() - start) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--measure", type=Path, metavar="FILE", help="time the host's work and write it here")
    parser.add_argument("--write", action="store_true", help="put the table into docs/scale.md")
    args = parser.parse_args()
    if args.measure:
        args.measure.parent.mkdir(parents=True, exist_ok=True)
        args.measure.write_text(json.dumps(measure(), indent=1) + "\n")
    found = table(json.loads((args.measure or RESULTS).read_text()))
    if args.write:
        DOC.write_text(with_table(DOC.read_text(), found))
    print(found)


if __name__ == "__main__":
    main()
