"""Sends the instances of a delivery to a DICOMweb service, in batches; each answer is noted before the next batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clarion.crashpoints import effect
from clarion.errors import PeerUnavailableError, PermanentError
from gateway.pool import TurnedAwayError, UnreachedError
from gateway.statuses import UNSENDABLE, Outcome, classify
from gateway.web_peer import WebPeer

if TYPE_CHECKING:
    from clarion.model import Destination
    from clarion.ports import ObjectStore
    from gateway.outbound import Item, Outbound
    from gateway.scu import Timeouts

# Registry specification 7.2.
BATCH = 10


class WebSender:
    """Sends by STOW-RS."""

    def __init__(self, *, store: ObjectStore, outbound: Outbound, threshold: float, timeouts: Timeouts) -> None:
        self._store = store
        self._outbound = outbound
        self._threshold = threshold
        self._timeouts = timeouts

    def send(self, destination: Destination, delivery_id: str, items: list[Item]) -> None:
        """Send instances; raises what stopped it: Unreached-, PeerUnavailable-, PeerRefused-, StoreUnavailableError."""
        failed = 0
        with WebPeer(destination, self._timeouts) as peer:
            for start in range(0, len(items), BATCH):
                readable = [one for one in items[start : start + BATCH] if self._is_readable(delivery_id, one)]
                if not readable:
                    continue
                with effect("delivery.send"):
                    answers = self._store_batch(peer, readable, first=start == 0)
                self._outbound.answered(delivery_id, [(uid, *answer) for uid, answer in answers.items()])
                failed += sum(classify(status) is Outcome.AGAIN for status, _ in answers.values())
                if failed > self._threshold * len(items):
                    raise PeerUnavailableError(f"{destination.name}: attempt given up after {failed} failures")

    def _store_batch(self, peer: WebPeer, items: list[Item], *, first: bool) -> dict[str, tuple[int, str]]:
        try:
            return peer.store([one.instance for one in items], self._store)
        except UnreachedError:
            raise
        except PeerUnavailableError as error:
            if first:
                raise TurnedAwayError(str(error)) from error
            raise

    def _is_readable(self, delivery_id: str, item: Item) -> bool:
        """Tell whether the object can be sent; one that cannot must not break the batch it would be in."""
        try:
            self._store.read(item.instance.object)
        except PermanentError as error:
            self._outbound.answered(delivery_id, [(item.instance.sop_instance_uid, UNSENDABLE, str(error))])
            return False
        return True
