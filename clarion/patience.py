"""What becomes of an event that a handler could not bear: the same event again after a pause, or a dead letter.

A pure decision, the same on every bus: a TransientError is waited for as long as `patience_s`, and for ever while the
bus itself is the trouble, for then no dead letter could be written either; a PermanentError is never tried again;
anything else is tried `tries` times.
"""

from __future__ import annotations

from dataclasses import dataclass

from clarion.errors import BusUnavailableError, PermanentError, TransientError, describe

# A record that a handler could not bear for so long, though it asked for patience, is set aside.
PATIENCE_S = 3600.0
TRIES = 5
_PAUSE_S = 1.0


@dataclass(slots=True)
class Patience:
    """How often and how long one handler has been in trouble with the event it is at, and until when it rests."""

    tries: int = TRIES
    patience_s: float = PATIENCE_S
    failed: int = 0
    unforeseen: int = 0
    since: float | None = None
    paused_until: float = 0.0

    def pause_after(self, error: Exception, now: float) -> float | None:
        """Note a failure at monotonic time `now`; give the seconds to wait for another try, None to give up."""
        pause_s = self._judge(error, now)
        if pause_s is not None:
            self.paused_until = now + pause_s
        return pause_s

    def _judge(self, error: Exception, now: float) -> float | None:
        self.failed += 1
        if self.since is None:
            self.since = now
        if isinstance(error, TransientError):
            waits = isinstance(error, BusUnavailableError) or now - self.since <= self.patience_s
            return error.retry_after_s if waits else None
        if isinstance(error, PermanentError):
            return None
        self.unforeseen += 1
        return _PAUSE_S if self.unforeseen < self.tries else None

    def reset(self) -> None:
        """The event is behind us, handled or set aside."""
        self.failed, self.unforeseen, self.since = 0, 0, None


def reason_of(error: Exception) -> str:
    """Say why an event was given up; the text of errors that are not ours is left out."""
    return str(error) if isinstance(error, PermanentError | TransientError) else describe(error)
