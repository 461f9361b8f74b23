"""A least-recently-used cache bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Memory(Generic[T]):
    """At most `budget` bytes of values (but always the last one), by key. For one thread at a time."""

    def __init__(self, budget: int):
        self.budget = budget
        self.nbytes = 0
        self._values: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> T | None:
        """The value, now the last one used; None where there is none, or no longer."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: Hashable, value: T, nbytes: int) -> T:
        """Keeps a value that takes `nbytes`, in the place of an older one of that key, and returns it."""
        if key in self._values:
            self.nbytes -= self._values.pop(key)[1]
        self._values[key] = value, nbytes
        self.nbytes += nbytes
        while self.nbytes > self.budget and len(self._values) > 1:
            _, (_, freed) = self._values.popitem(last=False)
            self.nbytes -= freed
        return value
