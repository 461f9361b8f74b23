"""The process of one of our cases: `python -m experiments.benchmark.worker '{"kind": "dense", …}'`."""

from __future__ import annotations

import time
from collections.abc import Callable

from experiments.benchmark.worker_pipe import read_spec, serve
from maskclip_jax.cli.process import give_back_after_compiling, keep_memory


def matrix_rate(dtype: str, side: int) -> Callable[[], tuple[float, float]]:
    """Measures operations a second of `dtype` products (bfloat16: summed in float32): of the clock, and of CPU time.

    The best of four, for whoever else works here takes some of each.
    """
    import jax
    import jax.numpy as jnp

    x = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a, b: jax.lax.dot(a, b, preferred_element_type=jnp.float32)).lower(x, x).compile()
    product(x, x).block_until_ready()

    def measure() -> float:
        seconds, cpu = [], []
        for _ in range(4):
            began, cpu_began = time.perf_counter(), time.process_time()
            product(x, x).block_until_ready()
            seconds.append(time.perf_counter() - began)
            cpu.append(time.process_time() - cpu_began)
        return 2 * side**3 / min(seconds), 2 * side**3 / min(cpu)

    return measure


def main() -> None:
    spec, out = read_spec()
    if spec["keep_memory"]:
        keep_memory()
        give_back_after_compiling()
    import jax

    from experiments.benchmark.first_mask import first_mask
    from experiments.benchmark.labelling import label
    from experiments.benchmark.work import beside, dense, nothing, smoothing, train
    from maskclip_jax.ops.compile_count import count_compiles

    options = spec["options"]
    rate = matrix_rate(options.get("dtype", "float32"), spec["side"])
    device = jax.devices()[0]

    def gather() -> dict:
        stats = device.memory_stats() or {}  # None on CPU, where the process's own memory is it
        peak = {"peak_mib": stats["peak_bytes_in_use"] / 2**20} if "peak_bytes_in_use" in stats else {}
        return peak | case.facts | {"compiles": count.programs, "compile_seconds": count.seconds}

    cases = {"dense": dense, "smoothing": smoothing, "train": train, "label": label, "nothing": nothing}
    cases |= {"first mask": first_mask, "backbone": beside}
    case = cases[spec["kind"]](**options)
    facts = {"flops": case.flops, "images": case.images, "device": device.device_kind, "platform": device.platform}
    with count_compiles() as count:  # from the first run on: what it takes to make the case is no part of it
        serve(out, case.run, facts, rate, gather)


if __name__ == "__main__":
    main()
