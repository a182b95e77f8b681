"""InsightFace's verification sets (``lfw.bin``, ``agedb_30.bin``, ``cfp_fp.bin``): a pickle of images and answers.

The pickle is ``(image files, same)``: two images a pair, one answer a pair. It is read by Python's own unpickler with
three changes. It finds no global but the few that such files name, and those are stand-ins that run no foreign code.
Long byte strings are not loaded: their place in the file is noted, so that memory holds no images and any of them can
be read later. And what it builds is bounded.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any, ClassVar, NamedTuple

from armillary.data.images import MAX_BYTES
from armillary.data.importers.contents import UNLABELLED, Contents, record
from armillary.data.importers.options import ImageOptions
from armillary.data.importers.pairs import Pair, pair_table
from armillary.data.importers.source import Source
from armillary.data.store import Record, Unreadable
from armillary.spec.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

MAX_PAIRS = 2_000_000


class Span(NamedTuple):
    """Where a byte string lies in the file."""

    offset: int
    size: int


def read_face_bin(source: Source, options: ImageOptions) -> Contents:
    """Reads a ``.bin``; the answers become the table ``pairs``. All images are of one class: who they show is unknown.

    Raises:
        UserError: not such a file, or one that names globals which such files do not.
    """
    source.need("a .bin file", folder=False)
    path = source.name
    with source.open(path) as file:
        images, same = _load(file, path)
    pairs = [Pair(2 * at, 2 * at + 1, answer) for at, answer in enumerate(same)]

    def items(start: int) -> Iterator[Record | Unreadable]:
        with source.open(path) as file:
            for number, image in enumerate(images[start:], start=start):
                if isinstance(image, Span):
                    file.seek(image.offset)
                    image = file.read(image.size)
                yield record(f"{path}#{number}", image, 0, options.form)

    def tables(row_of: Callable[[int], int]) -> Mapping[str, pa.Table]:
        return {"pairs": pair_table(pairs, row_of, folds=False)}

    files = [source.stat(path)]
    return Contents(items, UNLABELLED, files, total=len(images), tables=tables, form=options.form)


def _load(file: IO[bytes], path: str) -> tuple[list[Span | bytes], list[bool]]:
    try:
        content = _Unpickler(file).load()
    except UserError as error:
        raise UserError(f"{path}: {error.problem}", allowed=error.allowed) from None
    except Exception as error:
        # A damaged pickle makes the unpickler raise almost anything.
        raise UserError(
            f"{path} is no pickle of images and answers, or cut off: {str(error)[:200] or 'no data'}"
        ) from error
    if not isinstance(content, tuple | list) or len(content) != 2:
        raise UserError(f"{path} holds {type(content).__name__}", allowed="a pair: image files, answers")
    answers = content[1].values() if isinstance(content[1], _Array) else content[1]
    if not isinstance(content[0], tuple | list) or not isinstance(answers, tuple | list):
        raise UserError(f"{path} holds no lists", allowed="a pair: image files, answers")
    images = [image.raw if isinstance(image, _Array) else image for image in content[0]]
    if not all(isinstance(image, Span | bytes) for image in images):
        raise UserError(f"{path}: images must be byte strings or arrays of uint8")
    if not all(isinstance(answer, bool | int) and answer in (0, 1) for answer in answers):
        raise UserError(f"{path}: answers must be true or false")
    if len(images) != 2 * len(answers) or len(answers) > MAX_PAIRS:
        raise UserError(f"{path} holds {len(images)} images and {len(answers)} answers", allowed="two images an answer")
    return images, [bool(answer) for answer in answers]


class _Dtype:
    """Stands for ``numpy.dtype``: only its code is kept."""

    def __init__(self, code: Any = "", *_flags: Any) -> None:
        self.code = code.decode("latin-1") if isinstance(code, bytes) else str(code)

    def __setstate__(self, state: Any) -> None:
        """Byte order and fields do not matter for single bytes."""


class _Array:
    """Stands for ``numpy.ndarray``: one of single bytes, as ``cv2.imencode`` returns, or of truth values."""

    def __init__(self) -> None:
        self.raw: Span | bytes = b""
        self.code = ""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, _, raw = state
        size, count = raw.size if isinstance(raw, Span) else len(raw), 1
        for side in shape:
            count *= side
        if not isinstance(dtype, _Dtype) or dtype.code not in ("u1", "b1") or count != size:
            raise UserError("an array that is not of single bytes", allowed="uint8 and bool arrays")
        self.raw, self.code = raw, dtype.code

    def values(self) -> list[bool]:
        """The truth values."""
        if self.code != "b1" or not isinstance(self.raw, bytes):
            raise UserError("the answers are not truth values")
        return [value != 0 for value in self.raw]


def _scalar(dtype: Any, value: Any) -> bool | int:
    if not isinstance(dtype, _Dtype) or dtype.code not in ("b1", "u1", "i4", "i8") or not isinstance(value, bytes):
        raise UserError("a number that is neither whole nor a truth value")
    return value != b"\0" if dtype.code == "b1" else int.from_bytes(value, "little", signed=dtype.code[0] == "i")


def _frombuffer(raw: Any, dtype: Any, shape: Any, *_order: Any) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, False, raw))
    return array


def _latin1(text: Any, encoding: Any = "latin1") -> bytes:
    # How Python 3 writes bytes for readers of Python 2.
    if encoding not in ("latin1", "latin-1", b"latin1"):
        raise UserError(f"encoding {encoding!r}", allowed="latin1")
    return text if isinstance(text, bytes) else str(text).encode("latin-1")


def _no_bytes(*nothing: Any) -> bytes:
    if nothing:
        raise UserError("bytes made by a call", allowed="byte strings")
    return b""


_GLOBALS: dict[tuple[str, str], Callable[..., Any]] = {
    ("_codecs", "encode"): _latin1,
    ("builtins", "bytes"): _no_bytes,
    ("__builtin__", "bytes"): _no_bytes,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
}
for _package in ("numpy.core", "numpy._core"):
    _GLOBALS[f"{_package}.multiarray", "_reconstruct"] = lambda *_: _Array()
    _GLOBALS[f"{_package}.multiarray", "scalar"] = _scalar
    _GLOBALS[f"{_package}.numeric", "_frombuffer"] = _frombuffer


# The unpickler written in Python, whose opcodes can be replaced; the one in C reads byte strings into memory.
class _Unpickler(pickle._Unpickler):
    # What pickle.py gives it, and its types do not say.
    read: Callable[[int], bytes]
    append: Callable[[Any], None]
    stack: list[Any]

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: IO[bytes]) -> None:
        # Byte strings of Python 2 stay what they are.
        super().__init__(file, encoding="bytes")
        self._file = file
        self._size = file.seek(0, 2)
        file.seek(0)

    def find_class(self, module: Any, name: Any) -> Any:
        if (module, name) not in _GLOBALS:
            raise UserError(
                f"the pickle asks for {str(module)[:80]}.{str(name)[:80]}, which such files do not need",
                allowed=", ".join(f"{known}.{item}" for known, item in sorted(_GLOBALS)),
            )
        return _GLOBALS[module, name]

    def _skip_frame(self) -> None:
        # Frames only tell how much to read ahead; without them offsets are those of the file.
        self.read(8)

    def _bytes(self, size: int) -> None:
        offset = self._file.tell()
        if not 0 <= size <= MAX_BYTES or offset + size > self._size:
            raise UserError(f"a byte string of {size:,} bytes at byte {offset:,} of {self._size:,}")
        # Short ones may be answers or names, and weigh nothing.
        if size < 64:
            self.append(self.read(size))
        else:
            self.append(Span(offset, size))
            self._file.seek(size, 1)

    def _bytes_1(self) -> None:
        self._bytes(self.read(1)[0])

    def _bytes_4(self) -> None:
        self._bytes(struct.unpack("<I", self.read(4))[0])

    def _bytes_8(self) -> None:
        self._bytes(struct.unpack("<Q", self.read(8))[0])

    def _text_4(self) -> None:
        size = struct.unpack("<I", self.read(4))[0]
        if size > min(2 * MAX_BYTES, self._size):
            raise UserError(f"a text of {size:,} bytes")
        self.append(str(self.read(size), "utf-8", "surrogatepass"))

    def _build(self) -> None:
        # Elsewhere it would set attributes of whatever lies on the stack.
        if not isinstance(self.stack[-2], _Array | _Dtype):
            self._refuse()
        build: Callable[[Any], None] = pickle._Unpickler.dispatch[pickle.BUILD[0]]
        build(self)

    def _refuse(self) -> None:
        raise UserError("the pickle has parts which such files do not need")


_Unpickler.dispatch.update(
    {
        pickle.FRAME[0]: _Unpickler._skip_frame,
        pickle.SHORT_BINBYTES[0]: _Unpickler._bytes_1,
        pickle.BINBYTES[0]: _Unpickler._bytes_4,
        pickle.BINBYTES8[0]: _Unpickler._bytes_8,
        pickle.SHORT_BINSTRING[0]: _Unpickler._bytes_1,
        pickle.BINSTRING[0]: _Unpickler._bytes_4,
        pickle.BYTEARRAY8[0]: _Unpickler._bytes_8,
        pickle.BINUNICODE[0]: _Unpickler._text_4,
        pickle.BUILD[0]: _Unpickler._build,
    }
)
for _code in (pickle.BINUNICODE8, pickle.LONG4, pickle.PERSID, pickle.BINPERSID, pickle.INST,
              pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4):  # fmt: skip
    _Unpickler.dispatch[_code[0]] = _Unpickler._refuse
