"""Named places at which a test kills the process, before and after every effect of the flow.

`with effect("journal.sync"):` surrounds the effect; in production both sides are a comparison with None. A test sets
CLARION_CRASH_AT to `before:journal.sync` or `after:journal.sync`, with `#3` appended for the third time it is passed,
and the process then ends as by `kill -9`: no handler, no `finally`, no flush. `tests/architecture` checks that every
call that changes the world stands inside an effect, and that the list of names below is complete.
"""

from __future__ import annotations

import os
import signal
from contextlib import nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

EFFECTS = (
    "store.write",
    "store.sync",
    "store.publish",
    "store.remove",
    "journal.write",
    "journal.allocate",
    "journal.writeblocks",
    "journal.sync",
    "journal.rotate",
    "segment.forget",
    "segment.free",
    "segment.prepare",
    "segment.zeros",
    "segment.zerossynced",
    "scp.respond",
    "scp.associationended",
    "retention.groups",
    "retention.group",
    "retention.old",
    "retention.dropped",
    "retention.job",
    "retention.release",
    "retention.hold",
    "retention.notice",
    "retention.mark",
    "grouping.manifest",
    "grouping.commit",
    "grouping.close",
    "bus.publish",
    "bus.position",
    "bus.deadletter",
    "deadletters.mark",
    "deadletters.settle",
    "match.definition",
    "timeline.commit",
    "ledger.request",
    "ledger.start",
    "ledger.operator",
    "ledger.succeed",
    "ledger.fail",
    "payload.write",
    "executor.submit",
    "runner.outputs",
    "artifact.store",
    "resultset.store",
    "delivery.request",
    "delivery.attempt",
    "delivery.send",
    "delivery.record",
    "delivery.settle",
    "commitment.ask",
    "commitment.record",
    "delivery.verify",
    "delivery.unverified",
    "delivery.look",
    "delivery.lost",
    "delivery.outage",
    "delivery.outageended",
    "delivery.retry",
    "delivery.supersede",
    "commitment.report",
    "commitment.settle",
    "ledger.handback",
    "ledger.retry",
    "delivery.replay",
    "replay.plan",
    "replay.state",
    "replay.order",
    "replay.settle",
)

passes: dict[str, int] = {}
"""How often each point was passed by this process; counted only while a point is armed, `count` included."""

COUNT = "count"

_armed: str | None = os.environ.get("CLARION_CRASH_AT")


def arm(point: str | None) -> None:
    """Choose the point at which this process ends: `before:NAME` or `after:NAME`, optionally `#TIMES`.

    None disarms; COUNT only counts passes.
    """
    global _armed  # noqa: PLW0603  a process has one crash point, set by the test that forked it
    _armed = point
    passes.clear()


def reach(point: str) -> None:
    """Pass the crash point: end the process here if it is the armed one."""
    if _armed is None:
        return
    passes[point] = passes.get(point, 0) + 1
    name, _, count = _armed.partition("#")
    if name == point and passes[point] == int(count or "1"):
        os.kill(os.getpid(), signal.SIGKILL)


class _Effect:
    """A block with a crash point on either side; the one behind it is not passed by a block that raises."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        reach(f"before:{self._name}")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            reach(f"after:{self._name}")


_UNARMED = nullcontext()


def effect(name: str) -> AbstractContextManager[None]:
    """Mark the block as the effect `name`, with a crash point on either side of it."""
    return _UNARMED if _armed is None else _Effect(name)
