"""Five-field cron lines as cron(5) means them, in local time, turned into APScheduler triggers.

APScheduler's own ``from_crontab`` counts weekdays from Monday = 0 and joins day of month and day of week with *and*;
cron counts from Sunday = 0 (7 is Sunday too) and joins them with *or* when both are restricted. A line that means
Sunday night everywhere else must not mean Monday night here, so the fields are expanded first and handed over by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from armillary.spec.errors import UserError

_WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_LONGEST_MONTHS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_EXAMPLE = "0 3 * * 1-5 is 03:00 from Monday to Friday"


@dataclass(frozen=True)
class _Field:
    name: str
    low: int
    high: int
    names: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        """The field's grammar in words."""
        words = f", or {self.names[0]}..{self.names[-1]}" if self.names else ""
        return f"{self.low}..{self.high}{words}; * , - and / combine them, e.g. */2 or {self.low},{self.low + 2}"


_FIELDS = (
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day of month", 1, 31),
    _Field("month", 1, 12, _MONTHS),
    _Field("day of week", 0, 7, _WEEKDAYS),
)


def parse(line: str, *, where: str | None = None) -> tuple[frozenset[int], ...]:
    """The values each field of a cron line stands for: minute, hour, day of month, month, day of week (0 = Sunday).

    Args:
        line: five fields separated by blanks, e.g. ``0 3 * * 1-5``.
        where: the file it comes from, for the message.

    Raises:
        UserError: not five fields, a field that does not parse or leaves its range, or a date that never comes.
    """
    parts = line.split()
    if len(parts) != len(_FIELDS):
        raise UserError(
            f"{line!r} has {len(parts)} field{'' if len(parts) == 1 else 's'}, a cron line has 5",
            where=where,
            key="schedule",
            allowed="minute hour day-of-month month day-of-week",
            hint=_EXAMPLE,
        )
    values = [_expand(field, part, line, where) for field, part in zip(_FIELDS, parts, strict=True)]
    values[4] = frozenset(day % 7 for day in values[4])
    _, _, days, months, _ = values
    if parts[4].startswith("*") and all(min(days) > _LONGEST_MONTHS[month - 1] for month in months):
        raise UserError(
            f"{line!r} never comes: no month in it has a day {min(days)}", where=where, key="schedule", hint=_EXAMPLE
        )
    return tuple(values)


def trigger(line: str, *, where: str | None = None) -> Any:
    """The APScheduler trigger of a cron line, in the machine's time zone.

    Raises:
        UserError: see :func:`parse`.
    """
    from apscheduler.triggers.combining import OrTrigger
    from apscheduler.triggers.cron import CronTrigger

    minutes, hours, days, months, weekdays = parse(line, where=where)
    times = {"minute": _join(minutes), "hour": _join(hours), "month": _join(months)}
    by_day = {"day": _join(days)}
    by_weekday = {"day_of_week": ",".join(_WEEKDAYS[day] for day in sorted(weekdays))}
    day_field, weekday_field = line.split()[2], line.split()[4]
    # cron(5): a field that starts with * does not count as restricted.
    if day_field.startswith("*") or weekday_field.startswith("*"):
        return CronTrigger(**times, **by_day, **by_weekday)
    return OrTrigger([CronTrigger(**times, **by_day), CronTrigger(**times, **by_weekday)])


def _join(values: frozenset[int]) -> str:
    return ",".join(str(value) for value in sorted(values))


def _expand(field: _Field, text: str, line: str, where: str | None) -> frozenset[int]:
    values: set[int] = set()
    for item in text.split(","):
        match = re.fullmatch(r"(?P<first>\*|\w+)(?:-(?P<last>\w+))?(?:/(?P<step>\d+))?", item)
        if match is None or (match["first"] == "*" and match["last"]):
            raise _wrong(field, f"{item!r} is not a value, a range or a step", line, where)
        step = int(match["step"] or 1)
        if step == 0:
            raise _wrong(field, f"the step in {item!r} is 0", line, where)
        if match["first"] == "*":
            # Sunday is both 0 and 7, and a step over the week must meet it once.
            first, last = field.low, 6 if field.high == 7 else field.high
        else:
            first = _value(field, match["first"], line, where)
            last = _value(field, match["last"], line, where) if match["last"] else first
            if match["step"] and not match["last"]:
                last = field.high
        if first > last:
            raise _wrong(field, f"the range {item!r} runs backwards", line, where)
        values.update(range(first, last + 1, step))
    return frozenset(values)


def _value(field: _Field, text: str, line: str, where: str | None) -> int:
    if text.lower() in field.names:
        return field.names.index(text.lower()) + field.low
    if not text.isdecimal():
        raise _wrong(field, f"{text!r} is not a number", line, where)
    if not field.low <= int(text) <= field.high:
        raise _wrong(field, f"{text} is out of range", line, where)
    return int(text)


def _wrong(field: _Field, problem: str, line: str, where: str | None) -> UserError:
    return UserError(
        f"the {field.name} of {line!r}: {problem}", where=where, key="schedule", allowed=field.allowed, hint=_EXAMPLE
    )
