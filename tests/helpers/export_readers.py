"""What `export` wrote, read back as label maps (255 is no class), by tools' libraries or their formats' words."""

import io
import json
import tarfile
import urllib.parse
import warnings
import zipfile
from pathlib import Path

import numpy as np
import yaml
from PIL import Image


def rle_pack(data: list[int]) -> np.ndarray:
    """@thi.ng/rle-pack: see `maskclip_jax.export.rle.brush`."""
    bits, place = "".join(f"{byte:08b}" for byte in data), 0

    def take(count: int) -> int:
        nonlocal place
        place += count
        return int(bits[place - count : place], 2)

    total, word = take(32), take(5) + 1
    sizes, values = [take(4) + 1 for _ in range(4)], []
    while len(values) < total:
        same, count = take(1), take(sizes[take(2)]) + 1
        values += [take(word)] * count if same else [take(word) for _ in range(count)]
    return np.array(values, np.uint8)


def filled(polygon: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pixels whose centres lie within a polygon of (x, y), even-odd."""
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    inside = np.zeros((height, width), bool)
    for (x1, y1), (x2, y2) in zip(polygon, np.roll(polygon, -1, 0), strict=True):
        if y1 != y2:
            inside ^= ((y1 > y) != (y2 > y)) & (x < x1 + (y - y1) / (y2 - y1) * (x2 - x1))
    return inside


def coco(path: Path) -> dict[str, np.ndarray]:
    from pycocotools.coco import COCO

    found = COCO(str(path))
    maps = {}
    for image in found.loadImgs(found.getImgIds()):
        labels = np.full((image["height"], image["width"]), 255)
        for one in found.loadAnns(found.getAnnIds(image["id"])):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "__array__ implementation")  # pycocotools' own
                mask = found.annToMask(one).astype(bool)
            y, x = np.nonzero(mask)
            assert one["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
            assert one["area"] == mask.sum()
            assert (labels[mask] == 255).all()
            labels[mask] = one["category_id"] - 1
        maps[image["file_name"]] = labels
    return maps


def panoptic(folder: Path) -> dict[str, np.ndarray]:
    content, maps = json.loads((folder / "panoptic.json").read_text()), {}
    names = {image["id"]: image["file_name"] for image in content["images"]}
    for one in content["annotations"]:
        rgb = np.asarray(Image.open(folder / "panoptic" / one["file_name"])).astype(int)
        ids, labels = rgb @ [1, 256, 65536], np.full(rgb.shape[:2], 255)
        assert {0, *(s["id"] for s in one["segments_info"])} >= set(ids.flat)
        for segment in one["segments_info"]:
            assert segment["area"] == (ids == segment["id"]).sum()
            labels[ids == segment["id"]] = segment["category_id"] - 1
        maps[names[one["image_id"]]] = labels
    return maps


def label_studio(folder: Path) -> dict[str, np.ndarray]:
    classes = [
        line.split('"')[1] for line in (folder / "label_config.xml").read_text().splitlines() if "<Label " in line
    ]
    maps = {}
    for task in json.loads((folder / "tasks.json").read_text()):
        (prediction,) = task["predictions"]
        labels = None
        for one in prediction["result"]:
            shape = one["original_height"], one["original_width"]
            labels = np.full(shape, 255) if labels is None else labels
            mask = rle_pack(one["value"]["rle"]).reshape(*shape, 4)
            assert (mask == mask[:, :, :1]).all()
            labels[mask[:, :, 3] == 255] = classes.index(one["value"]["brushlabels"][0])
            assert 0 <= one["score"] <= 1
        maps[urllib.parse.unquote(task["data"]["image"].partition("?d=")[2])] = labels
    return maps


def yolo(folder: Path, part: str = "train") -> dict[str, np.ndarray]:
    data = yaml.safe_load((folder / "data.yaml").read_text())
    assert list(data["names"]) == list(range(len(data["names"])))
    maps = {}
    for image in sorted((folder / data[part]).rglob("*.*")):
        path = Path(str(image).replace("/images/", "/labels/")).with_suffix(".txt")  # as img2label_paths does
        with Image.open(image) as opened:
            width, height = opened.size
        labels = np.full((height, width), 255)
        for row in path.read_text().splitlines():
            index, *numbers = row.split()
            points = np.array(numbers, np.float32).reshape(-1, 2)
            assert points.min() >= 0
            assert points.max() <= 1
            assert len(points) >= 4
            labels[filled(points * [width, height], height, width)] = int(index)
        maps[str(image.relative_to(folder / data[part]).with_suffix(""))] = labels
    return maps


def cvat(file: Path | io.BytesIO, part: str = "default") -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(classes, where 255 is the background; numbers of objects, 0 is none)."""
    maps, objects = {}, {}
    with zipfile.ZipFile(file) as archive:
        lines = archive.read("labelmap.txt").decode().splitlines()
        assert lines[0] == "# label:color_rgb:parts:actions"
        fields = [line.split(":") for line in lines[1:]]
        assert all(len(parts) == 4 for parts in fields)
        assert fields[0][:2] == ["background", "0,0,0"]
        colours = [tuple(map(int, parts[1].split(","))) for parts in fields]
        assert len(set(colours)) == len(colours)
        for name in archive.read(f"ImageSets/Segmentation/{part}.txt").decode().splitlines():
            with archive.open(f"SegmentationClass/{name}.png") as opened:
                pixels = np.asarray(Image.open(opened))
            labels = np.full(pixels.shape[:2], -1)
            for index, colour in enumerate(colours):
                labels[(pixels == colour).all(-1)] = index
            assert labels.min() >= 0  # else CVAT refuses the file
            maps[name] = np.where(labels == 0, 255, labels - 1)
            with archive.open(f"SegmentationObject/{name}.png") as opened:
                rgb = np.asarray(Image.open(opened)).astype(int)
            bits = [((rgb[..., c] >> (7 - i)) & 1) << (3 * i + c) for i in range(8) for c in range(3)]
            objects[name] = np.sum(bits, 0)
    return maps, objects


def fiftyone(folder: Path) -> dict[str, np.ndarray]:
    targets, maps = json.loads((folder / "mask_targets.json").read_text()), {}
    for mask in sorted((folder / "labels").rglob("*.png")):
        values = np.asarray(Image.open(mask)).astype(int)
        name = mask.relative_to(folder / "labels").with_suffix("")
        assert len(list((folder / "data" / name).parent.glob(f"{glob_of(name.name)}.*"))) == 1
        assert set(values.flat) <= {0, *map(int, targets)}
        maps[str(name)] = np.where(values == 0, 255, values - 1)
    return maps


def glob_of(name: str) -> str:
    return name.replace("[", "[[]")


def voc(folder: Path, part: str = "all") -> dict[str, np.ndarray]:
    """As mmsegmentation's pillow backend reads them: indices, palettes not looked up."""
    maps = {}
    for name in (folder / "ImageSets" / "Segmentation" / f"{part}.txt").read_text().splitlines():
        with Image.open(folder / "SegmentationClass" / f"{name}.png") as image:
            assert image.mode == "P"
            maps[name] = np.array(image, np.uint8)
    return maps


def webdataset(folder: Path, part: str = "all") -> dict[str, tuple[np.ndarray, np.ndarray, dict]]:
    """(label map, image, JSON) by key, in order."""
    import webdataset as wds

    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # its readers leave files to the garbage collector
        for shard in sorted(map(str, folder.glob(f"{part}-*.tar"))):
            for sample in wds.WebDataset(shard, shardshuffle=False).decode("pil"):
                image = sample.get("jpg", sample.get("png"))
                labels = np.asarray(sample["seg.png"])
                assert (labels == labels[:, :, :1]).all()
                found[sample["__key__"]] = labels[:, :, 0], np.asarray(image), sample["json"]
            with tarfile.open(shard) as archive:
                assert all(member.mtime == 0 for member in archive)
    return found
