"""Named places at which a test kills the process, before and after every effect of the flow.

`with effect("journal.sync"):` surrounds the effect; in production both sides are a comparison with None. A test sets
CLARION_CRASH_AT to `before:journal.sync` or `after:journal.sync`, with `#3` appended for the third time it is passed,
and the process then ends as by `kill -9`: no handler, no `finally`, no flush. `tests/architecture` checks that every
call that changes the world stands inside an effect, and that the list of names below is complete.
"""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

EFFECTS = (
    "store.write",
    "store.sync",
    "store.publish",
    "journal.write",
    "journal.sync",
    "journal.rotate",
    "scp.respond",
    "scp.associationended",
    "grouping.manifest",
    "grouping.commit",
    "grouping.close",
    "bus.publish",
    "bus.position",
    "bus.deadletter",
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
)

_armed: str | None = os.environ.get("CLARION_CRASH_AT")
_passed = 0


def arm(point: str | None) -> None:
    """Choose the point at which this process ends, or none; `before:NAME` or `after:NAME`, optionally `#COUNT`."""
    global _armed, _passed
    _armed, _passed = point, 0


def reach(point: str) -> None:
    """Pass the crash point: end the process here if it is the armed one."""
    global _passed  # noqa: PLW0603  counts passes of the one armed point
    if _armed is None:
        return
    name, _, count = _armed.partition("#")
    if name == point:
        _passed += 1
        if _passed == int(count or "1"):
            os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def effect(name: str) -> Iterator[None]:
    """Mark the block as the effect `name`, with a crash point on either side of it."""
    reach(f"before:{name}")
    yield
    reach(f"after:{name}")
