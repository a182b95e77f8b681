"""WebDataset shards: tars in which the files of a sample follow each other and share their name up to the first dot.

``0001.jpg 0001.cls 0001.txt``: an image, its class (whole number or text) or a ``.json`` with a key for it, a caption.
Nothing is unpacked to disk: members are read from the stream, and their names never become paths.
"""

from __future__ import annotations

import gzip
import json
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from itertools import product
from typing import IO, Any, NamedTuple, cast

from armillary.data.images import MAX_BYTES
from armillary.data.importers.contents import UNLABELLED, Classes, Contents, record
from armillary.data.importers.options import WebDatasetOptions
from armillary.data.importers.source import Source, Unpacking, safe_path
from armillary.data.store import Record, Unreadable
from armillary.spec.errors import UserError

_IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp")
_TEXT_LIMIT = 2**20
_MAX_SHARDS = 100_000
_DRAIN = 2**16


class _Sample(NamedTuple):
    """Where a sample's image is, and what is said of it."""

    name: str
    offset: int
    size: int
    label: int | str | None
    caption: str | None


def read_webdataset(source: Source, options: WebDatasetOptions) -> Contents:
    """Reads one tar, a folder of them, a glob (``train-*.tar``) or a brace list (``train-{0000..0012}.tar``).

    The tars are looked through once for the classes and once for the images.

    Raises:
        UserError: no tars; one that is cut off, unpacks to too much, or has members with absolute or upward names;
            labels of two kinds.
    """
    shards = _shards(source)
    labels: set[int | str] = set()
    total, captions, unlabelled = 0, False, ""
    for shard in shards:
        for sample, _ in _samples(source, shard, options.label_key, images=False):
            total += 1
            captions = captions or sample.caption is not None
            if sample.label is None:
                unlabelled = sample.name
            else:
                labels.add(sample.label)
    if not total:
        raise UserError(f"{source.location} has no image of the kinds {', '.join(_IMAGES)} in its tars")
    if labels and unlabelled:
        hint = f"--label-key names the key of its .json; now {options.label_key!r}"
        raise UserError(f"sample {unlabelled!r} has no label; others have", hint=hint)
    classes = Classes(labels, source.location) if labels else None

    def items(start: int) -> Iterator[Record | Unreadable]:
        position = 0
        for shard in shards:
            for sample, image in _samples(source, shard, options.label_key, images=True):
                position += 1
                if position <= start:
                    continue
                number = classes[sample.label] if classes and sample.label is not None else 0
                name = f"{shard}:{sample.name}"
                if sample.size > MAX_BYTES:
                    yield Unreadable(name, f"{sample.size:,} bytes, more than {MAX_BYTES:,}")
                    continue
                fields = {"caption": sample.caption or ""} if captions else {}
                yield record(name, image(), number, options.form, fields)

    return Contents(
        items,
        classes.names if classes else UNLABELLED,
        [source.stat(shard) for shard in shards],
        total=total,
        columns={"caption": "string"} if captions else {},
        form=options.form,
    )


def _shards(source: Source) -> list[str]:
    if source.is_file:
        return [source.name]
    if source.is_folder:
        shards = [file.path for file in source.files(suffixes=(".tar", ".tgz", ".gz"))]
        shards = [path for path in shards if path.endswith((".tar", ".tgz", ".tar.gz"))]
    else:
        patterns = _braces(safe_path(source.name, source.location))
        if len(patterns) > 1 or not re.search(r"[*?\[]", source.name):
            shards = [source.stat(path).path for path in patterns]
        else:
            shards = [file.path for file in source.files() if fnmatch(file.path, patterns[0])]
    if not shards:
        raise UserError(f"{source.location} has no tars", allowed="a .tar, a folder, 'x-*.tar' or 'x-{000..012}.tar'")
    return shards


def _braces(pattern: str) -> list[str]:
    """``a-{00..02}.tar`` and ``a-{x,y}.tar`` written out."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices, count = [], 1
    for at, part in enumerate(parts):
        bounds = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", part) if at % 2 else None
        if bounds:
            first, last = int(bounds[1]), int(bounds[2])
            count *= max(last - first + 1, 0)
            if not 0 < count <= _MAX_SHARDS:
                raise UserError(f"{pattern} stands for {count:,} files", allowed=f"1 to {_MAX_SHARDS:,}")
            choices.append([str(number).zfill(len(bounds[1])) for number in range(first, last + 1)])
        else:
            choices.append(part.split(",") if at % 2 else [part])
            count *= len(choices[-1])
    return ["".join(choice) for choice in product(*choices)]


@contextmanager
def _opened(source: Source, path: str) -> Iterator[tuple[tarfile.TarFile, Unpacking]]:
    with source.open(path) as packed:
        stream = gzip.GzipFile(fileobj=packed) if path.endswith(("gz",)) else packed
        unpacking = Unpacking(packed, cast(IO[bytes], stream), path)
        try:
            with tarfile.open(fileobj=cast(Any, unpacking), mode="r:") as tar:
                yield tar, unpacking
        except (tarfile.TarError, ValueError, EOFError) as error:
            raise UserError(f"{path} is no tar, or cut off: {error}") from error


def _samples(source: Source, path: str, label_key: str, *, images: bool) -> Iterator[tuple[_Sample, Any]]:
    """The samples of a tar that have an image, with a function that reads it, to be called before the next."""
    with _opened(source, path) as (tar, stream):
        key: str | None = None
        parts: dict[str, tarfile.TarInfo] = {}
        texts: dict[str, str] = {}
        kept: dict[str, bytes] = {}

        def finished() -> Iterator[tuple[_Sample, Any]]:
            suffix = next((suffix for suffix in _IMAGES if suffix in parts), None)
            if key is not None and suffix is not None:
                member = parts[suffix]
                label = _label(texts, label_key, f"{path}:{key}")
                sample = _Sample(member.name, member.offset_data, member.size, label, _caption(texts))
                yield sample, lambda: kept[suffix]

        while (member := tar.next()) is not None:
            # The archive would remember every member.
            tar.members = []  # type: ignore[attr-defined]
            _check_member(member, path)
            if not member.isreg():
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            if not stem:
                continue
            if f"{folder}/{stem}" != key:
                yield from finished()
                key = f"{folder}/{stem}"
                parts, texts, kept = {}, {}, {}
            suffix = suffix.lower()
            parts[suffix] = member
            if suffix in ("cls", "txt", "json"):
                texts[suffix] = _text(stream, member, path)
            elif images and suffix in _IMAGES and member.size <= MAX_BYTES:
                kept[suffix] = _content(stream, member, path)
            elif not images:
                # A member that claims more than the file has is found here, not in the middle of the import.
                _content(stream, member, path, skip=True)
        yield from finished()
        # The library takes damage in the middle for the end; the true end is a block of zeros.
        stream.seek(tar.offset)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise UserError(f"{path} is cut off or damaged: it has no end mark at byte {tar.offset:,}")
        # What follows are zeros, and behind them the checksum of a gzip stream.
        while stream.read(_DRAIN):
            pass


def _check_member(member: tarfile.TarInfo, path: str) -> None:
    safe_path(member.name, path)
    if member.issparse() or member.size < 0:
        raise UserError(f"{path}: member {member.name[:80]!r} is sparse or of negative size")


def _content(stream: Unpacking, member: tarfile.TarInfo, path: str, *, skip: bool = False) -> bytes:
    if skip:
        if member.size:
            stream.seek(member.offset_data + member.size - 1)
            if len(stream.read(1)) != 1:
                raise UserError(f"{path} is cut off: member {member.name[:80]!r} has no {member.size:,} bytes")
        return b""
    stream.seek(member.offset_data)
    content = stream.read(member.size)
    if len(content) != member.size:
        raise UserError(f"{path} is cut off: member {member.name[:80]!r} has {len(content):,} of {member.size:,} bytes")
    return content


def _text(stream: Unpacking, member: tarfile.TarInfo, path: str) -> str:
    if member.size > _TEXT_LIMIT:
        raise UserError(f"{path}: {member.name[:80]!r} has {member.size:,} bytes", allowed=f"up to {_TEXT_LIMIT:,}")
    try:
        return _content(stream, member, path).decode()
    except UnicodeDecodeError:
        raise UserError(f"{path}: {member.name[:80]!r} is not UTF-8 text") from None


def _label(texts: dict[str, str], key: str, where: str) -> int | str | None:
    if "cls" in texts:
        text = texts["cls"].strip()
        return int(text) if re.fullmatch(r"-?\d{1,18}", text) else text
    if "json" not in texts:
        return None
    try:
        content = json.loads(texts["json"])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}.json is not JSON: {error}") from error
    value: Any = content.get(key) if isinstance(content, dict) else None
    if value is None or (type(value) in (int, str)):
        return cast(int | str | None, value)
    raise UserError(f"{where}.json: {key} is {str(value)[:80]!r}", allowed="a whole number or text")


def _caption(texts: dict[str, str]) -> str | None:
    return texts["txt"].strip() if "txt" in texts else None
