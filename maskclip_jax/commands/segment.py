"""Masks for your images from a list of words.

    python run.py segment photo.jpg --classes "dog, sofa, window" --out out

Writes, for every image: NAME_overlay.png (the masks on the image, with a legend), NAME_labels.png (an indexed PNG: the
pixel is the number of the class) and NAME.json (area and confidence of every class); prints the largest classes.

--classes is a list separated by commas; a class set (voc20, context59, coco-stuff171, ade20k150, cityscapes19,
scenes66, …); or a text file with a class on each line. With semicolons between classes, commas separate synonyms:
"sofa, couch; dog". Quotes keep a comma in a name: '"dog, big", cat'. Masks of more than 255 classes are 16-bit grey.

--model is a CLIP, or the folder of a run of `distill`: a trained student, which knows the classes it was trained on.
Without --classes it looks for all of them, with --classes for those.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from maskclip_jax.commands import common
from maskclip_jax.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
STUDENTS_REFUSE = (
    *("templates", "naive", "prompt_denoising", "key_smoothing", "window", "stride", "background"),
    *("protocol", "scales", "flip", *common.METHOD_OPTIONS),
)
LONGEST = 200  # bytes of an output's name before its suffix: systems take 255 in all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--classes", help="what to look for (a student knows its own)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    common.add_model_arguments(parser)
    common.add_reading_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from maskclip_jax.data.images import read_image, write_json

    paths, skipped = list(dict.fromkeys(find_images(args.images, args.out))), []
    segmenter = make_segmenter(args)
    out = common.output_folder(args.out)
    names = output_names(paths)

    def readable() -> Iterator[tuple[Path, object]]:
        for path in paths:
            try:
                image = read_image(path)
            except (UserError, OSError) as error:  # the others go on; the exit code tells
                skipped.append(common.as_text(path))
                common.complain(error)
            else:
                yield path, image

    done: list[tuple[Path, object]] = []

    def pixels() -> Iterator[object]:
        for path, image in readable():
            done.append((path, image))
            yield image

    with common.progress("segmenting", len(paths)) as report:
        for number, result in enumerate(segmenter(pixels(), report)):
            path, image = done[number]
            done[number] = (path, None)
            write_result(out, names[path], path, image, result)
            print_result(path, result)
    write_json(out / "segment.json", common.record(args) | {"skipped": skipped})
    if len(skipped) < len(paths):
        print(f"wrote {len(paths) - len(skipped)} of {len(paths)} images to {out}")
    return 2 if skipped else 0


def make_segmenter(args: argparse.Namespace) -> Callable[[Iterable, Callable[[int], None]], Iterator]:
    """`(images, progress) -> segmentations` of the CLIP or the student that the arguments name."""
    from maskclip_jax.data.vocabulary import parse_classes
    from maskclip_jax.distill.layout import is_run

    if is_run(args.model):
        from maskclip_jax.distill.predict import chosen_labels, iter_student_segmentations
        from maskclip_jax.distill.workdir import load_student

        common.refuse_for_students(args, STUDENTS_REFUSE)
        trained = load_student(args.model)
        options = {name: getattr(args, name) for name in ("short_side", "batch_size", "background_threshold")}
        options["classes"] = None if args.classes is None else [str(c) for c in parse_classes(args.classes)]
        chosen_labels(trained.config, options["classes"])  # complains before anything is written
        return lambda images, report: iter_student_segmentations(images, trained, report, **options)
    from maskclip_jax.segment.predict import iter_segmentations, prediction_settings

    if args.classes is None:
        raise UserError('a CLIP looks for what is named, but --classes is missing: --classes "dog, sofa" (see: --help)')
    classes = parse_classes(args.classes)
    settings = prediction_settings(classes, common.load_model(args), **common.reading_options(args))
    return lambda images, report: iter_segmentations(images, settings, report)


def find_images(paths: list[Path], out: Path | None = None) -> Iterator[Path]:
    """The files named, and all images of the folders named, sorted. Raises UserError where a folder has none.

    What lies below `out` is left out where a folder that holds `out` is named: an earlier run wrote it.
    """
    written = None if out is None else os.path.realpath(out)
    for path in paths:
        if not os.path.isdir(path):  # Path.is_dir raises where a name is too long
            yield path
            continue
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and not p.is_dir())
        if written is not None and os.path.realpath(path) != written:
            found = [p for p in found if not _below(p, written)]
        if not found:
            raise UserError(f"a folder of images holds {', '.join(sorted(SUFFIXES))} files, {path} none: name another")
        yield from found


def _below(path: Path, folder: str) -> bool:
    parent = Path(os.path.realpath(path.parent))
    return parent == Path(folder) or Path(folder) in parent.parents


def output_names(paths: list[Path]) -> dict[Path, str]:
    """What each image's files are called: its stem, with a number where another image has taken that."""
    names: dict[Path, str] = {}
    taken: set[str] = {"segment"}  # segment.json is the run's own record
    for path in paths:
        stem = path.stem
        if len(os.fsencode(stem)) > LONGEST:
            stem = os.fsencode(stem)[:LONGEST].decode(errors="ignore")
        name, number = stem, 2
        while name in taken:
            name, number = f"{stem}-{number}", number + 1
        names[path] = name
        taken.add(name)
    return names


def write_result(out: Path, name: str, path: Path, image, result) -> None:
    """The three files of one image."""
    from maskclip_jax.data.images import write_image, write_json, write_label_png
    from maskclip_jax.data.vocabulary import class_palette
    from maskclip_jax.visualize import overlay_with_legend

    palette = class_palette(result.classes)
    write_image(out / f"{name}_overlay.png", overlay_with_legend(image, result.labels, result.classes, palette))
    write_label_png(out / f"{name}_labels.png", result.labels, palette)
    write_json(out / f"{name}.json", result_record(common.as_text(path), result))


def result_record(image: str, result) -> dict:
    """What NAME.json holds: `image` is what the picture is called."""
    scores = [
        {"class": c, "index": i, "area": result.scores[c].area, "confidence": result.scores[c].confidence}
        for i, c in enumerate(result.classes)
    ]
    height, width = result.labels.shape
    return {"image": image, "height": height, "width": width, "classes": scores}


def print_result(path: Path, result, most: int = 8) -> None:
    """The largest classes of one image, a line each."""
    present = sorted(((s.area, s.confidence, c) for c, s in result.scores.items() if s.area > 0), reverse=True)
    print(f"{path}")
    for area, confidence, name in present[:most]:
        print(f"  {name:<24} {100 * area:5.1f}% of the image   confidence {confidence:.2f}")
    if len(present) > most:
        print(f"  and {len(present) - most} smaller classes")
