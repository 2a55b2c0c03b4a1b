"""When a destination may be sent to: pure, in the destination's own time zone."""

from __future__ import annotations

from datetime import datetime, time, timedelta
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from clarion.model import DAYS

if TYPE_CHECKING:
    from clarion.model import Schedule, Window

# Windows repeat every week.
_LONGEST = timedelta(days=8)


def is_open(schedule: Schedule | None, now: datetime) -> bool:
    """Tell whether sending may begin; without a schedule always. `now` has a zone."""
    if schedule is None:
        return True
    local = _local(schedule, now)
    if local.date() in schedule.holidays:
        return True
    today, yesterday = DAYS[local.weekday()], DAYS[local.weekday() - 1]
    return any(_within(one, local.time(), today, yesterday) for one in schedule.windows)


def _within(window: Window, at: time, today: str, yesterday: str) -> bool:
    if window.ends is None or window.begins < window.ends:
        return today in window.days and window.begins <= at and (window.ends is None or at < window.ends)
    return (today in window.days and at >= window.begins) or (yesterday in window.days and at < window.ends)


def opens(schedule: Schedule, now: datetime) -> datetime | None:
    """Give when sending may begin next; now if it may, None if it never may within a week."""
    if is_open(schedule, now):
        return now
    local = _local(schedule, now)
    starts = {one.begins for one in schedule.windows} | {time()}
    days = [(local + timedelta(days=offset)).date() for offset in range(_LONGEST.days)]
    found = sorted(datetime.combine(day, start, local.tzinfo) for day in days for start in starts)
    return next((one for one in found if one > local and is_open(schedule, one)), None)


def _local(schedule: Schedule, now: datetime) -> datetime:
    return now.astimezone(ZoneInfo(schedule.timezone) if schedule.timezone else None)
