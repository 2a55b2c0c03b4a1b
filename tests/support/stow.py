"""STOW-RS into the real stage, in the test's own process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
from support.world import free_port

from clarion.adapters.clock import SystemClock
from clarion.adapters.objects import FileStore
from clarion.config import GatewayConfig
from clarion.model import ObjectRef
from console.stow_stage import StowStage
from gateway import journal

TOKEN = "a-token-of-a-modality"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
KIND = 'multipart/related; type="application/dicom"; boundary=bb'


class Stow:
    def __init__(self, root: Path, **gateway: Any) -> None:
        self.root, self.port = root, free_port()
        described = {
            "ae_titles": [{"ae_title": "B"}],
            "intake": {"watermark_percent": 100, "reserve_gb": 0},
            **gateway,
            "stow": {"port": self.port, "clients": [{"ae_title": "WEB", "token": TOKEN}], **gateway.get("stow", {})},
        }
        self.stage = StowStage(GatewayConfig.model_validate(described), root, SystemClock())
        self.url = f"http://127.0.0.1:{self.port}"

    def post(self, *files: bytes, path: str = "/B/studies", **headers: str) -> httpx.Response:
        return self.post_body(multipart(*files)[0], path, **headers)

    def post_body(self, body: bytes, path: str = "/B/studies", **headers: str) -> httpx.Response:
        said = {**HEADERS, "Content-Type": KIND, **headers}
        return httpx.post(self.url + path, content=body, headers=said, timeout=30)

    def journalled(self) -> list[tuple[str, dict[str, Any]]]:
        log = self.root / "journal" / "stow"
        return [(one.kind, one.fields) for one in journal.read(log, journal.START, 10_000)]

    def kept(self) -> dict[str, bytes]:
        store = FileStore(self.root / "objects")
        return {
            fields["sop_instance_uid"]: store.read(ObjectRef(**fields["object"]))
            for kind, fields in self.journalled()
            if kind == "stored"
        }


def multipart(*files: bytes) -> tuple[bytes, str]:
    body = b"".join(b"--bb\r\nContent-Type: application/dicom\r\n\r\n%b\r\n" % one for one in files) + b"--bb--\r\n"
    return body, KIND


def listed(answer: httpx.Response, sequence: str) -> list[tuple[str, int]]:
    items = answer.json().get(sequence, {}).get("Value", [])
    return [
        (one.get("00081155", {}).get("Value", [""])[0], one.get("00081197", {}).get("Value", [0])[0]) for one in items
    ]
