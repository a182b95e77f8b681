"""YAML with line numbers: reads a file into plain values and remembers where each key stands.

The YAML is that of the 1.2 core schema: ``1e-3`` is a number, ``no`` is a text, a key may stand only once.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from armillary.spec import environment
from armillary.spec.errors import UserError

KeyPath = environment.Path

_MAX_BYTES = 256 * 1024
_MAX_DEPTH = 40
_MAX_NODES = 100_000

_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Composes nodes; what a plain scalar means is decided by the table above alone."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own shape
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As in PyYAML, but ten thousand open brackets stop at the forty-first instead of filling the stack."""
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise yaml.composer.ComposerError(
                problem=f"nested more than {_MAX_DEPTH} levels deep", problem_mark=self.peek_event().start_mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Writes what both YAML versions read alike: a text that either takes for something else is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"^(?:{_pattern})$"), _first)


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.SequenceNode:
    short = all(not isinstance(item, dict | list) for item in items)
    return dumper.represent_sequence(f"{_TAG}seq", items, flow_style=short)


_Dumper.add_representer(list, _represent_list)


def dump(value: Any) -> str:
    """Writes plain values as YAML, keys in the order given, short lists on one line."""
    # Escaped beyond ASCII: PyYAML writes some line separators bare and then reads them as spaces.
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=110)


class Document:
    """Plain values, and where each came from.

    Args:
        values: what was read.
        places: the place (``file:line`` or ``command line``) of each path of keys.
        source: the place of everything that has none of its own.
    """

    def __init__(self, values: Any, places: dict[KeyPath, str], source: str) -> None:
        self.values, self.places, self.source = values, places, source

    def place(self, path: KeyPath) -> str:
        """Where a key stands, or the nearest key around it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return self.source

    def resolve_environment(self) -> None:
        """Fills in every ``${env:..}``.

        Raises:
            UserError: a variable is not set.
        """
        self.values = environment.resolve(self.values, self.place)

    def set(self, path: KeyPath, value: Any, place: str, inner: Document | None = None) -> None:
        """Replaces or adds the value at a path, making the mappings on the way.

        Args:
            path: keys; a number selects from a list that is already there.
            value: the new value.
            place: where the change comes from.
            inner: the document ``value`` is of, whose places are kept.

        Raises:
            UserError: a key on the way holds a plain value, or a list has no such item.
        """
        node = self.values
        for depth, key in enumerate(path[:-1], start=1):
            if isinstance(node, dict) and key not in node:
                self.places[path[:depth]] = place
            node = _child(node, key, path[:depth], place)
        last = path[-1]
        if isinstance(node, list):
            _child(node, last, path, place)
        node[last] = value
        self.places = {known: where for known, where in self.places.items() if known[: len(path)] != path}
        self.places[path] = place
        if inner is not None:
            self.places.update({(*path, *known): where for known, where in inner.places.items() if known})


def _child(node: Any, key: str | int, path: KeyPath, place: str) -> Any:
    dotted = ".".join(map(str, path))
    if isinstance(node, list):
        if not isinstance(key, int) or not 0 <= key < len(node):
            raise UserError(
                f"found {key!r} where a list of {len(node)} is indexed",
                where=place,
                key=dotted,
                allowed=f"a position from 0 to {len(node) - 1}",
            )
        return node[key]
    child = node.get(key)
    if child is None:
        child = node[key] = {}
    if not isinstance(child, dict | list):
        raise UserError(
            f"{dotted} is no section, it holds {child!r}",
            where=place,
            key=dotted,
            allowed="keys below sections only",
        )
    return child


def shown(path: Path) -> str:
    """A path as messages name it: relative to the working directory where it lies below that."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def read(path: Path, source: str | None = None) -> Document:
    """Reads a YAML file.

    Args:
        path: the file.
        source: how messages name it; the path itself by default.

    Raises:
        UserError: it is missing, a directory, unreadable, not text, too large, empty or not valid YAML.
    """
    source = source or shown(path)
    try:
        if path.is_dir():
            inside = ", ".join(sorted(item.name for item in path.iterdir() if item.suffix in (".yaml", ".yml")))
            raise UserError("found a directory", where=source, allowed="a YAML file", hint=inside or None)
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=source, allowed="a YAML file") from None
    if len(content) > _MAX_BYTES:
        raise UserError(f"is larger than {_MAX_BYTES // 1024} KiB", where=source, allowed="a YAML file a person wrote")
    return parse(_decode(content, source), source)


def _decode(content: bytes, source: str) -> str:
    try:
        text = content.decode("utf-8-sig")
        bad = text.find("\0")
        if bad < 0:
            return text
        line, byte = text.count("\n", 0, bad) + 1, 0
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
    raise UserError(
        f"found the byte 0x{byte:02x}: the file is binary", where=f"{source}:{line}", allowed="YAML, UTF-8 text"
    )


def parse(text: str, source: str) -> Document:
    """Reads YAML text; ``source`` names it in messages.

    Raises:
        UserError: as :func:`read`, with the line and its text.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text, source) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"found the character U+{error.character:04X}: the file is binary"
            if isinstance(error.character, int)
            else f"cannot be read: {error.reason}",
            where=f"{source}:{line}",
            allowed="YAML, UTF-8 text",
        ) from None
    if node is None or (isinstance(node, yaml.ScalarNode) and node.value == ""):
        raise UserError("the file is empty", where=f"{source}:1", allowed="a mapping, e.g. objective: {name: arcface}")
    reader = _Reader(source)
    values = reader.convert(node, ())
    return Document(values, reader.places, source)


def _syntax_error(error: yaml.MarkedYAMLError, text: str, source: str) -> UserError:
    lines = text.splitlines()
    marks = [mark for mark in (error.problem_mark, error.context_mark) if mark is not None]
    # An unclosed bracket is noticed at the end of the file; the line that opened it says more than an empty one.
    marks.sort(key=lambda mark: mark.line >= len(lines) or not lines[mark.line].strip())
    line = marks[0].line if marks else 0
    while line > 0 and not "".join(lines[line : line + 1]).strip():
        line -= 1
    offending = lines[line].rstrip() if line < len(lines) else ""
    problem = ", ".join(part for part in (error.context, error.problem) if part)
    hint = "indent with spaces, not tabs" if "\t" in offending else None
    offending = offending.strip()
    offending = offending if len(offending) <= 80 else f"{offending[:77]}..."
    return UserError(
        f"not valid YAML: {problem}: {offending!r}",
        where=f"{source}:{line + 1}",
        allowed="YAML: 'key: value', nested by indentation",
        hint=hint,
    )


class _Reader:
    """Turns nodes into values; refuses what a job has no use for."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.places: dict[KeyPath, str] = {}
        self.nodes = 0

    def convert(self, node: yaml.Node, path: KeyPath) -> Any:
        place = f"{self.source}:{node.start_mark.line + 1}"
        self.places.setdefault(path, place)
        self.nodes += 1
        if len(path) > _MAX_DEPTH or self.nodes > _MAX_NODES:
            raise UserError(
                "is nested too deeply, or an alias repeats itself", where=place, allowed=f"{_MAX_DEPTH} levels"
            )
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [self.convert(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, place, path)
        raise self._bad_tag(node, place, path)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            place = f"{self.source}:{line}"
            key = self.convert(key_node, (*path, "")) if isinstance(key_node, yaml.ScalarNode) else None
            self.places.pop((*path, ""), None)
            dotted = ".".join(map(str, path)) or None
            if not isinstance(key, str):
                raise UserError(f"found the key {key_node.value!r}", where=place, key=dotted, allowed="text as a key")
            here: KeyPath = (*path, key)
            if key in result:
                raise UserError(
                    f"stands twice, first at {self.places[here]}",
                    where=place,
                    key=".".join(map(str, here)),
                    allowed="each key once",
                )
            self.places[here] = place
            result[key] = self.convert(value_node, here)
        return result

    def _scalar(self, node: yaml.ScalarNode, place: str, path: KeyPath) -> Any:
        text, kind = node.value, node.tag.removeprefix(_TAG)
        constants = {"true": True, "false": False}
        try:
            if kind == "str":
                return text
            if kind == "null":
                return None
            if kind == "bool":
                return constants[text.lower()]
            if kind == "int":
                return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
            if kind == "float":
                return float(re.sub(r"\.(?=[in])", "", text.lower()))
        except (ValueError, KeyError):
            raise UserError(
                f"found {text[:60]!r}, which cannot be read as {kind}",
                where=place,
                key=".".join(map(str, path)) or None,
                allowed="text, numbers, true, false, null",
            ) from None
        raise self._bad_tag(node, place, path)

    def _bad_tag(self, node: yaml.Node, place: str, path: KeyPath) -> UserError:
        return UserError(
            f"found the tag {node.tag.replace(_TAG, '!!')!r}",
            where=place,
            key=".".join(map(str, path)) or None,
            allowed="text, numbers, true, false, null, lists and mappings, without tags",
        )
