"""Sends the instances of a delivery on the associations that its destination takes.

Several associations share the work, one instance at a time each. The first belongs to the thread of the destination;
others join as long as there is enough to do, the destination allows it and all destinations together leave room. When
one gives up, all stop at their next instance: what has no answer is sent in the next attempt.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import structlog

from clarion.crashpoints import effect
from clarion.errors import (
    ClarionError,
    PeerRefusedError,
    PeerUnavailableError,
    PermanentError,
    TransientError,
    describe,
)
from gateway.pool import UnreachedError
from gateway.proposals import share_out
from gateway.statuses import CLASS_NOT_SUPPORTED, NO_ANSWER, UNSENDABLE, Outcome, classify
from gateway.transcode import FALLBACKS, convert

if TYPE_CHECKING:
    from collections.abc import Callable

    from clarion.model import Destination
    from clarion.ports import ObjectStore
    from gateway.outbound import Answered, Item, Outbound
    from gateway.pool import Classes, Lent, Pool

log = structlog.get_logger()

# An association that joins has to have this much to do, or making it costs more than it brings.
_EACH = 8
# A sync for each answer would cost more than sending does; what was not noted at a crash is sent once more.
_NOTED_TOGETHER = 20
_NOTED_AFTER_S = 0.2


class _Work:
    """Instances that several threads take one after another, and why they stop."""

    def __init__(self, items: list[Item], threshold: float, name: str) -> None:
        self._items = list(reversed(items))
        self._most_failures = threshold * len(items)
        self._failed = 0
        self._name = name
        self._lock = threading.Lock()
        self.trouble: Exception | None = None

    def take(self) -> Item | None:
        """Give the next instance; None when there are none, or there is trouble."""
        with self._lock:
            return self._items.pop() if self._items and self.trouble is None else None

    def note(self, status: int) -> None:
        """Count an answer. A refusal for good says something about the instance, one for now about the peer."""
        with self._lock:
            self._failed += classify(status) is Outcome.AGAIN
            if self._failed > self._most_failures:
                self.stop(PeerUnavailableError(f"{self._name}: attempt given up after {self._failed} failures"))

    def stop(self, error: Exception) -> None:
        """Let nothing more be taken; the first reason counts."""
        self.trouble = self.trouble or error


class Sender:
    """Sends by DIMSE. `join` tells whether one more association may be had, `leave` gives it back."""

    def __init__(
        self,
        *,
        store: ObjectStore,
        outbound: Outbound,
        pool: Pool,
        threshold: float,
        join: Callable[[], bool],
        leave: Callable[[], None],
    ) -> None:
        self._store = store
        self._outbound = outbound
        self._pool = pool
        self._threshold = threshold
        self._join = join
        self._leave = leave

    def send(self, destination: Destination, delivery_id: str, items: list[Item]) -> None:
        """Send instances; raises what stopped it: PeerUnavailableError, PeerRefusedError, StoreUnavailableError."""
        for part in share_out(items, lambda one: _classes(destination, [one])):
            self._send_part(destination, delivery_id, part)

    def _send_part(self, destination: Destination, delivery_id: str, items: list[Item]) -> None:
        work = _Work(items, self._threshold, destination.name)
        classes = _classes(destination, items)
        with self._pool.lend(destination, classes) as lent:
            # Only now: a peer that takes one association shall not give it to a helper.
            helpers = self._start_helpers(destination, delivery_id, classes, work, len(items))
            try:
                self._work_off(lent, destination, delivery_id, work)
            except BaseException:  # the helpers stop at their next instance, whatever it was
                work.stop(PeerUnavailableError(f"{destination.name}: another association gave up"))
                raise
            finally:
                for thread in helpers:
                    thread.join()
        if work.trouble is not None:
            raise work.trouble

    def _start_helpers(
        self, destination: Destination, delivery_id: str, classes: Classes, work: _Work, count: int
    ) -> list[threading.Thread]:
        helpers: list[threading.Thread] = []
        while len(helpers) + 1 < min(destination.max_associations, -(-count // _EACH)) and self._join():
            thread = threading.Thread(
                target=self._help,
                args=(destination, delivery_id, classes, work),
                daemon=True,
                name=f"delivery-{destination.name}",
            )
            try:
                thread.start()
            except RuntimeError as error:
                log.warning("delivery.fewerassociations", destination=destination.name, reason=str(error))
                self._leave()
                break
            helpers.append(thread)
        return helpers

    def _help(self, destination: Destination, delivery_id: str, classes: Classes, work: _Work) -> None:
        try:
            with self._pool.lend(destination, classes) as lent:
                self._work_off(lent, destination, delivery_id, work)
        except (UnreachedError, PeerRefusedError) as error:
            # A peer may take fewer associations than the profile says; the first one goes on.
            log.info("delivery.fewerassociations", destination=destination.name, reason=str(error))
        except ClarionError as error:
            work.stop(error)
        except Exception as error:
            log.exception("delivery.broken", delivery=delivery_id)
            work.stop(TransientError(describe(error)))
        finally:
            self._leave()

    def _work_off(self, lent: Lent, destination: Destination, delivery_id: str, work: _Work) -> None:
        answers: list[Answered] = []
        noted = time.monotonic()
        try:
            while (item := work.take()) is not None:
                status, note = self._send_one(lent, destination, item)
                answers.append((item.instance.sop_instance_uid, status, note))
                if len(answers) >= _NOTED_TOGETHER or time.monotonic() - noted > _NOTED_AFTER_S:
                    self._outbound.answered(delivery_id, answers)
                    answers, noted = [], time.monotonic()
                if status == NO_ANSWER:
                    raise PeerUnavailableError(f"{destination.name}: no answer, or the association ended")
                work.note(status)
        finally:
            if answers:
                self._outbound.answered(delivery_id, answers)

    def _send_one(self, lent: Lent, destination: Destination, item: Item) -> tuple[int, str]:
        try:
            data = self._store.read(item.instance.object)
            with effect("delivery.send"):
                status = self._say(lent, destination, item, data)
                if status == NO_ANSWER and lent.renew():
                    status = self._say(lent, destination, item, data)
        except PeerRefusedError:
            # Of the association that was to be had anew: it says nothing about the instance.
            raise
        except PermanentError as error:
            return UNSENDABLE, str(error)
        lent.proven()
        return status, ""

    def _say(self, lent: Lent, destination: Destination, item: Item, data: bytes) -> int:
        instance, peer = item.instance, lent.requestor
        syntax = instance.transfer_syntax_uid
        if not peer.accepts(instance.sop_class_uid, syntax):
            offered = [one for one in FALLBACKS if _takes(destination, one)]
            target = next((one for one in offered if peer.accepts(instance.sop_class_uid, one)), None)
            if target is None:
                return CLASS_NOT_SUPPORTED
            data, syntax = convert(data, syntax, target), target
        try:
            return peer.store(
                data, sop_class=instance.sop_class_uid, sop_instance=instance.sop_instance_uid, syntax=syntax
            )
        except PeerUnavailableError:
            return NO_ANSWER


def _takes(destination: Destination, syntax: str) -> bool:
    return not destination.transfer_syntaxes or syntax in destination.transfer_syntaxes


def _classes(destination: Destination, items: list[Item]) -> Classes:
    """Give what is proposed: each class in its stored transfer syntax and those it can be changed to."""
    stored = {(one.instance.sop_class_uid, one.instance.transfer_syntax_uid) for one in items}
    offered = stored | {(sop_class, syntax) for sop_class, _ in stored for syntax in FALLBACKS}
    return frozenset((sop_class, syntax) for sop_class, syntax in offered if _takes(destination, syntax))
