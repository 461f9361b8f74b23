"""`segment` with the model that ships with the project: it needs maskclip_jax/assets/clip_resnet (never skipped)."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from maskclip_jax.data.images import read_label_png
from maskclip_jax.evaluate.metrics import confusion_matrix, mean_iou

SCENES = Path(__file__).parents[2] / "maskclip_jax" / "assets" / "scenes"


def scene(name: str) -> tuple[Path, np.ndarray, list[str]]:
    """A shipped scene: its image, its truth as indices into its own classes, and these."""
    all_names = json.loads((SCENES / "classes.json").read_text())
    labels = read_label_png(SCENES / "labels" / f"{name}.png")
    present = np.unique(labels)
    truth = np.searchsorted(present, labels).astype(np.uint8)
    return SCENES / "images" / f"{name}.jpg", truth, [all_names[i] for i in present]


def moved(truth: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The truth shifted by so many pixels; what comes in at the border repeats it."""
    height, width = truth.shape
    y, x = np.clip(np.arange(height) - rows, 0, height - 1), np.clip(np.arange(width) - columns, 0, width - 1)
    return truth[np.ix_(y, x)]


SHIFT = 12  # pixels, one and a half cells of the model's grid
WRONG = {
    "mirrored": lambda x: x[:, ::-1],
    "upside down": lambda x: x[::-1],
    "turned": lambda x: x.swapaxes(0, 1),
    "too high": lambda x: moved(x, SHIFT, 0),
    "too low": lambda x: moved(x, -SHIFT, 0),
    "too far left": lambda x: moved(x, 0, SHIFT),
    "too far right": lambda x: moved(x, 0, -SHIFT),
}


def test_masks_lie_where_the_things_are(call, tmp_path):
    """The words of a scene find its things: far better than one class everywhere, and better than for any truth that
    is mirrored, turned or moved. Over six scenes, since one alone may be hard."""
    scores: dict[str, list[float]] = {}
    for number in range(6):
        image, truth, names = scene(f"{number:04d}")
        result = call("segment", image, "--classes", ", ".join(names), "--out", tmp_path)
        assert (result.code, result.errors) == (0, [])
        found = read_label_png(tmp_path / f"{image.stem}_labels.png")
        answers = {"right": found, "one class": np.full_like(found, np.bincount(truth.ravel()).argmax())}
        truths = {"right": truth, "one class": truth} | {k: np.ascontiguousarray(f(truth)) for k, f in WRONG.items()}
        for name, target in truths.items():
            confusion = confusion_matrix(target, answers.get(name, found), len(names))
            scores.setdefault(name, []).append(float(mean_iou(confusion).mean))
    mean = {name: np.mean(values) for name, values in scores.items()}
    right = mean.pop("right")
    assert right > mean["one class"] + 0.1, (right, mean)
    for wrong, score in mean.items():
        assert score < right - 0.02, (wrong, right, mean)


def test_any_size_and_the_largest_classes_first(call, tmp_path):
    """The same scene as a larger photo: the areas printed are those written, largest first."""
    image, _, names = scene("0000")
    with Image.open(image) as small:
        small.resize((337, 301), Image.Resampling.BICUBIC).save(tmp_path / "large.webp")
    result = call("segment", tmp_path / "large.webp", "--classes", ", ".join(names), "--out", tmp_path / "out")
    assert (result.code, result.errors) == (0, [])
    assert read_label_png(tmp_path / "out" / "large_labels.png").shape == (301, 337)
    classes = json.loads((tmp_path / "out" / "large.json").read_text())["classes"]
    classes = sorted((entry for entry in classes if entry["area"] > 0), key=lambda entry: -entry["area"])
    assert len(classes) > 1
    expected = [(entry["class"], f"{100 * entry['area']:.1f}%", f"{entry['confidence']:.2f}") for entry in classes]
    printed = [(line.split()[0], line.split()[1], line.split()[-1]) for line in result.lines[1:-1]]
    assert printed == expected
