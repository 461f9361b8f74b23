"""Where devices are driven: one program over all of them, arrays on all of them, and few arrays to hand over.

Each array that a program takes or gives costs the main thread some microseconds a device. A ResNet-101's training state
has 881, of which 661 are vectors (batch norm's scales, biases, statistics, and their momenta) with 2 of its 613 MiB.
`pack` makes those one array, so that 221 cross; larger arrays stay as they are, for they would be copied.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from maskclip_jax.ops.hosts import shardings

AXIS = "batch"  # of the devices: gradients and batch statistics are summed over it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A tree of arrays, its vectors one after the other. A pytree; `unpack` is the tree again."""

    vectors: dict[str, Any]  # by dtype, one array [N] each (any leaf: trees of shapes and axes are made of it too)
    others: list[Any]
    layout: tuple[Any, tuple[tuple[str, int] | None, ...]] = dataclasses.field(metadata={"static": True})
    """The tree's structure, and each leaf's (dtype, size) where it is a vector."""


def over_devices(function: Callable, **options: Any) -> Callable:
    """The one place where programs are made for several devices; the functions have only the name of the axis."""
    return jax.pmap(function, axis_name=AXIS, **options)


def replicate(tree: Any) -> Any:
    """`tree` on every device, as the steps take and return it."""
    _, everywhere = shardings(jax.devices())
    return jax.device_put(tree, everywhere)


def pack(tree: Any) -> Packed:
    """Joins a tree's vectors, also while a program is traced. Other arrays are the tree's own, not copies."""
    leaves, structure = jax.tree.flatten(tree)
    kinds = tuple((str(x.dtype), x.size) if x.ndim == 1 else None for x in leaves)
    groups: dict[str, list[Array]] = {}
    for x, kind in zip(leaves, kinds, strict=True):
        if kind is not None:
            groups.setdefault(kind[0], []).append(x)
    vectors = {name: _joined(group) for name, group in groups.items()}
    return Packed(vectors, [x for x in leaves if x.ndim != 1], (structure, kinds))


def unpack(packed: Packed) -> Any:
    """The tree that was packed, also while a program is traced: its vectors as copies, all else as it is."""
    structure, kinds = packed.layout
    sizes = {name: [kind[1] for kind in kinds if kind is not None and kind[0] == name] for name in packed.vectors}
    vectors = {name: iter(_parted(packed.vectors[name], sizes[name])) for name in packed.vectors}
    others = iter(packed.others)
    return jax.tree.unflatten(structure, [next(others if kind is None else vectors[kind[0]]) for kind in kinds])


def takes_packed(step: Callable) -> Callable:
    """`step(state, …) -> (state, …)` that takes a packed state too, and then gives one."""

    @functools.wraps(step)
    def either(state: Any, *arguments: Any) -> tuple[Any, Any]:
        if not isinstance(state, Packed):
            return step(state, *arguments)
        after, found = step(unpack(state), *arguments)
        return pack(after), found

    return either


def _joined(vectors: list[Array]) -> Array:
    if isinstance(vectors[0], Tracer):
        return jnp.concatenate(vectors)
    return jax.device_put(np.concatenate([np.asarray(x) for x in vectors]), vectors[0].sharding)  # compiles nothing


def _parted(joined: Array, sizes: list[int]) -> list[Array]:
    ends = np.cumsum(sizes)
    if not isinstance(joined, Tracer):
        return jax.device_put(np.split(np.array(joined), ends[:-1]), joined.sharding)
    # Indices, not slices: XLA's CPU backend compiles every slice for itself (23 s for 354), and alike programs once.
    indices = np.split(np.arange(ends[-1], dtype=np.int32), ends[:-1])
    return [joined.at[index].get(mode="promise_in_bounds", unique_indices=True) for index in indices]
