"""How fast it is, how much of the machine that uses, and how much memory it takes.

    python -m experiments.benchmark all --budget 540 --torch-python /path/to/python --out out/benchmarks

Every case is a process of its own; those of a group take turns, so that whatever else runs meets them alike. Writes
OUT.md (also printed) and OUT.json (every single time). With PyTorch in the environment of `--torch-python` (any one; it
needs nothing else), the same computations in eager PyTorch take part. `label --images 500` alone is the whole corpus:
about ten minutes with ViT-B/16 on two cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.benchmark.cases import SECTIONS, groups
from experiments.benchmark.interleave import Rival, interleave
from experiments.benchmark.table import markdown
from maskclip_jax.cli.common import complain, positive, progress
from maskclip_jax.data.whole_files import write_json
from maskclip_jax.errors import UserError

DTYPES = ("float32", "bfloat16")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("section", nargs="?", choices=(*SECTIONS, "all"), default="all")
    p.add_argument("--quick", action="store_true", help="batch 1 only, fewer rivals, 16 images, three rounds")
    p.add_argument("--budget", type=positive, default=540, metavar="S", help="seconds that all of it may take (540)")
    p.add_argument("--rounds", type=positive, help="of each group at most (9; quick: 3)")
    p.add_argument("--dtype", choices=(*DTYPES, "both"), default="both", help="what ours computes in")
    p.add_argument(
        "--model", help="of dense, label and first-mask: ViT-B/16, RN50, SigLIP B/16, TIPS B/14 …; one of them alone"
    )
    p.add_argument("--batch", type=positive, help="of dense, instead of 1 and 8")
    p.add_argument("--images", type=positive, help="of label (32; quick: 16)")
    p.add_argument("--torch-python", metavar="PATH", help="an interpreter that can import torch")
    p.add_argument("--out", type=Path, default=Path("out/benchmarks"), help="OUT.md and OUT.json are written")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        report = measure(args)
        if not report["groups"]:
            return 2
        text = markdown(report)
        write_json(args.out.with_name(args.out.name + ".json"), report)
        args.out.with_name(args.out.name + ".md").write_text(text, encoding="utf-8")
    except UserError as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        print("stopped: nothing was written", file=sys.stderr)
        return 130
    print(text)
    return 2 if report["failed"] else 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything asked for, as JSON."""
    from experiments.benchmark.work import variant
    from maskclip_jax.checkpoints.load import EMBEDDED

    if args.model is not None and not (args.section == "first-mask" and args.model in EMBEDDED):
        variant(args.model)
    sections = SECTIONS if args.section == "all" else (args.section,)
    if args.torch_python is not None:
        check_torch(args.torch_python, "torch, transformers, PIL" if "first-mask" in sections else "torch")
    dtypes = list(DTYPES) if args.dtype == "both" else [args.dtype]
    plan: dict[str, list[Rival]] = {}
    for section in sections:
        plan |= groups(
            section,
            quick=args.quick,
            torch=args.torch_python,
            dtypes=dtypes,
            model=args.model,
            batch=args.batch,
            images=args.images or (16 if args.quick else 32),
        )
    out: dict[str, Any] = {"machine": machine(), "load": os.getloadavg()[0], "rates": [], "groups": {}, "failed": []}
    # Half of the budget for rounds: the other half goes by while processes start, compile, and weights are drawn.
    seconds = args.budget / 2 / len(plan)
    rounds = args.rounds or (3 if args.quick else 9)
    with progress("benchmarks", len(plan) + 1) as report:
        out["rates"] = machine_rates(dtypes)
        report(1)
        for number, (title, rivals) in enumerate(plan.items(), 2):
            print(f"{title}: {len(rivals)} rivals", file=sys.stderr)
            try:
                out["groups"][title] = interleave(rivals, seconds=seconds, rounds=rounds)
            except UserError as error:  # minutes of other groups are not thrown away for it
                complain(error, f"left out: {title}")
                out["failed"].append(title)
            report(number)
    out["load_after"] = os.getloadavg()[0]
    return out


def machine_rates(dtypes: list[str]) -> list[dict[str, Any]]:
    """Operations a second of matrix products, for every number of cores (1, 2, 4, …, all) and dtype."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = sorted({cores, *(2**n for n in range(cores.bit_length()) if 2**n < cores)})
    rows = []
    for dtype in dtypes:
        for threads in counts:
            rival = Rival(f"{dtype}, {threads}", "nothing", {"dtype": dtype}, threads=threads)
            (row,) = interleave([rival], seconds=2, rounds=4)
            rows.append({"dtype": dtype, "threads": threads, "matrix_flops": row["matrix_flops"]})
    return rows


def machine() -> str:
    """One line: processor, cores, load, versions."""
    import platform

    import jax

    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    versions = f"jax {jax.__version__}, Python {platform.python_version()}"
    return f"{name}, {os.cpu_count()} cores; {versions}; load before: {load}"


def check_torch(python: str, modules: str) -> None:
    """Raises UserError unless this interpreter has PyTorch, and what else the section's rival imports."""
    try:
        found = subprocess.run([python, "-c", f"import {modules}"], capture_output=True, check=False).returncode == 0
    except OSError:
        found = False
    if not found:
        raise UserError(f"--torch-python is an interpreter that can import {modules}, {python} is not: leave it out")


if __name__ == "__main__":
    sys.exit(main())
