"""The routes. Loopback needs no token; everything else needs the configured one, as a bearer or a cookie."""

from __future__ import annotations

import hmac
import io
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates
from PIL import Image

from clarion.adapters.deadletters import count_by_reason
from clarion.adapters.history import list_events
from clarion.elements import Walker
from clarion.errors import TransientError
from clarion.model import is_uid
from clarion.service import read_heartbeats
from console.carriage import Carriage
from console.checks import is_loopback
from console.event_views import line_of
from console.metrics import METRICS_TYPE, render_metrics
from console.stages import read_stages
from console.studies import read_studies, read_study
from gateway.queries import list_quarantine
from gateway.retention import policy_of, quarantine_ends
from streams.queries import PROGRESS
from streams.replays import list_replays

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from clarion.adapters.database import Database
    from clarion.config import Config
    from clarion.model import ResultInstance
    from clarion.ports import ObjectStore

_HERE = Path(__file__).parent
_OPEN = frozenset(("/health/live", "/health/ready"))
_COOKIE = "clarion_token"
_ROWS, _COLUMNS, _PIXELS = 0x00280010, 0x00280011, 0x7FE00010
_REPLAYS, _EVENTS = 20, 30
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Pages:
    """What the routes need."""

    def __init__(self, config: Config, database: Database, store: ObjectStore) -> None:
        self._config = config
        self._database = database
        self._store = store
        self._carriage = Carriage(config, database)
        self._templates = Jinja2Templates(directory=_HERE / "templates")
        self._templates.env.filters.update(clock=_clock, size=_size)
        self._token = None if config.console.token is None else config.console.token.get_secret_value()

    def application(self) -> FastAPI:
        """Make the application."""
        app = FastAPI(title="Clarion", docs_url=None, redoc_url=None, openapi_url=None)
        app.middleware("http")(self._guard)
        app.add_exception_handler(TransientError, _away)
        app.mount("/static", StaticFiles(directory=_HERE / "static"), name="static")
        for path, handler in (("/", self.index), ("/fragment/studies", self.fragment), ("/studies/{uid}", self.study)):
            app.get(path, response_class=HTMLResponse)(handler)
        app.get("/studies/{uid}/story", response_class=HTMLResponse)(self.story)
        app.get("/studies/{uid}/pictures/{instance}.png")(self.picture)
        app.get("/quarantine", response_class=HTMLResponse)(self.quarantine)
        app.get("/operations", response_class=HTMLResponse)(self.operations)
        app.get("/fragment/operations", response_class=HTMLResponse)(self.operations_fragment)
        app.get("/metrics")(self.metrics)
        app.get("/api/studies")(self.api_studies)
        app.get("/api/studies/{uid}")(self.api_study)
        app.get("/health/live")(self.live)
        app.get("/health/ready")(self.ready)
        app.get("/health/status")(self.health)
        return app

    async def _guard(self, request: Request, proceed: Callable[[Request], Awaitable[Response]]) -> Response:
        """Let in whoever may come; say so otherwise. Every answer carries the same safe headers."""
        given = request.query_params.get("token")
        if self._token is not None and given is not None and _same(given, self._token):
            response: Response = RedirectResponse("/" + request.url.path.lstrip("/"), status_code=303)
            response.set_cookie(_COOKIE, self._token, httponly=True, samesite="strict", max_age=12 * 3600)
        elif request.url.path in _OPEN or self._may_enter(request):
            response = await proceed(request)
        else:
            response = PlainTextResponse(
                "401: a token is required. Open /?token=TOKEN with the console.token of the configuration, or send it "
                "as `Authorization: Bearer TOKEN`.\n",
                status_code=401,
                headers={"WWW-Authenticate": "Bearer"},
            )
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    def _may_enter(self, request: Request) -> bool:
        if self._token is None:
            # Loopback only, and only under a loopback name: a foreign page cannot point its own name at us.
            return is_loopback(request.url.hostname or "")
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        return _same(bearer, self._token) or _same(request.cookies.get(_COOKIE, ""), self._token)

    # Pages -----------------------------------------------------------------------------------------------------

    def index(self, request: Request) -> Response:
        """The list of studies."""
        return self._render(request, "index.html", self._overview())

    def fragment(self, request: Request) -> Response:
        """The part of the list that is fetched again and again."""
        return self._render(request, "studies.html", self._overview())

    def study(self, request: Request, uid: str) -> Response:
        """One study."""
        return self._render(request, "study.html", self._one(uid))

    def story(self, request: Request, uid: str) -> Response:
        """The part of a study's page that is fetched again and again."""
        return self._render(request, "story.html", self._one(uid))

    def quarantine(self, request: Request) -> Response:
        """What was set aside, and why."""
        policy = policy_of(self._config.gateway)
        rows = [(one, quarantine_ends(one.received, policy)) for one in list_quarantine(self._database)]
        return self._render(request, "quarantine.html", {"rows": rows})

    def operations(self, request: Request) -> Response:
        """Topics, handlers behind, dead letters, replays, the latest events."""
        return self._render(request, "operations.html", self._operations())

    def operations_fragment(self, request: Request) -> Response:
        """The part of that page that is fetched again and again."""
        return self._render(request, "operations_parts.html", self._operations())

    def picture(self, uid: str, instance: str) -> Response:
        """A result picture as PNG."""
        found = [
            one
            for instances in self._view(uid).results.values()
            for one in instances
            if one.sop_instance_uid == instance and one.sop_class_uid == _SECONDARY_CAPTURE
        ]
        if not found:
            raise HTTPException(404, "no such picture")
        return Response(_png(self._store, found[0]), media_type="image/png", headers={"Cache-Control": "max-age=3600"})

    # JSON ------------------------------------------------------------------------------------------------------

    def api_studies(self) -> list[dict[str, Any]]:
        """The list of studies."""
        return [{"state": one.state, "last": one.last, **asdict(one.counts)} for one in read_studies(self._database)]

    def api_study(self, uid: str) -> dict[str, Any]:
        """One study."""
        return asdict(self._view(uid))

    def metrics(self) -> Response:
        """Everything that is counted, for Prometheus."""
        return Response(render_metrics(self._config, self._database, self._carriage.read()), media_type=METRICS_TYPE)

    def live(self) -> PlainTextResponse:
        """The process answers."""
        return PlainTextResponse("Healthy")

    def ready(self) -> PlainTextResponse:
        """Receiving runs and has room."""
        beats = {beat.stage: beat for beat in read_heartbeats(self._config.data / "run")}
        intake = beats.get("intake")
        good = intake is not None and intake.alive and intake.facts.get("space") == "ok"
        return PlainTextResponse("Healthy" if good else "Unhealthy", status_code=200 if good else 503)

    def health(self) -> JSONResponse:
        """Which stages run."""
        stages = read_stages(self._config)
        services = {one["stage"]: "Running" if one["alive"] else "Stopped" for one in stages}
        troubles = {one["stage"]: one["trouble"] for one in stages if one["trouble"]}
        return JSONResponse({"services": services, "troubles": troubles})

    # ---------------------------------------------------------------------------------------------------------

    def _overview(self) -> dict[str, Any]:
        rows = read_studies(self._database, 100)
        totals = {state: sum(one.state == state for one in rows) for state in ("Verified", "Failed", "Quarantined")}
        return {"rows": rows, "progress": PROGRESS, "stages": read_stages(self._config), "totals": totals}

    def _operations(self) -> dict[str, Any]:
        replays = list_replays(self._database, _REPLAYS)
        rows = list_events(self._database, _EVENTS)
        return {
            "carriage": self._carriage.read(),
            "letters": count_by_reason(self._database),
            "replays": replays,
            "events": [line_of(row, unmask=False) for row in reversed(rows)],
            "stages": read_stages(self._config),
        }

    def _one(self, uid: str) -> dict[str, Any]:
        return {"view": self._view(uid), "progress": PROGRESS, "secondary_capture": _SECONDARY_CAPTURE}

    def _view(self, uid: str) -> Any:  # noqa: ANN401  a StudyView; FastAPI must not make a schema of it
        view = read_study(self._database, self._store, uid) if is_uid(uid) or uid == "unknown" else None
        if view is None:
            raise HTTPException(404, "no such study")
        return view

    def _render(self, request: Request, name: str, values: dict[str, Any]) -> Response:
        return self._templates.TemplateResponse(request, name, values, headers={"Cache-Control": "no-store"})


def _away(_request: Request, error: Exception) -> Response:
    """Say that what the page reads from cannot be reached now; it tries again by itself."""
    return PlainTextResponse(f"503: {error}\n", status_code=503, headers={"Retry-After": "5"})


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())


def _clock(text: str) -> str:
    """Show a stored time in this machine's zone, to the second."""
    return f"{datetime.fromisoformat(text).astimezone():%Y-%m-%d %H:%M:%S}"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"  # noqa: PLR2004  a tenth of a MB


def _png(store: ObjectStore, instance: ResultInstance) -> bytes:
    """Turn one of our own RGB pictures into PNG."""
    data = store.read(instance.object)
    values = {
        one.tag: data[one.start : one.end] for one in Walker(data, instance.transfer_syntax_uid).elements()
        if one.tag in {_ROWS, _COLUMNS, _PIXELS}
    }  # fmt: skip
    size = int.from_bytes(values[_COLUMNS], "little"), int.from_bytes(values[_ROWS], "little")
    out = io.BytesIO()
    Image.frombytes("RGB", size, values[_PIXELS][: size[0] * size[1] * 3]).save(out, "PNG")
    return out.getvalue()
