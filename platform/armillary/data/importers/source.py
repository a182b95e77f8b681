"""Where an import reads from: one file or a folder, local or on S3, never beyond it, never more than it should."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, cast

from armillary.data.images import MAX_BYTES, UnreadableImage
from armillary.data.layout import filesystem_of
from armillary.spec.errors import UserError, WorkFailed

if TYPE_CHECKING:
    pass

# Text and images compress less than this; what unpacks further after so many bytes is a decompression bomb.
MAX_RATIO = 200
MAX_LINE = 2**20
_RATIO_FREE = 64 * 2**20


@dataclass(frozen=True)
class SourceFile:
    """A file of a source: its path inside it, and what tells whether it has changed."""

    path: str
    size: int
    changed: int


class Source:
    """A file or a folder to import from.

    Args:
        location: a local path or an ``s3://`` URL.
        kind: the kind of import, for messages.

    Raises:
        UserError: there is nothing.
    """

    def __init__(self, location: str | Path, kind: str) -> None:
        from pyarrow import fs

        self.location, self.kind = str(location).rstrip("/"), kind
        self.local = "://" not in self.location
        if self.local:
            self.location = str(Path(self.location).expanduser().absolute())
        self._filesystem, self.root = filesystem_of(self.location)
        try:
            found = self._filesystem.get_file_info(self.root).type
        except OSError as error:
            raise UserError(f"cannot look into {self.location}: {error}") from error
        self.is_folder, self.is_file = found == fs.FileType.Directory, found == fs.FileType.File
        self.name = PurePosixPath(self.root).name
        if not self.is_folder:
            self.root = str(PurePosixPath(self.root).parent)
        self._resolved = Path(self.root).resolve() if self.local else None

    def need(self, what: str, *, folder: bool | None = None) -> None:
        """Checks that the source is there, and a folder or a file.

        Raises:
            UserError: it is not.
        """
        right = self.is_folder or self.is_file if folder is None else self.is_folder if folder else self.is_file
        if not right:
            there = self.is_file or self.is_folder
            problem = f"{self.location!r} is not {what}" if there else f"there is no {self.location!r}"
            raise UserError(problem, allowed=what, hint=f"armillary data import {self.kind} SOURCE")

    def files(self, under: str = "", suffixes: tuple[str, ...] = ()) -> list[SourceFile]:
        """The files below a folder of the source, sorted by path; hidden ones are left out.

        Raises:
            UserError: no such folder, or a symbolic link that leaves the source.
        """
        under = safe_path(under, self.location) if under else ""
        found = self._walk(under) if self.local else self._list(under)
        visible = [file for file in found if not any(part.startswith(".") for part in file.path.split("/"))]
        if suffixes:
            visible = [file for file in visible if PurePosixPath(file.path).suffix.lower() in suffixes]
        return sorted(visible, key=lambda file: file.path)

    def matching(self, pattern: str, what: str) -> str:
        """The one file whose path fits a pattern.

        Raises:
            UserError: none fits, or several do.
        """
        under = safe_path(pattern, self.location).rpartition("/")[0]
        fits = [file.path for file in self.files(under) if fnmatch(file.path, pattern)]
        if len(fits) != 1:
            raise UserError(f"{len(fits)} files in {self.location} fit {pattern!r}, the {what}", allowed="one file")
        return fits[0]

    def stat(self, path: str) -> SourceFile:
        """Size and time of one file.

        Raises:
            UserError: there is none.
        """
        full = self._full(path)
        info = self._filesystem.get_file_info(full)
        if not info.is_file:
            raise UserError(f"there is no file {path!r} in {self.root}")
        return SourceFile(path, info.size, info.mtime_ns or 0)

    def open(self, path: str) -> IO[bytes]:
        """Opens a file of the source for reading and seeking.

        Raises:
            UserError: there is none, or the path leaves the source.
        """
        full = self._full(path)
        try:
            if self.local:
                return Path(full).open("rb")
            return cast(IO[bytes], io.BufferedReader(_Readable(self._filesystem.open_input_file(full)), 2**18))
        except (FileNotFoundError, IsADirectoryError):
            raise UserError(f"there is no file {path!r} in {self.root}") from None

    def read(self, path: str, limit: int = MAX_BYTES) -> bytes:
        """A whole small file, such as an image.

        Raises:
            UnreadableImage: it is larger than ``limit``, missing, or the disk or its rights do not let it be read.
            UserError: the path leaves the source.
            WorkFailed: the object store does not answer.
        """
        try:
            with self.open(path) as file:
                size = file.seek(0, io.SEEK_END)
                if size > limit:
                    raise UnreadableImage(f"{size:,} bytes, more than {limit:,}")
                file.seek(0)
                return file.read(size)
        except UserError as error:
            if Path(path).is_absolute() or ".." in path or "leads out" in error.problem:
                raise
            raise UnreadableImage("there is no such file") from None
        except UnreadableImage:
            raise
        except OSError as error:
            if self.local:
                raise UnreadableImage(error.strerror or str(error)) from error
            raise WorkFailed(
                f"cannot read {path} of {self.location}: {error}\n  the same command goes on where it stopped"
            ) from error

    def lines(self, path: str) -> Iterator[str]:
        """The lines of a list or a table with their ends, read as UTF-8.

        Raises:
            UserError: no such file, not UTF-8, or a line of more than :data:`MAX_LINE` letters.
        """
        done = 0
        with io.TextIOWrapper(self.open(path), encoding="utf-8", newline="") as file:
            try:
                while line := file.readline(MAX_LINE):
                    done += 1
                    if len(line) == MAX_LINE:
                        raise UserError(f"a line of more than {MAX_LINE:,} letters", where=f"{path}:{done}")
                    yield line
            except UnicodeDecodeError:
                raise UserError(f"{path} is not UTF-8 text after line {done}") from None

    def _full(self, path: str) -> str:
        full = f"{self.root}/{safe_path(path, self.location)}"
        if self._resolved is not None:
            self._stays(Path(full))
        return full

    def _stays(self, path: Path) -> None:
        resolved = path.resolve()
        if self._resolved is not None and not resolved.is_relative_to(self._resolved):
            raise UserError(
                f"{path} is a symbolic link that leads out of the source",
                hint="copy what it points to into the source, or import that folder",
            )

    def _walk(self, under: str) -> list[SourceFile]:
        start = Path(self._full(under)) if under else Path(self.root)
        if not start.is_dir():
            raise UserError(f"there is no folder {under!r} in {self.location}")
        found = []
        for folder, folders, names in os.walk(start, followlinks=False):
            for name in (*folders, *names):
                path = Path(folder, name)
                if path.is_symlink():
                    self._stays(path)
                if name in names and path.is_file():
                    stat = path.stat()
                    inside = path.relative_to(self.root).as_posix()
                    found.append(SourceFile(inside, stat.st_size, stat.st_mtime_ns))
        return found

    def _list(self, under: str) -> list[SourceFile]:
        from pyarrow import fs

        root = f"{self.root}/{under}".rstrip("/")
        try:
            infos = self._filesystem.get_file_info(fs.FileSelector(root, recursive=True))
        except FileNotFoundError:
            raise UserError(f"there is no folder {under!r} in {self.location}") from None
        cut = len(self.root) + 1
        return [SourceFile(info.path[cut:], info.size, info.mtime_ns or 0) for info in infos if info.is_file]


class _Readable(io.RawIOBase):
    """A pyarrow file as one of Python's own."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return int(self._file.readinto(buffer))

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self._file.close()
        super().close()


class Unpacking:
    """A compressed stream that is refused when it unpacks to far more than it takes up.

    Args:
        packed: the file underneath, whose position says how much was taken up.
        stream: what unpacks it.
        name: the file, for messages.
        limit: the largest single read, in bytes.
    """

    def __init__(self, packed: IO[bytes], stream: IO[bytes], name: str, limit: int = MAX_BYTES) -> None:
        self._packed, self._stream, self._name, self._limit = packed, stream, name, limit

    def read(self, size: int = -1) -> bytes:
        """Reads at most ``size`` bytes.

        Raises:
            UserError: a decompression bomb, a length that cannot be, or a stream that is cut off or damaged.
        """
        if not 0 <= size <= self._limit:
            raise UserError(f"{self._name}: a length of {size:,} bytes cannot be", allowed=f"0 to {self._limit:,}")
        content = unpack(self._stream, size, self._name)
        self._check()
        return content

    def seek(self, offset: int, whence: int = 0) -> int:
        """Moves, by unpacking what lies between where that is needed."""
        # In steps, so that a bomb is seen while it unpacks.
        while whence == 0 and offset - self._stream.tell() > self._limit:
            before = self._stream.tell()
            if self._stream.seek(before + self._limit) == before:
                break
            self._check()
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        """The position, unpacked."""
        return self._stream.tell()

    def _check(self) -> None:
        unpacked, packed = self._stream.tell(), max(self._packed.tell(), 1)
        if self._stream is not self._packed and unpacked > _RATIO_FREE and unpacked > MAX_RATIO * packed:
            raise UserError(f"{self._name} unpacks to more than {MAX_RATIO} times its size: a decompression bomb")


def unpack(stream: IO[bytes], size: int, name: str) -> bytes:
    """Reads from a stream that may be compressed; damage is the user's mistake.

    Raises:
        UserError: the stream is cut off or damaged.
    """
    import zlib

    try:
        return stream.read(size)
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{name} is cut off or damaged: {error}") from error


def safe_path(path: str, where: str) -> str:
    """A relative path without steps upward, as it came.

    Raises:
        UserError: an absolute path, one with ``..``, or one with a zero byte.
    """
    windows = path.replace("\\", "/")
    if not path or path.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[/\\]", path) or "\0" in path:
        raise UserError(f"path {path!r} leaves the source", where=where, allowed="a path inside it")
    if ".." in windows.split("/"):
        raise UserError(f"path {path!r} leaves the source", where=where, allowed="a path inside it")
    return path
