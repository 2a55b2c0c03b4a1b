"""Has a destination prove that it keeps what it was sent: by storage commitment, else by a query.

Absence is believed only at the deadline: many a PACS answers a query when it has indexed what it took, not before.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import structlog

from clarion.crashpoints import effect
from clarion.errors import PeerRefusedError, PeerUnavailableError
from clarion.model import derive_uid
from gateway.pool import UnreachedError
from gateway.web_peer import WebPeer

if TYPE_CHECKING:
    from collections.abc import Callable

    from clarion.model import Destination
    from clarion.ports import Clock
    from gateway.outbound import Delivery, Item, Outbound
    from gateway.pool import Pool
    from gateway.scu import Timeouts

log = structlog.get_logger()

_SAME_ASSOCIATION_WAIT_S = 0.3
_LOOK_FOR_REPORT = timedelta(seconds=1)
_ASK_AGAIN = timedelta(seconds=5)


class Prover:
    """Verifies deliveries. `again` says after how long a delivery is tried again, or None when its budget is spent.

    `reached` is told of every destination that is there.
    """

    def __init__(
        self,
        *,
        outbound: Outbound,
        pool: Pool,
        clock: Clock,
        timeouts: Timeouts,
        again: Callable[[Delivery], timedelta | None],
        reached: Callable[[Destination], None],
    ) -> None:
        self._reached = reached
        self._outbound = outbound
        self._pool = pool
        self._clock = clock
        self._timeouts = timeouts
        self._again = again

    def verify(self, destination: Destination, delivery: Delivery) -> None:
        """Look for proof, ask for it, or give up at the deadline. Raises UnreachedError."""
        overdue = delivery.is_overdue(self._clock.now())
        if delivery.transaction_uid is not None and self._committed(delivery, destination.ae_title, overdue=overdue):
            return
        try:
            if destination.web is not None:
                self._ask_web(destination, delivery, overdue=overdue)
            else:
                self._ask(destination, delivery, overdue=overdue)
        except UnreachedError:
            raise
        except (PeerUnavailableError, PeerRefusedError) as error:
            self.later(delivery, error, given_up=overdue)

    def later(self, delivery: Delivery, error: Exception, *, given_up: bool) -> None:
        """Look again soon at what could not be asked for now, or give it up."""
        log.warning("delivery.verifylater", delivery=delivery.delivery_id, reason=str(error))
        if given_up:
            self._outbound.settle_unverified(delivery.delivery_id, f"no proof to be had: {error}")
        else:
            self._outbound.look_again(delivery.delivery_id, self._clock.now() + _ASK_AGAIN)

    def _committed(self, delivery: Delivery, peer: str, *, overdue: bool) -> bool:
        """Judge by the peer's commitment report; tell whether there is nothing more to ask now."""
        stored = self._outbound.commitment(delivery.transaction_uid or "", peer)
        if stored is None:
            if not overdue:
                self._outbound.look_again(delivery.delivery_id, self._clock.now() + _LOOK_FOR_REPORT)
            return not overdue
        wanted = {str(item.instance.sop_instance_uid) for item in self._outbound.items(delivery.delivery_id)}
        self._conclude(delivery, wanted - stored, "storage-commitment")
        return True

    def _ask(self, destination: Destination, delivery: Delivery, *, overdue: bool) -> None:
        items = self._outbound.items(delivery.delivery_id)
        with self._pool.lend(destination, frozenset()) as lent:
            peer = lent.requestor
            self._reached(destination)
            if delivery.transaction_uid is None and not overdue and peer.commits:
                transaction = derive_uid("commitment", delivery.delivery_id, delivery.attempts)
                pairs = [(item.instance.sop_class_uid, item.instance.sop_instance_uid) for item in items]
                with effect("commitment.ask"):
                    agreed = peer.ask_commitment(transaction, pairs, _SAME_ASSOCIATION_WAIT_S)
                if agreed:
                    due = self._clock.now() + _LOOK_FOR_REPORT
                    self._outbound.commitment_asked(delivery.delivery_id, transaction, due)
                    return
            if not peer.finds:
                self._outbound.settle_unverified(delivery.delivery_id, "peer offers no commitment and no query")
                return
            found = _found(peer.find, items)
        self._judge(delivery, items, found, how="query", overdue=overdue)

    def _ask_web(self, destination: Destination, delivery: Delivery, *, overdue: bool) -> None:
        items = self._outbound.items(delivery.delivery_id)
        with WebPeer(destination, self._timeouts) as peer:
            found = _found(peer.find, items)
        self._reached(destination)
        self._judge(delivery, items, found, how="qido-rs", overdue=overdue)

    def _judge(self, delivery: Delivery, items: list[Item], found: set[str], *, how: str, overdue: bool) -> None:
        missing = {str(item.instance.sop_instance_uid) for item in items} - found
        if missing and not overdue:
            self._outbound.look_again(delivery.delivery_id, self._clock.now() + _ASK_AGAIN)
            return
        self._conclude(delivery, missing, how)

    def _conclude(self, delivery: Delivery, missing: set[str], how: str) -> None:
        now = self._clock.now()
        if not missing:
            self._outbound.settle_verified(delivery, now=now, how=how)
            log.info("delivery.verified", delivery=delivery.delivery_id, how=how)
            return
        again = self._again(delivery)
        self._outbound.lost(delivery, missing=missing, now=now, again=now + again if again is not None else None)


def _found(find: Callable[[str, str], set[str]], items: list[Item]) -> set[str]:
    series = {(item.instance.study_uid, item.instance.series_uid) for item in items}
    return set().union(*(find(study, one) for study, one in sorted(series)))
