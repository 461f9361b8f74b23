"""Dense reading and training step on one GPU, beside PyTorch eager and compiled, in one process and in turns.

    XLA_PYTHON_CLIENT_MEM_FRACTION=.45 python -m experiments.benchmark.gpu --out out/gpu.json

Needs JAX and PyTorch for the same card. Prints a line for each case: the median of `--rounds` rounds, ms an image.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax

from experiments.benchmark import labelling, work
from maskclip_jax.data.whole_files import write_json

Runs = dict[str, Callable[[], None]]
sys.path.insert(0, str(Path(__file__).parent))  # torch_worker imports its neighbour by its bare name


def finished(run: Callable[[], None]) -> Callable[[], None]:
    """PyTorch's work, to its end."""
    import torch  # pyright: ignore[reportMissingImports]: of another environment

    def whole() -> None:
        run()
        torch.cuda.synchronize()

    return whole


def dense(model: str, batch: int, dtype: str, compiled: bool) -> tuple[Runs, work.Case]:
    """Dense logits at 512²: name -> one run of the same work, and ours."""
    import torch  # pyright: ignore[reportMissingImports]
    import torch_worker

    ours = work.dense(model, batch, 512, dtype)
    out = {"ours": ours.run}
    with torch.device("cuda"):
        out["PyTorch, released code's work"] = finished(torch_worker.dense(model, batch, 512, dtype, "released"))
        eager = torch_worker.dense(model, batch, 512, dtype)
        out["PyTorch, fused attention"] = finished(eager)
        if compiled:
            out["PyTorch, compiled"] = finished(torch.compile(torch_worker.dense(model, batch, 512, dtype)))
    return out, ours


def step(model: str, batch: int, dtype: str, compiled: bool) -> tuple[Runs, work.Case]:
    """A training step of the ResNet-101 DeepLabv2 at 512²."""
    import torch  # pyright: ignore[reportMissingImports]
    import torch_worker

    ours = work.train("resnet101", batch, 512, dtype=dtype)
    with torch.device("cuda"):
        theirs = finished(torch_worker.train(batch, 512, dtype=dtype))
    return {"ours": ours.run, "PyTorch": theirs}, ours


def label(model: str, batch: int, dtype: str, compiled: bool) -> tuple[Runs, work.Case]:
    """`label` from JPEG to file, 16 batches."""
    ours = labelling.label("all", model, 16 * batch, batch, dtype)
    return {"ours": ours.run}, ours


def matrix_rate(dtype: str, side: int = 8192) -> float:
    """Operations a second of a square product, the best of ten."""
    x = jax.random.normal(jax.random.key(0), (side, side), dtype)
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    best = min(timed(lambda: product(x).block_until_ready()) for _ in range(10))
    return 2 * side**3 / best


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dense", nargs="*", default=["ViT-B/16", "ViT-L/14"], help="models whose dense reading is timed")
    p.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    p.add_argument("--step", nargs="*", type=int, default=[16], help="batches that the student learns from")
    p.add_argument("--label", nargs="*", type=int, default=[8], help="batches of `label` with ViT-B/16")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--compiled", action="store_true", help="torch.compile takes part: half a minute each")
    p.add_argument("--budget", type=float, default=120, help="seconds after which no new case begins")
    p.add_argument("--out", type=Path)
    args = p.parse_args()
    began, rate, rows = time.monotonic(), matrix_rate(args.dtype), []
    print(f"{jax.devices()[0].device_kind}: {rate / 1e12:.0f} TFLOP/s in {args.dtype} products", flush=True)
    cases = [("dense", *case) for case in itertools.product(args.dense, args.batches)]
    cases += [("step", "ResNet-101", batch) for batch in args.step]
    cases += [("label", "ViT-B/16", batch) for batch in args.label]
    for kind, model, batch in cases:
        if time.monotonic() - began > args.budget:
            print(f"{kind} {model}, batch {batch}: not measured, the budget is spent")
            continue
        runs, ours = {"dense": dense, "step": step, "label": label}[kind](model, batch, args.dtype, args.compiled)
        for run in runs.values():  # compile, then once warm
            run()
            run()
        times = {name: [] for name in runs}
        for _ in range(args.rounds if kind != "label" else 3):
            for name, run in runs.items():
                times[name].append(timed(run))
        for name, all_times in times.items():
            seconds = statistics.median(all_times)
            row = {"case": kind, "model": model, "batch": batch, "rival": name, "seconds": seconds}
            row |= {"share": ours.flops / seconds / rate, "fastest": min(all_times), "slowest": max(all_times)}
            rows.append(row)
            print(
                f"{kind:<5} {model:<10} batch {batch:<3} {name:<30} {1e3 * seconds / ours.images:7.2f} ms an image "
                f"({1e3 * min(all_times) / ours.images:.2f}-{1e3 * max(all_times) / ours.images:.2f}), "
                f"{100 * row['share']:.0f}% of the matrix rate",
                flush=True,
            )
        del runs
        jax.clear_caches()
    if args.out:
        write_json(args.out, {"device": jax.devices()[0].device_kind, "matrix_rate": rate, "rows": rows})


if __name__ == "__main__":
    main()
