"""Several hosts, one program: how they find each other and end together, what they agree on, sums over all of them.

The same command runs on every host. Where SLURM, Open MPI or a TPU pod started it, JAX finds the rest; elsewhere
three environment variables name it, on each host:

    MASKCLIP_COORDINATOR=10.0.0.1:1234  MASKCLIP_HOSTS=4  MASKCLIP_HOST=0   (to 3)

A host that waits for another in a sum cannot be told in that sum that the other has failed. Within `ending_together`
it reads so from a file that the failing one leaves in a folder that all see; one that was killed gives no more signs
of life. JAX would tell of that too, but sometimes only by aborting the process, without a word that helps. That is how
the others end when host 0 is killed, within a second: it holds what all ask for signs, and Python cannot prevent it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int64

from maskclip_jax.errors import UserError

VARIABLES = ("MASKCLIP_COORDINATOR", "MASKCLIP_HOSTS", "MASKCLIP_HOST")
SILENCE, SILENCE_FOR_JAX = 15, 60  # seconds without a sign of life after which a host counts as dead
LOOK_EVERY, TIME_TO_READ = 1.0, 5.0  # seconds: between looks for a failed host's words, and how long they stay there


class StoppedTogether(KeyboardInterrupt):
    """A stop that all hosts take at the same step: nobody has to be told."""


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
            jax.distributed.initialize(heartbeat_timeout_seconds=SILENCE_FOR_JAX)
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
        jax.distributed.initialize(
            environment["MASKCLIP_COORDINATOR"], count, index, heartbeat_timeout_seconds=SILENCE_FOR_JAX
        )


@contextlib.contextmanager
def ending_together(folder: str | Path) -> Iterator[None]:
    """Whatever ends one host within this block ends all of them, in seconds and with its words; all hosts enter it.

    For programs, not for libraries: with several hosts, the *process* ends, with 2 (130 where it was interrupted), for
    Python's own way out waits for the others. One host alone is left as it is; so is `StoppedTogether`.

    Args:
      folder: one that all hosts see. It need not exist, and is left as it was.
    """
    if jax.process_count() == 1:
        yield
        return
    # Nothing that an earlier run left there has this name.
    name = int(multihost_utils.broadcast_one_to_all(np.frombuffer(os.urandom(4), np.uint32)[0]))
    words, over = Path(folder).expanduser() / f".ended-{name:08x}", threading.Event()
    leaving = threading.Lock()  # whoever takes it ends the process; the other thread waits for that
    signs = _SignsOfLife(name)
    watcher = threading.Thread(target=_watch, args=(words, over, leaving, signs), daemon=True)
    watcher.start()
    try:
        yield
    except StoppedTogether:
        raise
    except BaseException as error:
        line = _last_words(error)
        leaving.acquire()
        _leave_words(words, line)
        _exit(line)
    finally:
        over.set()
        watcher.join(2 * LOOK_EVERY)
        signs.give(_SignsOfLife.LEFT)


class _SignsOfLife:
    """Every host's counter, in the key-value store of JAX's coordinator, which has no public door."""

    LEFT = "left"

    def __init__(self, name: int):
        from jax._src.distributed import global_state

        self._client: Any = global_state.client
        self._prefix, self._count = f"maskclip_jax/signs/{name:08x}/", 0
        self._seen: dict[int, tuple[str, float]] = {}

    def give(self, sign: str) -> None:
        """Puts this host's sign in the store, if that can be reached."""
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{self._prefix}{jax.process_index()}", sign, allow_overwrite=True)

    def count(self) -> None:
        """Gives a sign that differs from the one before."""
        self._count += 1
        self.give(str(self._count))

    def silent_host(self) -> int | None:
        """Which host has given no sign for `SILENCE` seconds, if any; none where nobody can know."""
        now = time.monotonic()
        try:
            signs = dict(self._client.key_value_dir_get(self._prefix))
        except Exception:  # another JAX's store, or host 0 is gone: JAX tells of that
            return None
        for host in range(jax.process_count()):
            sign = signs.get(f"{self._prefix}{host}", "")
            if host not in self._seen or self._seen[host][0] != sign or sign == self.LEFT:
                self._seen[host] = sign, now
        return next((host for host, (_, at) in self._seen.items() if now - at > SILENCE), None)


def _watch(words: Path, over: threading.Event, leaving: threading.Lock, signs: _SignsOfLife) -> None:
    """Ends this host when another one's last words are there, whatever its main thread waits for.

    Who is silent is asked by the first host alone, which says it to all: of n hosts that all asked, each second would
    take n² answers of one coordinator.
    """
    while not over.wait(LOOK_EVERY):
        signs.count()
        if is_first_host() and (silent := signs.silent_host()) is not None:
            line = _of_hosts(f"no sign of life from host {silent} for {SILENCE} s")
            leaving.acquire()
            _leave_words(words, line)
            _exit(line)
        with contextlib.suppress(OSError, UnicodeError):
            line = words.read_text(encoding="utf-8")
            leaving.acquire()
            _say(line)
            if is_first_host():  # JAX's coordinator: without it the others would be aborted before they have left
                time.sleep(2 * TIME_TO_READ)
            _exit(line)


def _last_words(error: BaseException) -> str:
    """What the hosts say of an error: a line; of one that is nobody's input the traceback is printed here too."""
    text = " ".join(str(error).split())[:2000]
    if isinstance(error, KeyboardInterrupt):
        return f"stopped: host {jax.process_index()}: {text or 'interrupted'}: run the same command again to go on"
    if isinstance(error, jax.errors.JaxRuntimeError):
        return _of_hosts(text[:300])
    if not isinstance(error, UserError | OSError):
        traceback.print_exception(error)
        text = f"{type(error).__name__}: {text}"
    return f"error: host {jax.process_index()}: {text}"


def _of_hosts(why: str) -> str:
    what = "the hosts work together, but another one is gone, or a device failed"
    return f"error: host {jax.process_index()}: {what} ({why}): start all again"


def _leave_words(words: Path, line: str) -> None:
    """Puts the line where the others look, whole or not at all, and takes it back when they have had time to read."""
    made = not words.parent.exists()
    with contextlib.suppress(OSError):  # a folder that nobody can write to: the others miss this host's signs of life
        words.parent.mkdir(parents=True, exist_ok=True)
        unfinished = words.with_name(f"{words.name}.{jax.process_index()}")
        unfinished.write_text(line, encoding="utf-8", errors="backslashreplace")
        unfinished.replace(words)
    _say(line)
    time.sleep(TIME_TO_READ)
    with contextlib.suppress(OSError):
        words.unlink(missing_ok=True)
        if made:
            words.parent.rmdir()


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()


def _exit(line: str) -> None:
    os._exit(130 if line.startswith("stopped") else 2)


@contextlib.contextmanager
def stop_signals(handler: Any) -> Iterator[Callable[[], None]]:
    """Within, Ctrl-C and SIGTERM go to `handler` (`signal.SIG_IGN`: to nobody); yields what gives them back early.
    Threads other than the main one, which alone may say where signals go, change nothing."""
    before: dict[int, Any] = {}

    def give_back() -> None:
        while before:
            number, own = before.popitem()
            signal.signal(number, signal.SIG_DFL if own is None else own)  # None: no Python function's

    if threading.current_thread() is threading.main_thread():
        before |= {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield give_back
    finally:
        give_back()


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


def shardings(devices: Sequence[Any]) -> tuple[jax.sharding.NamedSharding, jax.sharding.NamedSharding]:
    """How arrays lie on these devices: split along their first axis, or whole on each."""
    mesh, spec = jax.sharding.Mesh(np.asarray(devices), ("batch",)), jax.sharding.PartitionSpec
    return jax.sharding.NamedSharding(mesh, spec("batch")), jax.sharding.NamedSharding(mesh, spec())


def local_view(tree: Any) -> Any:
    """Replicated arrays as this host's devices hold them: what pmap returns, so the first step compiles for all."""
    return tree if jax.process_count() == 1 else _viewed(tree, jax.local_devices())


def global_view(tree: Any) -> Any:
    """The inverse of `local_view`, for orbax, which needs to know where an array lies. Nothing is copied."""
    return tree if jax.process_count() == 1 else _viewed(tree, jax.devices())


def _viewed(tree: Any, devices: Sequence[Any]) -> Any:
    _, sharding = shardings(devices)

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
