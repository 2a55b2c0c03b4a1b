"""Who may open the page: with a token in the configuration nobody enters without it, on any route."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from support.world import free_port

from clarion.adapters.database import Database
from clarion.adapters.objects import FileStore
from console.checks import check_config
from console.pages.stage import ConsoleStage

TOKEN = "correct horse battery staple"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("page")
    port = free_port()
    (root / "clarion.yaml").write_text(f"console: {{host: 0.0.0.0, port: {port}, token: '{TOKEN}'}}\n")
    checked = check_config(root / "clarion.yaml")
    checked.config.data.mkdir()
    stage = ConsoleStage(checked, Database(checked.config.database_url), FileStore(checked.config.data / "objects"))
    yield f"http://127.0.0.1:{port}"
    stage.drain()


CLOSED = ["/", "/fragment/studies", "/studies/1.2.3", "/studies/1.2.3/story", "/studies/1.2.3/pictures/1.2.png",
          "/quarantine", "/operations", "/fragment/operations", "/metrics", "/api/studies",
          "/api/studies/1.2.3", "/health/status",
          "/static/style.css", "/nothing"]  # fmt: skip


@pytest.mark.parametrize("path", CLOSED)
@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN[:-1]}, {"Cookie": "clarion_token=x"}]
)
def test_every_route_asks_for_the_token(page: str, path: str, headers: dict[str, str]) -> None:
    answer = httpx.get(page + path, headers=headers)
    assert answer.status_code == 401
    assert "console.token" in answer.text
    assert TOKEN not in answer.text


def test_bearer_opens(page: str) -> None:
    answer = httpx.get(page + "/api/studies", headers={"Authorization": f"Bearer {TOKEN}"})
    assert (answer.status_code, answer.json()) == (200, [])


def test_link_sets_a_cookie_and_drops_the_token_from_the_address(page: str) -> None:
    with httpx.Client() as browser:
        answer = browser.get(page + "/", params={"token": TOKEN})
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        flags = answer.headers["set-cookie"].lower()
        assert "httponly" in flags
        assert "samesite=strict" in flags
        assert browser.get(page + "/").status_code == 200


def test_no_redirect_to_another_host(page: str) -> None:
    answer = httpx.get(page + "//evil.example/x", params={"token": TOKEN})
    assert answer.headers["location"] == "/evil.example/x"


def test_health_is_open_for_probes(page: str) -> None:
    assert httpx.get(page + "/health/live").status_code == 200
    assert httpx.get(page + "/health/ready").status_code == 503, "nothing receives here"
