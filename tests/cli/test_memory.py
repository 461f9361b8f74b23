"""The allocator's setting shows in page faults: memory that is kept is not fetched again."""

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, resource, sys
from maskclip_jax.cli.process import keep_memory
if "keep" in sys.argv and not keep_memory():
    sys.exit(3)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
for n in range(4):
    if n == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory = libc.malloc(2**26)
    ctypes.memset(memory, 1, 2**26)
    libc.free(memory)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*arguments: str) -> int:
    result = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False)
    if result.returncode == 3:
        pytest.skip("no glibc here")
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


GIVEN_BACK = """
import ctypes, sys
from pathlib import Path
import jax
from maskclip_jax.cli.process import give_back_after_compiling, keep_memory
from maskclip_jax.ops.compile_count import COMPILED
from maskclip_jax.ops.memory import resident_bytes
if not keep_memory():
    sys.exit(3)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
resident = lambda: resident_bytes() / 2**20
compiling, stays = libc.malloc(2**27), libc.malloc(2**10)  # what stays is above: without a word nothing can be trimmed
ctypes.memset(compiling, 1, 2**27)
libc.free(compiling)
held = resident()
give_back_after_compiling()
jax.monitoring.record_event_duration_secs(COMPILED, 0.1)
print(round(held - resident()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_what_compiling_took_is_given_back():
    result = subprocess.run([sys.executable, "-c", GIVEN_BACK], capture_output=True, text=True, check=False)
    if result.returncode == 3:
        pytest.skip("no glibc here")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 100  # MiB of 128


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_kept_memory_is_not_fetched_again():
    kept = faults("keep")
    assert faults() > kept + 50  # 64 MiB three times, in pages of 4 KiB to 2 MiB
