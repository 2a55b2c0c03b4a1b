"""Delivers result sets to destinations, then has the destination prove that it keeps them.

Contract. Each delivery has a state of its own; one thread works for a destination, and one that cannot be reached is
left alone for a while (its circuit is open), so one dead PACS never slows another. Sent means that every instance was
answered with success. Attempts are counted before they begin and answers are noted soon after they come, so after a
crash what is missing is sent, and perhaps a few instances once more.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from clarion.errors import (
    BusUnavailableError,
    ClarionError,
    PeerRefusedError,
    PeerUnavailableError,
    StoreUnavailableError,
    TransientError,
    describe,
)
from gateway.circuits import Circuits
from gateway.outbound import BY_A_PERSON, SENT, UNKNOWN_DESTINATION, Outbound, backoff, judge, outcome_of
from gateway.pool import Pool, TurnedAwayError, UnreachedError
from gateway.proving import Prover
from gateway.scu import Requestor, Timeouts
from gateway.sending import Sender
from gateway.statuses import Outcome
from gateway.web_sending import WebSender
from gateway.windows import is_open, opens

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from clarion.config import GatewayConfig
    from clarion.model import Destination
    from clarion.ports import Clock, EventBus, ObjectStore
    from gateway.answers import Answer, CommitmentAnswers
    from gateway.commitments import Report
    from gateway.outages import Outages
    from gateway.outbound import Delivery, Item
    from gateway.pool import Classes

log = structlog.get_logger()

_CRASHED_ATTEMPT = timedelta(seconds=5)
_DRAIN_S = 20.0
_RELEASE_S = 2.0


class DeliveryStage:
    """The delivery process: takes requests from the bus, works through what is due."""

    def __init__(
        self,
        *,
        config: GatewayConfig,
        bus: EventBus,
        outbound: Outbound,
        outages: Outages,
        store: ObjectStore,
        clock: Clock,
        answers: CommitmentAnswers,
    ) -> None:
        self._answers = answers
        self._config = config
        self._bus = bus
        self._outbound = outbound
        self._clock = clock
        self._destinations = {one.name.lower(): one.destination for one in config.destinations}
        self._busy: dict[str, threading.Thread] = {}
        self._circuits = Circuits(clock)
        self._outages = outages
        self._longest_outage = timedelta(hours=config.delivery.outage_h)
        self._room = threading.BoundedSemaphore(config.scu.max_associations)
        timeouts = Timeouts(connect_s=config.delivery.connect_timeout_s, dimse_s=config.delivery.dimse_timeout_s)
        self._pool = Pool(partial(self._associate, timeouts), most=config.scu.max_associations)
        threshold = config.delivery.failure_threshold
        self._by_dimse = Sender(
            store=store,
            outbound=outbound,
            pool=self._pool,
            threshold=threshold,
            join=lambda: self._room.acquire(blocking=False),
            leave=self._room.release,
        )
        self._by_web = WebSender(store=store, outbound=outbound, threshold=threshold, timeouts=timeouts)
        self._prover = Prover(
            outbound=outbound,
            pool=self._pool,
            clock=clock,
            timeouts=timeouts,
            again=self._again,
            reached=self._reached,
        )
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
        now = self._clock.now()
        waiting: dict[str, list[Delivery]] = {}
        for delivery in self._outbound.due(now, passing_over={*self._busy, *self._circuits.open_ones()}):
            waiting.setdefault(delivery.destination.lower(), []).append(delivery)
        for name, deliveries in waiting.items():
            chosen = [one for one in deliveries if self._is_its_hour(one, now)]
            if chosen and self._circuits.is_closed(name):
                self._start(name, self._work, chosen)
        self._start_answers()

    def _is_its_hour(self, delivery: Delivery, now: datetime) -> bool:
        """Tell whether it need not wait: what was sent is verified at any time, what a person took up sent at once."""
        destination = self._destinations.get(delivery.destination.lower())
        if destination is None or delivery.state == SENT or delivery.reason == BY_A_PERSON:
            return True
        return is_open(destination.schedule, now)

    def _start(self, name: str, target: Callable[[list[Any]], None], work: list[Any]) -> None:
        """Work something off in a thread of its own, unless one by that name does, or there is no room for it."""
        if name in self._busy or not self._room.acquire(blocking=False):
            return

        def run() -> None:
            try:
                target(work)
            finally:
                self._room.release()

        thread = threading.Thread(target=run, name=f"delivery-{name}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            # No thread is to be had now: it stays due.
            log.warning("delivery.later", destination=name, reason=str(error))
            self._room.release()
            return
        self._busy[name] = thread

    def _start_answers(self) -> None:
        """Tell the results of storage commitment that are due, a thread for each peer."""
        owed: dict[str, list[Answer]] = {}
        for answer in self._answers.due(self._clock.now()):
            owed.setdefault(f"report to {answer.peer}", []).append(answer)
        for name, answers in owed.items():
            self._start(name, self._tell, answers)

    def _tell(self, answers: list[Answer]) -> None:
        places = {one.ae_title: one for one in self._destinations.values() if one.ae_title}
        for answer in answers:
            try:
                self._answers.tell(answer, places.get(answer.peer))
            except ClarionError as error:
                log.warning("commitment.later", peer=answer.peer, reason=str(error))
                return

    def facts(self) -> dict[str, object]:
        """Say which destinations are being served, which cannot be reached, and which have to wait for their hour."""
        now = self._clock.now()
        return {
            "destinations_busy": sorted(self._busy),
            "destinations_unreached": {
                name: str(now + timedelta(seconds=seconds)) for name, seconds in self._circuits.open_ones().items()
            },
            "destinations_waiting": {
                one.name: str(opens(one.schedule, now) or "never")
                for one in self._destinations.values()
                if one.schedule is not None and not is_open(one.schedule, now)
            },
        }

    def drain(self) -> None:
        """Let the associations in progress end."""
        end = time.monotonic() + _DRAIN_S
        for thread in self._busy.values():
            thread.join(max(0.0, end - time.monotonic()))
        self._pool.close(_RELEASE_S)
        self._bus.close()

    def idle(self) -> bool:
        """Tell whether no thread is at work."""
        return not any(thread.is_alive() for thread in self._busy.values())

    def _work(self, deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            if not self._is_its_hour(delivery, self._clock.now()):
                continue  # its window has closed while others were sent
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
            if not self._circuits.is_closed(delivery.destination.lower()):
                return

    def _verify(self, delivery: Delivery) -> None:
        destination = self._destinations.get(delivery.destination.lower())
        if destination is None:
            self._outbound.settle_unverified(delivery.delivery_id, UNKNOWN_DESTINATION)
            return
        overdue = delivery.is_overdue(self._clock.now())
        if self._outages.is_on(destination.name):
            # Whoever comes back has as long as usual: it may have to index first what it took.
            delivery = replace(delivery, verify_until=self._proof_until(), transaction_uid=None)
        try:
            self._prover.verify(destination, delivery)
        except UnreachedError as error:
            lasted = self._unreached(destination)
            self._prover.later(delivery, error, given_up=overdue and lasted >= self._longest_outage)

    def _reached(self, destination: Destination) -> None:
        """A destination is there."""
        self._circuits.worked(destination.name)
        self._outages.worked(destination.name, verify_until=self._proof_until())

    def _unreached(self, destination: Destination) -> timedelta:
        """It is not; give since how long."""
        self._circuits.failed(destination.name)
        return self._outages.failed(destination.name, self._clock.now())

    def _proof_until(self) -> datetime:
        return self._clock.now() + timedelta(seconds=self._config.delivery.commitment_timeout_s)

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
        try:
            trouble = self._try(destination, delivery, items)
        except UnreachedError as error:
            self._settle_unreached(delivery, str(error), self._unreached(destination))
            return
        self._settle(delivery, trouble)

    def _try(self, destination: Destination, delivery: Delivery, items: list[Item]) -> str:
        """Send what is to be sent; give why that ended early, if it did. Raises UnreachedError."""
        sender = self._by_dimse if destination.web is None else self._by_web
        try:
            if items:
                sender.send(destination, delivery.delivery_id, items)
        except UnreachedError:
            raise
        except (TurnedAwayError, PeerRefusedError) as error:
            self._reached(destination)
            self._circuits.failed(destination.name)
            return str(error)
        except (PeerUnavailableError, StoreUnavailableError) as error:
            return str(error)
        except Exception as error:
            # Ours: it counts as an attempt, so that it ends, and with a reason.
            log.exception("delivery.broken", delivery=delivery.delivery_id)
            return describe(error)
        self._reached(destination)
        return ""

    def _settle_unreached(self, delivery: Delivery, trouble: str, lasted: timedelta) -> None:
        """Nobody was there. For as long as an outage may last that spends no tries: a PACS is away for a weekend."""
        if lasted < self._longest_outage:
            log.warning("delivery.unreached", delivery=delivery.delivery_id, reason=trouble)
            self._outbound.settle_unreached(delivery, now=self._clock.now(), reason=trouble)
        else:
            self._settle(delivery, trouble)

    def _settle(self, delivery: Delivery, trouble: str) -> None:
        now = self._clock.now()
        outcome, reason = judge(self._outbound.items(delivery.delivery_id))
        settings = self._config.delivery
        if outcome is Outcome.DONE:
            self._outbound.settle_sent(delivery, now=now, verify_until=self._proof_until(), verify=settings.verify)
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

    def _associate(self, timeouts: Timeouts, destination: Destination, classes: Classes) -> Requestor:
        def reported(report: Report) -> None:
            self._outbound.commitment_reported(
                report.transaction_uid,
                destination.ae_title,
                now=self._clock.now(),
                stored=report.stored,
                failed=report.failed,
            )

        return Requestor(
            destination, own_ae=self._config.scu.ae_title, classes=classes, timeouts=timeouts, on_report=reported
        )
