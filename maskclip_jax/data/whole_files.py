"""Files written whole or not at all (temporary name, then rename), bounded strict JSON, and a lock.

What a crash or a full disk leaves is either the file before or the file after, also when the power fails: contents
reach the disk (fsync) before the name does. What is read may have been damaged by others all the same, so that every
reader here raises `UserError` in one line, and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from maskclip_jax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # how JSON writes half of a pair of surrogates
MOST_JSON = 64 * 2**20  # bytes: a tokenizer.json has a few MB, the JSON of a shard of 100,000 images 40


def cut(value: Any, most: int = 200) -> str:
    """`value` as text on one line of at most `most` characters, for messages."""
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text[: 4 * most].split())
    return text if len(text) <= most else f"{text[: most - 2]} …"


def as_text(value: str | os.PathLike) -> str:
    """A path as text that any encoding takes: bytes of a file name that are not UTF-8 become backslashed."""
    return os.fspath(value).encode(errors="surrogateescape").decode(errors="backslashreplace")


def reason(error: BaseException, most: int = 200) -> str:
    """Why something failed, for a message; a full disk always in the system's words."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and not isinstance(error, UserError):
        return error.strerror
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):  # tensorstore, array_record, safetensors
        if os.strerror(number) in text or (number == errno.ENOSPC and "RESOURCE_EXHAUSTED" in text):
            return os.strerror(number)
    return cut(text, most) or type(error).__name__


def shipped(*parts: str) -> Path:
    """A file or folder of the installed package, `shipped("assets", "scenes")`. Raises UserError where it lacks it."""
    path = Path(str(resources.files("maskclip_jax").joinpath(*parts)))
    if not path.exists():
        raise UserError(f"a part of the package, {path}, is missing: install the package again")
    return path


def read_bytes(path: str | os.PathLike, most: int = MOST_JSON) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises UserError."""
    path = Path(path)
    try:
        if not path.is_file():
            what = "is a folder or a device" if path.exists() else "is not there"
            raise UserError(f"{path} must be a file, but it {what}: check the path")
        size = path.stat().st_size
        if size > most:
            raise UserError(f"{path} must have at most {most:,} bytes, but has {size:,}: take the original file")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} must be readable, but is not ({reason(error)}): check it") from error


def changed_at(path: str | os.PathLike, *, or_moved: bool = False) -> int:
    """When a file was changed last (or moved or linked, which keep the file's own time), in ns; 0: it is not there."""
    try:
        found = os.stat(path)
        return max(found.st_mtime_ns, found.st_ctime_ns) if or_moved else found.st_mtime_ns
    except OSError:
        return 0


def read_json(
    path: str | os.PathLike, *, kind: type | None = dict, most: int = MOST_JSON, surrogates: bool = False
) -> Any:
    """The value in a JSON file of at most `most` bytes, strict as `parse_json`. Raises UserError."""
    return parse_json(read_bytes(path, most), path, kind=kind, surrogates=surrogates)


def parse_json(data: bytes, where: str | os.PathLike, *, kind: type | None = dict, surrogates: bool = False) -> Any:
    """Strict JSON in UTF-8: finite numbers only, no lone surrogates, not nested too deeply.

    Args:
      data: the file's content; a byte order mark is allowed.
      where: what the message calls it.
      kind: type of the outermost value (dict, list), None for any.
      surrogates: allow lone ones, which stand for the bytes of a file name that is not UTF-8.

    Raises:
      UserError: it is anything else.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=_no_number, parse_float=_finite)
        if not surrogates and _HALF.search(data):
            json.dumps(value, ensure_ascii=False).encode()  # half of a pair of surrogates has no bytes
    except (ValueError, RecursionError) as error:  # UnicodeError, JSONDecodeError, 5,000 digits
        why = "nothing is in it" if not data.strip() else cut(str(error))
        raise UserError(f"{where} is not valid JSON ({why}): copy it, or have it made, again") from error
    if kind is not None and not isinstance(value, kind):
        wanted = {dict: "an object", list: "a list"}.get(kind, kind.__name__)
        raise UserError(f"{where} must hold {wanted}, got a {type(value).__name__}: take the original file")
    return value


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    if math.isfinite(value := float(text)):
        return value
    raise ValueError(f"{cut(text, 40)} is too large for a number")


def is_count(value: Any, most: int = 2**63 - 1) -> bool:
    """Whether a JSON value is a whole number within 0..most (true and false are none)."""
    return type(value) is int and 0 <= value <= most


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Writes `obj` as indented UTF-8 JSON. NumPy scalars and arrays are written as numbers and lists; NaN as null."""
    write_bytes(path, json_bytes(obj))


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file, whole or not at all. Raises UserError as `atomic_path` does."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def json_bytes(obj: Any) -> bytes:
    """The bytes of the file that `write_json` writes; lone surrogates become JSON's own escapes."""
    return json_text(obj).encode(errors="backslashreplace")


def json_text(obj: Any) -> str:
    """The text of the file that `write_json` writes (see there)."""
    return json.dumps(_plain(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(obj: Any) -> Any:
    if isinstance(obj, dict):
        return {str(key): _plain(value) for key, value in obj.items()}
    if hasattr(obj, "tolist"):  # arrays and scalars of NumPy, without importing NumPy
        return _plain(obj.tolist())
    if isinstance(obj, list | tuple):
        return [_plain(value) for value in obj]
    if isinstance(obj, float) and not math.isfinite(obj):
        return None  # JSON has no NaN: readers other than Python's would fail on it
    return obj


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary name beside `path` to write to; a clean exit renames it to `path`, an error removes it.

    The folder is created when it is missing. Raises UserError when the system refuses (no permission, disk full …).
    """
    path = Path(path)
    start = os.fsencode(path.name)[:64].decode(errors="ignore")  # systems count a name's bytes, not its characters
    temporary = path.with_name(f".{start}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"an output file must be writable, but {path} is not ({reason(error)}): make room, or choose another"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path, what: str) -> Iterator[Path]:
    """Yields a temporary folder beside `path` to fill; a clean exit renames it to `path`, an error removes it.

    Raises UserError, which calls it `what`, where `path` exists or anything fails: a full disk has many names.
    """
    if os.path.lexists(path):
        raise UserError(f"{what} is written to a new folder, but {path} exists: choose another name")
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")  # short, and ASCII for tensorstore, whatever `path` is
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(path)
    except UserError:
        raise
    except Exception as error:  # OSError, ValueError of tensorstore, those of tokenizers and safetensors
        raise UserError(
            f"{what} must be writable, but {path} is not ({reason(error)}): make room, or choose another"
        ) from error
    finally:
        remove_surely(temporary)


def remove_surely(folder: Path) -> None:
    """Removes a folder that threads may still be writing to after an error."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def sync(path: Path) -> None:
    """Returns when a file's content is on the disk: a rename that outlives the power must not name an empty file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(path: str | os.PathLike, what: str) -> Iterator[None]:
    """Holds the lock file `path` and removes it; the system frees it when the process ends, however it ends.

    Where the file system (or the platform) has no locks there is none.

    Args:
      path: the file, made when missing; it names the process with the lock.
      what: the folder or part that is locked, for the message.

    Raises:
      UserError: another process has it.
    """
    path = Path(path)
    handle = _lock(path, what)
    try:
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)  # while held: a process that has opened it meanwhile notices (see below)
            os.close(handle)


def _lock(path: Path, what: str) -> int | None:
    while fcntl is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:  # a folder that cannot be written: the writer's error is clearer
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle).st_ino != os.stat(path).st_ino:
                raise FileNotFoundError  # removed and made again meanwhile: the lock is of a file without a name
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return handle
        except BlockingIOError:
            who = cut(os.pread(handle, 300, 0).decode(errors="replace")) or "another process"
            os.close(handle)
            raise UserError(f"{what} is worked on by one run at a time, but {who} is at it: wait for it") from None
        except FileNotFoundError:
            os.close(handle)
        except OSError:  # no locks here, or a full disk: the lock holds without its text
            return handle
    return None


def cache_folder() -> Path | None:
    """$MASKCLIP_JAX_CACHE, else maskclip_jax in $XDG_CACHE_HOME or in ~/.cache; None where there is no home (an unknown
    user without $HOME). A relative $XDG_CACHE_HOME is none, as its specification says."""
    if named := os.environ.get("MASKCLIP_JAX_CACHE"):
        return Path(named)
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    with contextlib.suppress(RuntimeError):
        return (caches if caches.is_absolute() else Path.home() / ".cache") / "maskclip_jax"
    return None
