"""Zip files read as folders are: members have names, contents and errors as files on disk have them."""

from __future__ import annotations

import dataclasses
import os
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maskclip_jax.data.decode import pixels_of
from maskclip_jax.data.whole_files import reason
from maskclip_jax.errors import UserError

_SMALL = 2**26  # bytes of a member that are unpacked whatever they are
_PIXEL_BYTES = 16  # of a larger one for each of its pixels: more than any format stores
_LONGEST = 4096  # letters of a path
_PIECE = 4096  # bytes asked for at once: zipfile unpacks bzip2 and LZMA without a limit of its own


class Archive:
    """A zip file's members as a tree; members are unpacked when they are read. For any number of threads."""

    def __init__(self, path: str | os.PathLike):
        """Raises UserError where this is no zip file, or a member's name leads out of it."""
        self.path = Path(path)
        self._lock, self._opened = threading.Lock(), {}
        self.folders: dict[str, dict[str, None]] = {"": {}}  # path of a folder -> names in it
        self.members: dict[str, str] = {}  # path -> the name it is stored under
        for stored in self._zip().namelist():
            name = stored.replace("\\", "/")  # Windows programs have written these, against the standard
            parts = [part for part in name.rstrip("/").split("/") if part != "."]
            if name.startswith("/") or ".." in parts or "" in parts or len(name) > _LONGEST:
                raise UserError(f"names in a zip file stay inside it, but {path} holds {stored[:80]!r}: pack it again")
            for depth in range(len(parts)):
                self.folders.setdefault("/".join(parts[:depth]), {})[parts[depth]] = None
            if name.endswith("/"):
                self.folders.setdefault("/".join(parts), {})
            else:
                self.members["/".join(parts)] = stored

    def read(self, member: str) -> bytes:
        """A member's content. Raises UserError: encrypted, damaged, or far larger than the image in it can be."""
        name = f"{self.path}!{member}"
        try:
            info = self._zip().getinfo(self.members[member])
            if info.flag_bits & 1:
                raise UserError(f"a zip file must be readable, but {name} is encrypted: pack it without a password")
            if info.file_size > _SMALL:
                self._check_size(name, info)
            with self._zip().open(info) as file:
                return b"".join(iter(lambda: file.read(_PIECE), b""))
        except (UserError, MemoryError):
            raise
        except Exception as error:  # BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, lzma's and others
            raise UserError(
                f"a zip file must be whole, but {name} is damaged ({reason(error)}): download or pack it again"
            ) from error

    def _check_size(self, name: str, info: zipfile.ZipInfo) -> None:
        with self._zip().open(info) as file:
            pixels = pixels_of(file)
        if info.file_size > _SMALL + _PIXEL_BYTES * pixels:
            raise UserError(
                f"an image has at most {_PIXEL_BYTES} bytes for each of its {pixels:,} pixels and {_SMALL >> 20} MB "
                f"besides, but {name} has {info.file_size:,} bytes unpacked: it is no image, so leave it out"
            )

    def _zip(self) -> zipfile.ZipFile:
        """Threads share one, which locks itself; a forked process, whose file position would be shared, has its own."""
        with self._lock:
            if os.getpid() not in self._opened:
                try:
                    self._opened = {os.getpid(): zipfile.ZipFile(self.path)}
                except Exception as error:  # a damaged list of members raises anything
                    raise UserError(
                        f"{self.path} is not a readable zip file ({reason(error)}): check the path, or pack it again"
                    ) from error
            return self._opened[os.getpid()]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_opened")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _opened={})


@dataclasses.dataclass(frozen=True)
class Member:
    """A file or folder in a zip file, used as a `Path` is; `inner` is "" for the whole archive."""

    archive: Archive
    inner: str = ""

    @property
    def name(self) -> str:
        """The last part."""
        return self.inner.rpartition("/")[2]

    def __truediv__(self, name: str) -> Member:
        return Member(self.archive, f"{self.inner}/{name}".strip("/"))

    def __str__(self) -> str:
        return f"{self.archive.path}!{self.inner}"

    def is_dir(self) -> bool:
        """Whether it is a folder, be it only that members lie in it."""
        return self.inner in self.archive.folders

    def is_file(self) -> bool:
        """Whether it can be read."""
        return self.inner in self.archive.members

    def iterdir(self) -> Iterator[Member]:
        """What lies in a folder."""
        return (self / name for name in self.archive.folders[self.inner])

    def read_bytes(self) -> bytes:
        """See `Archive.read`."""
        return self.archive.read(self.inner)
