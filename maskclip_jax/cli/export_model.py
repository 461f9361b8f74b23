"""A model as a file of another runtime: StableHLO, which JAX runs without this package, or ONNX.

    python run.py export-model runs/scenes --to stablehlo --out student.stablehlo
    python run.py export-model embedded --to onnx --size 448 448 --out words.onnx --classes "dog, sofa"

SOURCE is a student (a run's folder, a plain one, a hub id): then the file takes an image, uint8 RGB [1, H, W, 3]. Or it
is a CLIP: then it takes a text classifier [C, E] too, and any words are looked for; with --classes their rows are
written beside, as FILE.classifier.npy. Both give labels [1, H, W] and probabilities [1, H, W, C].

Pixels are normalised inside. Resize an image before as FILE.json says; it names classes, palette and versions too.
Without --size a StableHLO file takes sides of any multiples (FILE.json); an ONNX file has one size (docs/deploy.md).
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from maskclip_jax.cli import common

OTHER_FORMATS = {
    "tflite": "no converter from JAX was seen to work; write onnx, which phones run too",
    "savedmodel": "write stablehlo, and wrap it with jax2tf where TensorFlow is",
    "torchscript": "write onnx",
}
READ = ("templates", "short_side", "within", "method", "prompt_denoising", "key_smoothing")


def format_name(text: str) -> str:
    """An argument that names a format."""
    if text in ("stablehlo", "onnx"):
        return text
    remedy = OTHER_FORMATS.get(text.casefold(), "choose one of them")
    raise argparse.ArgumentTypeError(f"stablehlo or onnx, not {text!r}: {remedy}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model_arguments(parser, source=True)
    parser.add_argument("--to", type=format_name, required=True, metavar="FORMAT", help="stablehlo or onnx")
    parser.add_argument("--out", type=common.place, required=True, metavar="FILE", help="file to write")
    parser.add_argument(
        "--size", type=common.positive, nargs=2, metavar=("HEIGHT", "WIDTH"), help="the one size that it takes"
    )
    parser.add_argument("--classes", help="of a CLIP: words whose classifier is written beside")
    common.add_reading_arguments(parser, without=[name for name in common.READING if name not in READ])


def run(args: argparse.Namespace) -> None:
    from maskclip_jax.deploy.formats import check_format, write_model
    from maskclip_jax.deploy.functions import deployed_segmenter, deployed_student
    from maskclip_jax.distill import is_student

    common.output_file(args.out, (args.model,))
    size, rows = None if args.size is None else tuple(args.size), None
    student = is_student(args.model)
    if student:
        common.refuse_for_students(args, (), ("classes",))
    check_format(args.out, args.to)  # before anything is loaded
    if student:
        model = deployed_student(common.load_run(args), size)
    else:
        from maskclip_jax.data.vocabulary import class_palette, parse_classes
        from maskclip_jax.segment.classifier import text_classifier

        words = None if args.classes is None else parse_classes(args.classes)
        options, pretrained = common.reading_options(args, background=False), common.load_model(args)
        model = deployed_segmenter(pretrained, options, size)
        if words is not None:
            rows = text_classifier(pretrained, words, options.templates)
            names = [str(word) for word in words]
            model = model._replace(about=model.about | {"classes": names, "palette": class_palette(names).tolist()})
    about = write_model(model, args.out, args.to)
    print(f"wrote {args.out} ({args.out.stat().st_size / 2**20:.1f} MiB) and {args.out}.json")
    if rows is not None:
        print(f"wrote {write_rows(args.out, rows)}: {rows.shape[0]} classes × {rows.shape[1]}")
    for kind in ("inputs", "outputs"):
        print(f"  {kind}: " + ", ".join(f"{k} {v['dtype']} {list(v['shape'])}" for k, v in about[kind].items()))


def write_rows(out: Path, rows) -> Path:
    """A classifier beside the model's file."""
    import numpy as np

    from maskclip_jax.data.whole_files import write_bytes

    path, buffer = out.with_name(out.name + ".classifier.npy"), io.BytesIO()
    np.save(buffer, np.asarray(rows, np.float32))
    write_bytes(path, buffer.getvalue())
    return path
