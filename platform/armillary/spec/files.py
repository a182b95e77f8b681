"""Where the name of a job or search space leads: a file on disk first, then those that ship with Armillary."""

from __future__ import annotations

import os
from pathlib import Path

from armillary.spec.environment import FromEnvironment
from armillary.spec.errors import UserError, listed, nearest
from armillary.spec.home import resource, resources


def find(
    folder: str, name: str | Path, near: Path | None = None, *, where: str | None = None, key: str | None = None
) -> Path:
    """The file a user means.

    Args:
        folder: ``jobs`` or ``search_spaces``.
        name: a path, or a name inside ``folder``, with or without the folder and the ending.
        near: the folder of the file that holds ``name``; searched before the working directory.
        where: where the name was written, for the error.
        key: the key it was written under.

    Raises:
        UserError: there is no such file; shows the nearest ones.
    """
    # repr of a value from the environment is its reference, and so is what the message shows.
    quoted = repr(name if isinstance(name, FromEnvironment) else str(name))
    text = str(name)
    if "\0" in text or not text.strip():
        raise UserError(f"found {quoted}", where=where, key=key, allowed="the path of a YAML file")
    given = Path(text).expanduser()
    inside = text.removeprefix("./").removeprefix(f"{folder}/")
    candidates = [inside] if given.suffix in (".yaml", ".yml") else [f"{inside}.yaml"]
    places = [*([near / given] if near else []), given]
    places += [Path(folder) / candidate for candidate in candidates]
    for place in places:
        if os.path.isfile(place):  # noqa: PTH113
            return place
    for candidate in candidates:
        shipped = None if Path(candidate).is_absolute() else resource(folder, candidate)
        if shipped is not None:
            return shipped
    if os.path.isdir(given):  # noqa: PTH112 - answers False where pathlib raises, e.g. for a name that is too long
        return given
    raise UserError(
        f"there is no file {quoted}",
        where=where,
        key=key,
        allowed=f"a YAML file, or one that ships with Armillary: {listed(resources(folder))}",
        hint=_suggest(folder, text, near),
    )


def _suggest(folder: str, name: str, near: Path | None) -> str | None:
    shipped = {path.removesuffix(".yaml"): f"{folder}/{path}" for path in resources(folder)}
    parent = Path(name).expanduser().parent
    known = dict(shipped)
    for place in {near or Path(), parent, (near or Path()) / parent}:
        if os.path.isdir(place):  # noqa: PTH112
            known.update({path.stem: str(path) for path in sorted(place.glob("*.y*ml"))})
    close = nearest(Path(name).stem, known)
    return f"did you mean {' or '.join(known[item] for item in close)}?" if close else None
