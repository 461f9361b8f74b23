"""XLA's flags in tests, which compile far more than they compute.

With these, XLA takes an eighth of the time to compile, and the programs run a few times slower. `XLA_FLAGS= pytest …`
compiles as users do; the demo in the gate does.
"""

import os
from importlib.metadata import version

_JAXLIB = tuple(map(int, version("jaxlib").split(".")[:2]))
# From 0.11 on there is but one kind of them, and a process that gives a flag which jaxlib does not know is ended.
_FUSIONS = ("--xla_cpu_use_fusion_emitters=false",) if _JAXLIB < (0, 11) else ()
QUICK = " ".join(
    (
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        *_FUSIONS,
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_multi_thread_eigen=false",  # two test processes on two cores: threads only get in each other's way
    )
)


def with_devices(count: int) -> str:
    """XLA_FLAGS of a child process that has `count` CPU devices and compiles as this one does."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
