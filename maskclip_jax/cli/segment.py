"""Masks for your images from a list of words.

    python run.py segment photo.jpg --classes "dog, sofa, window" --out out

IMAGE is a file, or a folder, which is looked through with all folders in it (hidden files apart). Results never replace
an image or a file of yours: where a name is taken, they are NAME-2 and so on; results of earlier runs are no images.

Writes, for every image: NAME_overlay.png (the masks on the image, with a legend), NAME_labels.png (an indexed PNG: the
pixel is the number of the class) and NAME.json (area and confidence of every class); prints the largest classes.

--classes is a list separated by commas; a class set (voc20, context59, coco-stuff171, ade20k150, cityscapes19,
scenes66, …); or a text file with a class on each line. With semicolons between classes, commas separate synonyms:
"sofa, couch; dog". Quotes keep a comma in a name: '"dog, big", cat'. Masks of more than 255 classes are 16-bit grey.

--model is a CLIP, or a trained student (the folder of a run of `distill`, one that `convert` made of it, or its hub
id), which has the classes it was trained on.
Without --classes it looks for all of them, with --classes for those.
"""

from __future__ import annotations

import argparse
import collections
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from maskclip_jax.cli import common
from maskclip_jax.data.whole_files import as_text
from maskclip_jax.errors import UserError

STUDENTS_TAKE = ("short_side", "batch_size", "background_threshold")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=common.place, metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--classes", help="what to look for (a student has its own)")
    parser.add_argument("--out", type=common.place, required=True, help="folder to write to")
    common.add_model_arguments(parser)
    common.add_reading_arguments(parser)
    common.add_image_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from maskclip_jax.data.images import read_image
    from maskclip_jax.data.whole_files import write_json
    from maskclip_jax.segment.files import is_own, output_names, write_result

    paths, skipped, written = list(dict.fromkeys(find_images(args.images, args.out))), [], 0
    segmenter = make_segmenter(args)
    out = common.output_folder(args.out)
    if not is_own(out / "segment.json", {"command", "settings", "versions", "skipped"}):
        raise UserError(f"--out has a segment.json, but {out}'s is not by `segment`: choose another folder, or move it")
    names = output_names(paths, out)

    def skip(path: Path, error: Exception) -> None:  # the others go on; the exit code is 2
        skipped.append(as_text(path))
        common.complain(error)

    def readable() -> Iterator[tuple[Path, object]]:
        for path in paths:
            try:
                image = read_image(path)
            except (UserError, OSError) as error:
                skip(path, error)
            else:
                yield path, image

    try:
        with common.progress("segmenting", len(paths)) as report:
            for path, image, result in answers(segmenter, readable()):
                try:
                    if isinstance(result, Exception):
                        raise result
                    write_result(out, names[path], path, result.overlay(image), result)
                except MemoryError as error:
                    skip(path, _too_large(path, error))
                except Unanswered as error:
                    skip(path, error)
                else:
                    written += 1
                    print_result(path, result)
                report(written + len(skipped))
    except KeyboardInterrupt:
        whole = f"{written} of {len(paths)} images are in {out}"
        print(f"stopped: {whole}; the same command starts with the first again", file=sys.stderr)
        return 130
    write_json(out / "segment.json", common.record(args) | {"skipped": skipped})
    if written:
        print(f"wrote {written} of {len(paths)} images to {out}")
    return 2 if skipped else 0


class Unanswered(UserError):
    """An image that was read and cannot be segmented, while others can."""


def answers(segmenter: Callable[[Iterable], Iterator], images: Iterable[tuple[Path, object]]) -> Iterator[tuple]:
    """(path, image, segmentation, or the `Unanswered` in its place) of every image, in order.

    Where one image of those computed together fails, for its size or for lack of memory, each is computed alone.
    """
    waiting: collections.deque[tuple[Path, object]] = collections.deque()

    def pixels() -> Iterator[object]:
        for path, image in images:
            waiting.append((path, image))
            yield image

    source, together = pixels(), True
    while together:
        together = False
        try:
            for result in segmenter(source):
                yield (*waiting.popleft(), result)
        except Exception as error:
            if not _is_of_one_image(error):
                raise
            together = True  # the next ones
        while waiting:
            path, image = waiting.popleft()
            try:
                (result,) = segmenter([image])
            except Exception as error:
                if not _is_of_one_image(error):
                    raise
                result = error if isinstance(error, UserError) else _too_large(path, error)
                result = Unanswered(f"{as_text(path)} is left out: {result}")
            yield path, image, result


def _is_of_one_image(error: Exception) -> bool:
    return isinstance(error, UserError) or common.out_of_memory(error)


def _too_large(path: Path, error: BaseException) -> Unanswered:
    reason = " ".join(str(error).split())[:200] or "out of memory"
    return Unanswered(f"an image must fit into memory, but {as_text(path)} does not ({reason}): scale it down")


def make_segmenter(args: argparse.Namespace) -> Callable[[Iterable], Iterator]:
    """`images -> segmentations`, in order, of the CLIP or the student that the arguments name."""
    from maskclip_jax.data.vocabulary import parse_classes
    from maskclip_jax.distill import is_student

    if is_student(args.model):
        from maskclip_jax.distill.predict import chosen_labels, iter_student_segmentations

        common.refuse_for_students(args, STUDENTS_TAKE)
        trained = common.load_run(args)
        options = {name: getattr(args, name) for name in STUDENTS_TAKE}
        options["classes"] = None if args.classes is None else [str(c) for c in parse_classes(args.classes)]
        chosen_labels(trained.config, options["classes"])  # an error before anything is written
        return lambda images: iter_student_segmentations(images, trained, **options)
    from maskclip_jax.segment.predict import iter_segmentations, prediction_settings

    if args.classes is None:
        raise UserError('a CLIP looks for what is named, but --classes is missing: --classes "dog, sofa" (see: --help)')
    classes = parse_classes(args.classes)
    options = common.reading_options(args, background=args.background is not None)
    settings = prediction_settings(classes, common.load_model(args), options)
    return lambda images: iter_segmentations(images, settings)


def find_images(paths: list[Path], out: Path | None = None) -> Iterator[Path]:
    """The files named, and all images of the folders named, sorted. Raises UserError where a folder has none.

    Of a folder, what an earlier run wrote is left out, and everything below `out` where `out` lies in the folder.
    """
    from maskclip_jax.data.decode import SOME_SUFFIXES, SUFFIXES
    from maskclip_jax.data.walk import files_below, is_below
    from maskclip_jax.segment.files import is_result

    written = None if out is None else os.path.realpath(out)
    for path in paths:
        if not os.path.isdir(path):  # Path.is_dir raises where a name is too long
            yield path
            continue
        found = [file for _, file in files_below(path, SUFFIXES)]
        inside = written is not None and os.path.realpath(path) != written
        kept = [
            file for file in found if not is_result(file) and not (inside and is_below(os.path.dirname(file), written))
        ]
        if not kept:
            what = "only results of an earlier run" if found else "none"
            raise UserError(f"a folder of images holds {SOME_SUFFIXES} files, but {path} has {what}: name another")
        if len(kept) < len(found):
            common.complain(f"{len(found) - len(kept)} results of earlier runs in {path} are no images", "note")
        yield from kept


def print_result(path: Path, result, most: int = 8) -> None:
    """The largest classes of one image, a line each."""
    present = sorted(((s.area, s.confidence, c) for c, s in result.scores.items() if s.area > 0), reverse=True)
    print(f"{path}")
    for area, confidence, name in present[:most]:
        print(f"  {name:<24} {100 * area:5.1f}% of the image   confidence {confidence:.2f}")
    if len(present) > most:
        print(f"  and {len(present) - most} smaller classes")
