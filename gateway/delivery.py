"""Delivers result sets to destinations, then has the destination prove that it keeps them.

Contract. Each delivery has a state of its own; at most one thread works for a destination, so one dead PACS never
slows another. Sent means that every instance was answered with success. Attempts are counted before they begin and
every answer is noted when it comes, so after a crash exactly what is missing is sent.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import structlog

from clarion.crashpoints import effect
from clarion.errors import (
    BusUnavailableError,
    ClarionError,
    PeerRefusedError,
    PeerUnavailableError,
    PermanentError,
    StoreUnavailableError,
    TransientError,
    describe,
)
from clarion.model import Destination, derive_uid
from gateway.outbound import SENT, UNKNOWN_DESTINATION, Outbound, backoff, judge, outcome_of
from gateway.scu import Requestor, Timeouts
from gateway.statuses import NO_ANSWER, UNSENDABLE, Outcome, classify
from gateway.transcode import FALLBACKS, convert

if TYPE_CHECKING:
    from clarion.config import GatewayConfig
    from clarion.ports import Clock, EventBus, ObjectStore
    from gateway.answers import Answer, CommitmentAnswers
    from gateway.commitments import Report
    from gateway.outbound import Delivery, Item

log = structlog.get_logger()

_SAME_ASSOCIATION_WAIT_S = 0.3
_LOOK_FOR_REPORT = timedelta(seconds=1)
_CRASHED_ATTEMPT = timedelta(seconds=5)
_ASK_AGAIN = timedelta(seconds=5)
_DRAIN_S = 20.0
_SOP_CLASS_NOT_SUPPORTED = 0x0122


class DeliveryStage:
    """The delivery process: takes requests from the bus, works through what is due."""

    def __init__(
        self,
        *,
        config: GatewayConfig,
        bus: EventBus,
        outbound: Outbound,
        store: ObjectStore,
        clock: Clock,
        answers: CommitmentAnswers,
    ) -> None:
        self._answers = answers
        self._config = config
        self._bus = bus
        self._outbound = outbound
        self._store = store
        self._clock = clock
        self._timeouts = Timeouts(connect_s=config.delivery.connect_timeout_s, dimse_s=config.delivery.dimse_timeout_s)
        self._destinations = {one.name.lower(): one.destination for one in config.destinations}
        self._busy: dict[str, threading.Thread] = {}
        outbound.requeue([one.name for one in self._destinations.values()], clock.now())

    def step(self) -> bool:
        """Take requests, start a thread for each destination that has something due."""
        try:
            moved = self._bus.step()
        except BusUnavailableError:
            # What is due is sent while no request can come.
            self._start_due()
            raise
        self._start_due()
        return moved

    def _start_due(self) -> None:
        self._busy = {name: thread for name, thread in self._busy.items() if thread.is_alive()}
        waiting: dict[str, list[Delivery]] = {}
        for delivery in self._outbound.due(self._clock.now()):
            waiting.setdefault(delivery.destination.lower(), []).append(delivery)
        for name, deliveries in waiting.items():
            if name not in self._busy and len(self._busy) < self._config.scu.max_associations:
                thread = threading.Thread(target=self._work, args=(deliveries,), name=f"delivery-{name}", daemon=True)
                self._busy[name] = thread
                thread.start()

        self._start_answers()

    def _start_answers(self) -> None:
        """Tell the results of storage commitment that are due, a thread for each peer."""
        places = {one.ae_title: one for one in self._destinations.values()}
        owed: dict[str, list[Answer]] = {}
        for answer in self._answers.due(self._clock.now()):
            owed.setdefault(f"report to {answer.peer}", []).append(answer)
        for name, answers in owed.items():
            if name not in self._busy and len(self._busy) < self._config.scu.max_associations:
                thread = threading.Thread(target=self._tell, args=(answers, places), name=name, daemon=True)
                self._busy[name] = thread
                thread.start()

    def _tell(self, answers: list[Answer], places: dict[str, Destination]) -> None:
        for answer in answers:
            try:
                self._answers.tell(answer, places.get(answer.peer))
            except ClarionError as error:
                log.warning("commitment.later", peer=answer.peer, reason=str(error))
                return

    def facts(self) -> dict[str, object]:
        """Say which destinations are being served."""
        return {"destinations_busy": sorted(self._busy)}

    def drain(self) -> None:
        """Let the associations in progress end."""
        for thread in self._busy.values():
            thread.join(_DRAIN_S)
        self._bus.close()

    def idle(self) -> bool:
        """Tell whether no thread is at work."""
        return not any(thread.is_alive() for thread in self._busy.values())

    def _work(self, deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            try:
                if delivery.state == SENT:
                    self._verify(delivery)
                else:
                    self._send(delivery)
            except ClarionError as error:
                log.warning("delivery.interrupted", delivery=delivery.delivery_id, reason=str(error))
                if isinstance(error, TransientError):
                    return
            except Exception:  # the one catch-all of a destination's thread; the delivery is due again by itself
                log.exception("delivery.broken", delivery=delivery.delivery_id)

    # Sending ---------------------------------------------------------------------------------------------------

    def _send(self, delivery: Delivery) -> None:
        destination = self._destinations.get(delivery.destination.lower())
        if destination is None:
            now = self._clock.now()
            self._outbound.settle_failed(delivery, now=now, reason=UNKNOWN_DESTINATION, again=None)
            return
        attempt = self._outbound.begin_attempt(delivery.delivery_id, self._clock.now() + _CRASHED_ATTEMPT)
        if attempt is None:
            return
        delivery = replace(delivery, attempts=attempt)
        items = [item for item in self._outbound.items(delivery.delivery_id) if outcome_of(item) is Outcome.AGAIN]
        trouble = ""
        try:
            self._send_items(destination, delivery, items)
        except (PeerUnavailableError, PeerRefusedError, StoreUnavailableError) as error:
            trouble = str(error)
        except Exception as error:
            # Ours: it counts as an attempt, so that it ends, and with a reason.
            log.exception("delivery.broken", delivery=delivery.delivery_id)
            trouble = describe(error)
        self._settle(delivery, trouble)

    def _send_items(self, destination: Destination, delivery: Delivery, items: list[Item]) -> None:
        if not items:
            return
        classes = {(item.instance.sop_class_uid, item.instance.transfer_syntax_uid) for item in items}
        classes |= {(sop_class, syntax) for sop_class, _ in classes for syntax in FALLBACKS}
        with self._associate(destination, classes) as peer:
            failed = 0
            for item in items:
                note = ""
                try:
                    with effect("delivery.send"):
                        status = self._send_one(peer, item)
                except PermanentError as error:
                    status, note = UNSENDABLE, str(error)
                self._outbound.answered(delivery.delivery_id, item.instance.sop_instance_uid, status, note)
                if status == NO_ANSWER:
                    raise PeerUnavailableError(f"{destination.name}: no answer, or the association ended")
                # A refusal for good says something about the instance, one for now about the peer.
                failed += classify(status) is Outcome.AGAIN
                if failed / len(items) > self._config.delivery.failure_threshold:
                    raise PeerUnavailableError(f"{destination.name}: attempt given up after {failed} failures")

    def _send_one(self, peer: Requestor, item: Item) -> int:
        instance = item.instance
        data = self._store.read(instance.object)
        syntax = instance.transfer_syntax_uid
        if not peer.accepts(instance.sop_class_uid, syntax):
            target = next((one for one in FALLBACKS if peer.accepts(instance.sop_class_uid, one)), None)
            if target is None:
                return _SOP_CLASS_NOT_SUPPORTED
            data, syntax = convert(data, syntax, target), target
        try:
            return peer.store(
                data, sop_class=instance.sop_class_uid, sop_instance=instance.sop_instance_uid, syntax=syntax
            )
        except PeerUnavailableError:
            return NO_ANSWER

    def _settle(self, delivery: Delivery, trouble: str) -> None:
        now = self._clock.now()
        outcome, reason = judge(self._outbound.items(delivery.delivery_id))
        settings = self._config.delivery
        if outcome is Outcome.DONE:
            until = now + timedelta(seconds=settings.commitment_timeout_s)
            self._outbound.settle_sent(delivery, now=now, verify_until=until, verify=settings.verify)
            log.info("delivery.sent", delivery=delivery.delivery_id, destination=delivery.destination)
            return
        reason = f"{trouble}; {reason}" if trouble else reason
        again = None if outcome is Outcome.NEVER else self._again(delivery)
        log.warning("delivery.failed", delivery=delivery.delivery_id, reason=reason, final=again is None)
        self._outbound.settle_failed(delivery, now=now, reason=reason, again=now + again if again is not None else None)

    def _again(self, delivery: Delivery) -> timedelta | None:
        settings = self._config.delivery
        tries = delivery.attempts - delivery.spent
        if tries > settings.max_retries:
            return None
        return backoff(tries, settings.retry_delay_s, settings.retry_delay_max_s)

    def _associate(self, destination: Destination, classes: set[tuple[str, str]]) -> Requestor:
        def reported(report: Report) -> None:
            self._outbound.commitment_reported(
                report.transaction_uid,
                destination.ae_title,
                now=self._clock.now(),
                stored=report.stored,
                failed=report.failed,
            )

        return Requestor(
            destination,
            own_ae=self._config.scu.ae_title,
            classes=classes,
            timeouts=self._timeouts,
            on_report=reported,
        )

    # Proof -----------------------------------------------------------------------------------------------------

    def _verify(self, delivery: Delivery) -> None:
        destination = self._destinations.get(delivery.destination.lower())
        if destination is None:
            self._outbound.settle_unverified(delivery.delivery_id, UNKNOWN_DESTINATION)
            return
        overdue = delivery.verify_until is not None and self._clock.now() > delivery.verify_until
        if delivery.transaction_uid is not None and self._committed(delivery, destination.ae_title, overdue=overdue):
            return
        try:
            self._ask(destination, delivery, overdue=overdue)
        except (PeerUnavailableError, PeerRefusedError) as error:
            log.warning("delivery.verifylater", delivery=delivery.delivery_id, reason=str(error))
            if overdue:
                self._outbound.settle_unverified(delivery.delivery_id, f"no proof to be had: {error}")
            else:
                self._outbound.look_again(delivery.delivery_id, self._clock.now() + _CRASHED_ATTEMPT)

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
        with self._associate(destination, set()) as peer:
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
            series = {(item.instance.study_uid, item.instance.series_uid) for item in items}
            found = set().union(*(peer.find(study, one) for study, one in sorted(series)))
        missing = {str(item.instance.sop_instance_uid) for item in items} - found
        if missing and not overdue:
            # Many a PACS answers a query only when it has indexed what it took; absence is believed at the deadline.
            self._outbound.look_again(delivery.delivery_id, self._clock.now() + _ASK_AGAIN)
            return
        self._conclude(delivery, missing, "query")

    def _conclude(self, delivery: Delivery, missing: set[str], how: str) -> None:
        now = self._clock.now()
        if not missing:
            self._outbound.settle_verified(delivery, now=now, how=how)
            log.info("delivery.verified", delivery=delivery.delivery_id, how=how)
            return
        again = self._again(delivery)
        self._outbound.lost(delivery, missing=missing, now=now, again=now + again if again is not None else None)
