"""What a command sets for its whole process: freed memory is kept, and so are compiled programs; garbage is rare.

For commands, not for libraries; both are made before JAX is imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import Any

from maskclip_jax.data.whole_files import cache_folder

PROGRAM_BYTES = 2**29  # of compiled programs on disk; the least recently used go first
_CACHE_SETTINGS = {"jax_compilation_cache_max_size": PROGRAM_BYTES, "jax_persistent_cache_min_compile_time_secs": 0.1}
# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def keep_memory() -> bool:
    """Tells glibc's malloc to keep what is freed; True where there is such a malloc, elsewhere nothing happens.

    XLA's CPU backend allocates its temporaries anew for every run. By default glibc maps each large one afresh, and
    the system then clears it page by page: filling 50 MB takes 38 ms of CPU time so, and 14 ms with kept memory. The
    process then stays as large as it once was. Best made before the process's first threads start.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**28))
    return sum(mallopt(*setting) for setting in settings) == len(settings)


def collect_less_often() -> None:
    """Lets Python look for garbage in cycles after 50,000 new objects, not 700.

    JAX makes millions of objects while it traces, hardly any of them in cycles: of a first mask's 3.6 CPU seconds the
    default spends 0.45 on looking, this 0.2.
    """
    gc.set_threshold(50_000, 5, 5)


def give_back_after_compiling() -> None:
    """What compiling took goes back to the system, every time, before the program runs. Imports JAX.

    A ResNet-101's step takes 0.7 GiB to compile, and the temporaries it then runs in are one block that fits nowhere in
    between: a process that keeps its memory would hold both to its end.
    """
    import jax

    from maskclip_jax.ops.compile_count import COMPILED
    from maskclip_jax.ops.memory import trim

    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: event == COMPILED and trim())


def keep_programs() -> Path | None:
    """Sets JAX's persistent compilation cache, so that the next run of a command compiles nothing: the folder taken.

    None (and nothing is set) where JAX is imported, and where `program_settings` has no folder.
    """
    if "jax" in sys.modules or not (settings := program_settings()):
        return None
    for name, value in settings.items():
        os.environ.setdefault(name.upper(), str(value))
    return settings["jax_compilation_cache_dir"]


def program_settings() -> dict[str, Any]:
    """JAX's settings of its persistent compilation cache; none where it has a folder already or can have none.

    The folder is `programs-…` in `cache_folder()`, one for each kind of processor, for a home may be shared by several.
    It can have none where nobody may write to it, and without `filelock`, which JAX needs to keep it bounded.
    """
    folder = cache_folder()
    if folder is None or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return {}
    if importlib.util.find_spec("filelock") is None:
        return {}
    folder = folder / f"programs-{_processor()}"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        return {}
    return {"jax_compilation_cache_dir": folder.absolute()} | _CACHE_SETTINGS


def _processor() -> str:
    """Eight digits that differ between processors with other instructions: a program of one may crash on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        named = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    except OSError:
        named = []
    kind = "\n".join(sorted(set(named))) or f"{platform.machine()} {platform.processor()}"
    return hashlib.blake2b(kind.encode(), digest_size=4).hexdigest()
