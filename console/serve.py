"""One stage as a process: `python -m console.serve STAGE CONFIG`, as `clarion serve` and the supervisor start it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import structlog

from clarion.adapters.files import make_folder
from clarion.errors import ClarionError
from clarion.processes import end_with_parent
from clarion.service import Service
from console.app import build_app, lock
from console.checks import check_config
from console.exits import status_of
from console.logs import configure

SUPERVISED_BY = "CLARION_SUPERVISED_BY"
DRAIN_S = 30.0
"""How long a stage may drain before it is killed."""
# A sender waits for intake and for nobody else: what works off what it took leaves the processors to it.
BEHIND_INTAKE = frozenset(("grouping", "streams", "orchestrator", "delivery", "relay"))
_NICE = 19


def serve(stage: str, config: Path) -> None:
    """Run a stage until it is told to stop."""
    if stage in BEHIND_INTAKE:
        os.nice(_NICE)
    checked = check_config(config)
    configure(checked.config.log, stage)
    folder = make_folder(checked.config.data / "run")
    # Whoever was orphaned a moment ago still drains; a supervised stage takes its place when it has.
    with lock(folder, stage, DRAIN_S if os.environ.get(SUPERVISED_BY) else 0.0):
        app = build_app(checked, stage)
        Service(stage, app.data, app.wakeup).run(app.stage(stage))
        app.wakeup.close()


def main() -> int:
    """Run as a child of the supervisor."""
    end_with_parent(os.environ.get(SUPERVISED_BY, ""), signal.SIGTERM)
    try:
        serve(sys.argv[1], Path(sys.argv[2]))
    except ClarionError as error:
        structlog.get_logger().error("stage.refused", stage=sys.argv[1], reason=str(error))
        return status_of(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
