"""Several hosts, one program: how they find each other, what they agree on, and sums over all of them.

The same command runs on every host. Where SLURM, Open MPI or a TPU pod started it, JAX finds the rest; elsewhere
three environment variables name it, on each host:

    MASKCLIP_COORDINATOR=10.0.0.1:1234  MASKCLIP_HOSTS=4  MASKCLIP_HOST=0   (to 3)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int64

from maskclip_jax.errors import UserError

VARIABLES = ("MASKCLIP_COORDINATOR", "MASKCLIP_HOSTS", "MASKCLIP_HOST")


def join_hosts(environment: Mapping[str, str] = os.environ, *, cluster: bool = False) -> None:
    """`jax.distributed.initialize()` when the environment asks for it; call it before anything else touches JAX.

    Args:
      environment: where `VARIABLES` are looked up; with none of them nothing happens, unless …
      cluster: … this is a cluster that JAX detects (SLURM, Open MPI, TPU pod).

    Raises:
      UserError: some but not all of the variables, or numbers that do not fit.
    """
    given = [name for name in VARIABLES if name in environment]
    if not given:
        if cluster:
            jax.distributed.initialize()
        return
    if len(given) != len(VARIABLES):
        missing = ", ".join(name for name in VARIABLES if name not in environment)
        raise UserError(f"several hosts need {', '.join(VARIABLES)}, but {missing} is missing: set it on every host")
    try:
        count, index = int(environment["MASKCLIP_HOSTS"]), int(environment["MASKCLIP_HOST"])
    except ValueError as error:
        raise UserError(f"MASKCLIP_HOSTS and MASKCLIP_HOST are whole numbers ({error}): correct them") from error
    if not 0 <= index < count:
        raise UserError(f"MASKCLIP_HOST is 0..{count - 1}, got {index}: number the hosts from 0")
    if count > 1:
        # Read when the CPU backend starts, and without effect on any other: CPU hosts communicate through gloo.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(environment["MASKCLIP_COORDINATOR"], count, index)


def is_first_host() -> bool:
    """Whether this host writes what one host writes for all."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every host has called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_host(flag: bool) -> bool:
    """Whether the flag is set on some host; all hosts call it together and get one answer."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def local_view(tree: Any) -> Any:
    """Replicated arrays as this host's devices hold them: what pmap returns, so the first step compiles for all."""
    return tree if jax.process_count() == 1 else _viewed(tree, jax.local_devices())


def global_view(tree: Any) -> Any:
    """The inverse of `local_view`, for orbax, which needs to know where an array lies. Nothing is copied."""
    return tree if jax.process_count() == 1 else _viewed(tree, jax.devices())


def _viewed(tree: Any, devices: Sequence[Any]) -> Any:
    mesh = jax.sharding.Mesh(np.asarray(devices), ("batch",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def view(x: jax.Array) -> jax.Array:
        return jax.make_array_from_single_device_arrays(x.shape, sharding, [s.data for s in x.addressable_shards])

    return jax.tree.map(view, tree)


def sum_over_hosts(counts: Int64[np.ndarray, "*shape"]) -> Int64[np.ndarray, "*shape"]:
    """Exact sum of 64-bit counts (JAX, 32-bit by default, carries them as two halves)."""
    if jax.process_count() == 1:
        return counts
    halves = np.stack([counts >> 32, counts & 0xFFFFFFFF]).astype(np.uint32)
    gathered = np.asarray(multihost_utils.process_allgather(halves)).astype(np.int64)
    return ((gathered[:, 0] << 32) + gathered[:, 1]).sum(axis=0)
