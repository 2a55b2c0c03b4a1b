"""STOW-RS as a server (PS3.18 10.5): who may send, the body as it comes, the result of each instance."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import structlog
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exception_handlers import http_exception_handler
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from clarion.model import is_uid
from gateway.association_log import ENDED, REJECTED
from gateway.board import PEER_NUMBERS
from gateway.intake import OUT_OF_RESOURCES
from gateway.multipart import MultipartError, parameters_of
from gateway.uploads import Client, Result, Upload
from gateway.wire.pace import Pace

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from clarion.config import GatewayConfig, StowClient
    from gateway.association_log import AssociationLog
    from gateway.intake import Intake

log = structlog.get_logger()

MEDIA_TYPE = "application/dicom+json"
_STALL_S = 30.0
_RETRY_AFTER_S = "60"
_FAILED, _STORED, _OTHER_FAILURES = "00081198", "00081199", "0008119A"
_REFERENCED_CLASS, _REFERENCED_INSTANCE, _FAILURE_REASON = "00081150", "00081155", "00081197"


class Stow:
    """The routes, and what has been answered."""

    def __init__(self, config: GatewayConfig, intake: Intake, written: AssociationLog) -> None:
        self._written = written
        self.peers: dict[str, list[int]] = {}
        if config.stow is None:
            raise ValueError("gateway.stow is not configured")
        self._config = config
        self._clients = config.stow.clients
        self._most = config.stow.max_requests
        self._called = {one.ae_title for one in config.ae_titles}
        self._intake = intake
        self._open = 0
        self.stored = self.refused = 0
        self.rejected: dict[str, int] = {}

    @property
    def open_requests(self) -> int:
        """How many requests are being received."""
        return self._open

    def application(self) -> FastAPI:
        """Make the application."""
        application = FastAPI(title="Clarion STOW-RS", docs_url=None, redoc_url=None, openapi_url=None)

        @application.post("/{called}/studies")
        async def store(request: Request, called: str) -> Response:
            return await self._store(request, called, "")

        @application.post("/{called}/studies/{study}")
        async def store_study(request: Request, called: str, study: str) -> Response:
            return await self._store(request, called, study)

        # Who is turned away may not be done sending: nothing more of the body is read, however much there is.
        @application.exception_handler(StarletteHTTPException)
        async def turn_away(request: Request, error: StarletteHTTPException) -> Response:
            error.headers = {**(error.headers or {}), "Connection": "close"}
            return await http_exception_handler(request, error)

        return application

    async def _store(self, request: Request, called: str, study: str) -> Response:
        client = self._client(request)
        if client is None:
            self._reject("token", request)
            raise HTTPException(
                401, "a token that gateway.stow.clients knows is required", {"WWW-Authenticate": "Bearer"}
            )
        if called not in self._called:
            self._reject("called-ae", request, calling_ae=client.ae_title, called_ae=called)
            raise HTTPException(404, f"{called!r} is none of gateway.ae_titles")
        if study and not is_uid(study):
            raise HTTPException(400, "the study in the path is no UID")
        try:
            boundary = _boundary_of(request)
        except HTTPException as error:
            self._reject("media-type", request, calling_ae=client.ae_title, called_ae=called, reason=str(error.detail))
            raise
        if self._open >= self._most:
            self._reject("request-limit", request, calling_ae=client.ae_title, called_ae=called)
            raise HTTPException(503, "too many requests at once", {"Retry-After": "5"})
        if not self._intake.space.available():
            self._reject("disk-space", request, calling_ae=client.ae_title, called_ae=called)
            raise HTTPException(503, "disk space low", {"Retry-After": _RETRY_AFTER_S})
        sender = Client(calling_ae=client.ae_title, called_ae=called, study_uid=study)
        self._open += 1
        try:
            return await self._receive(request, boundary, sender)
        finally:
            self._open -= 1

    async def _receive(self, request: Request, boundary: str, sender: Client) -> Response:
        try:
            upload = Upload(boundary, sender, self._intake, self._config.scp)
        except MultipartError as error:
            raise HTTPException(400, str(error)) from error
        log.info("association.requested", association=upload.id, calling_ae=sender.calling_ae,
                 called_ae=sender.called_ae, address=_address(request))  # fmt: skip
        reason, begun = "failed", time.monotonic()
        try:
            async for piece in _pieces(request):
                await run_in_threadpool(upload.feed, piece)
            results = await run_in_threadpool(upload.finish)
            reason = ""
        except MultipartError as error:
            reason = str(error)
            raise HTTPException(400, reason) from error
        except TimeoutError as error:
            reason = "stalled"
            raise HTTPException(408, "nothing came in time") from error
        except ClientDisconnect as error:
            reason = "connection lost"
            raise HTTPException(400, reason) from error
        finally:
            if reason:
                await run_in_threadpool(upload.abandon, reason)
            self._note_ended(request, upload, sender, reason or "released", begun)
        return self._respond(results)

    def _note_ended(self, request: Request, upload: Upload, sender: Client, reason: str, begun: float) -> None:
        log.info("association.ended", association=upload.id, reason=reason)
        stored = sum(one.stored for one in upload.results)
        refused = Counter(f"0x{one.answer.status:04X}" for one in upload.results if not one.stored)
        self.stored += stored
        self.refused += refused.total()
        counts = self.peers.setdefault(sender.calling_ae, [0] * len(PEER_NUMBERS))
        for index, count in enumerate((1, stored, refused.total(), upload.size)):
            counts[index] += count
        self._written.write(
            ENDED,
            association=upload.id,
            calling_ae=sender.calling_ae,
            called_ae=sender.called_ae,
            address=_address(request),
            web=True,
            seconds=round(time.monotonic() - begun, 3),
            reason=reason,
            stored=stored,
            refused=refused,
            bytes=upload.size,
        )

    def _respond(self, results: list[Result]) -> Response:
        if not results:
            raise HTTPException(400, "a body without a part")
        stored = [one for one in results if one.stored]
        failed = [one for one in results if not one.stored]
        status, headers = 200, {}
        if failed:
            status = 202 if stored else 409
        if not stored and all(one.answer.status == OUT_OF_RESOURCES for one in failed):
            status, headers = 503, {"Retry-After": _RETRY_AFTER_S}
        return JSONResponse(_described(stored, failed), status, headers, MEDIA_TYPE)

    def _client(self, request: Request) -> StowClient | None:
        """Find whose token it is, looking at all of them, whichever it is."""
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        given = token.strip().encode() if kind.lower() == "bearer" else b""
        found = None
        for one in self._clients:
            if hmac.compare_digest(given, one.token.get_secret_value().encode()):
                found = one
        return found

    def _reject(self, check: str, request: Request, **who: str) -> None:
        self.rejected[check] = self.rejected.get(check, 0) + 1
        log.warning("association.rejected", check=check, address=_address(request), **who)
        self._written.write(REJECTED, check=check, web=True, address=_address(request), **who)


def _address(request: Request) -> str:
    return request.client.host if request.client is not None else ""


def _boundary_of(request: Request) -> str:
    """Read the boundary from the request's type. Raises HTTPException."""
    kind, parameters = parameters_of(request.headers.get("content-type", ""))
    if kind != "multipart/related" or parameters.get("type", "application/dicom").lower() != "application/dicom":
        raise HTTPException(415, 'only multipart/related; type="application/dicom" is taken')
    accepted = request.headers.get("accept", "*/*").lower()
    if not any(one in accepted for one in (MEDIA_TYPE, "application/json", "application/*", "*/*")):
        raise HTTPException(406, f"answers are {MEDIA_TYPE} only")
    return parameters.get("boundary", "")


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    """Give the body as it comes. Raises TimeoutError when it makes no progress, ClientDisconnect."""
    stream = request.stream()
    pace = Pace(_STALL_S)
    pace.begin()
    while True:
        try:
            piece = await asyncio.wait_for(anext(stream), _STALL_S)
        except StopAsyncIteration:
            return
        if pace.is_slow(len(piece)):
            raise TimeoutError
        if piece:
            yield piece


def _described(stored: list[Result], failed: list[Result]) -> dict[str, Any]:
    """Describe the results as PS3.18 10.5.3.2 and PS3.18 F.2 have it."""
    named = [one for one in failed if one.sop_instance_uid]
    unnamed = [one for one in failed if not one.sop_instance_uid]
    described: dict[str, Any] = {}
    if stored:
        described[_STORED] = _sequence([_item(one) for one in stored])
    if named:
        described[_FAILED] = _sequence([{**_item(one), **_reason(one)} for one in named])
    if unnamed:
        described[_OTHER_FAILURES] = _sequence([_reason(one) for one in unnamed])
    return described


def _sequence(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {"vr": "SQ", "Value": items}


def _item(result: Result) -> dict[str, Any]:
    return {
        _REFERENCED_CLASS: {"vr": "UI", "Value": [result.sop_class_uid]},
        _REFERENCED_INSTANCE: {"vr": "UI", "Value": [result.sop_instance_uid]},
    }


def _reason(result: Result) -> dict[str, Any]:
    return {_FAILURE_REASON: {"vr": "US", "Value": [result.answer.status]}}
