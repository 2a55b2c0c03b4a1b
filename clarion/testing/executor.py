"""An executor that runs operators in the calling process, at once: for simulations and crash tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clarion.crashpoints import effect
from clarion.model import LOST, WorkState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from clarion.model import OperatorWork


class InlineExecutor:
    """The executor; `run` takes an operator's environment and gives its exit status."""

    def __init__(self, run: Callable[[Mapping[str, str]], int]) -> None:
        self._run = run
        self._known: dict[str, int] = {}

    def submit(self, work: OperatorWork) -> None:
        """Run the work; passed over when it is known."""
        if work.work_id not in self._known:
            with effect("executor.submit"):
                self._known[work.work_id] = self._run(work.environment)

    def poll(self, work_id: str) -> WorkState:
        """Tell how the work ended."""
        if work_id not in self._known:
            return WorkState(exit_status=-1, reason=LOST)
        return WorkState(exit_status=self._known[work_id])

    def cancel(self, work_id: str) -> None:
        """Forget the work; nothing runs any more."""
        self._known.pop(work_id, None)
