"""The exception for a user's mistake, the one for failed work, and the helpers that make messages kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class UserError(Exception):
    """A mistake the user can correct; the command line prints it without a traceback and exits with 2.

    Args:
        problem: what is wrong, one sentence, naming the value found.
        where: the file and line, or the command-line argument, it comes from.
        key: the dotted key, e.g. ``objective.margin``.
        allowed: what would have been accepted.
        hint: what to do next, e.g. the nearest valid name or a command.
    """

    def __init__(
        self,
        problem: str,
        *,
        where: str | None = None,
        key: str | None = None,
        allowed: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem, self.where, self.key, self.allowed, self.hint = problem, where, key, allowed, hint

    def __str__(self) -> str:
        head = ": ".join(part for part in (self.where, self.key, self.problem) if part)
        lines = [head]
        if self.allowed:
            lines.append(f"  allowed: {self.allowed}")
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling, and errors cross Ray's process boundary.
        return _rebuild, (self.problem, self.where, self.key, self.allowed, self.hint)


def _rebuild(problem: str, where: str | None, key: str | None, allowed: str | None, hint: str | None) -> UserError:
    return UserError(problem, where=where, key=key, allowed=allowed, hint=hint)


class WorkFailed(Exception):  # noqa: N818 - reads as a statement where it is caught
    """The world failed, not the user: the message says what was kept and how to go on; exit code 1, no traceback."""


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """The valid names closest to a mistyped one, best first; empty when nothing is close."""
    return get_close_matches(str(name), list(candidates), n=count, cutoff=0.5)


# A longer list than this is no help in a message.
MANY = 24


def unknown_name(kind: str, name: str, candidates: Sequence[str], **context: str | None) -> UserError:
    """The error for a name that is not in a closed set, with the nearest ones and the whole set."""
    close = nearest(name, candidates)
    hint = f"did you mean {' or '.join(repr(item) for item in close)}?" if close else None
    return UserError(f"unknown {kind} {name!r}", allowed=listed(candidates, close), hint=hint, **context)


def listed(candidates: Sequence[str], close: Sequence[str] = ()) -> str:
    """What is allowed, in words: all of a short list, the nearest of a long one."""
    if len(candidates) <= MANY:
        return ", ".join(sorted(candidates))
    shown = close or sorted(candidates)[:MANY]
    return f"{', '.join(shown)} ... ({len(candidates)} in all)"
