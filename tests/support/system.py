"""A running Clarion of real processes in a folder of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from support.world import free_port, pause

from clarion.adapters.database import Database
from clarion.adapters.objects import FileStore
from console.checks import Checked, check_config
from console.studies import StudyView, read_study
from console.supervisor import Supervisor
from gateway.queries import list_studies


@dataclass
class System:
    root: Path
    checked: Checked
    supervisor: Supervisor
    database: Database
    store: FileStore

    @property
    def scp(self) -> int:
        return self.checked.config.gateway.scp.port

    @property
    def page(self) -> str:
        return f"http://127.0.0.1:{self.checked.config.console.port}"

    def log(self) -> str:
        return (self.root / "clarion.log").read_text()

    def studies(self) -> list[str]:
        return [one.study_uid for one in list_studies(self.database)]

    def view(self, study_uid: str) -> StudyView:
        view = read_study(self.database, self.store, study_uid)
        assert view is not None
        return view

    def wait_for(self, condition: Callable[[], bool], what: str, deadline_s: float = 120) -> None:
        end = time.monotonic() + deadline_s
        while not condition():
            self.supervisor.look()
            assert time.monotonic() < end, f"{what}: not within {deadline_s} s\n{self.log()[-3000:]}"
            pause(0.1)

    def wait_for_state(self, study_uid: str, *states: str, deadline_s: float = 120) -> StudyView:
        def there() -> bool:
            return study_uid in self.studies() and self.view(study_uid).state in states

        self.wait_for(there, f"{study_uid} in {states}", deadline_s)
        return self.view(study_uid)


def describe(root: Path, **gateway: Any) -> Path:
    """Write a configuration with free ports; `gateway` keys override."""
    described = {
        "data": "data",
        "gateway": {
            "scp": {"port": free_port()},
            "ae_titles": [{"ae_title": "CHEST", "settings": {"pipeline-chest": "chest-ct"}}],
            "sources": [{"ae_title": "SENDER", "host": "127.0.0.1"}],
            "intake": {"watermark_percent": 100, "reserve_gb": 0.5},
            **gateway,
        },
        "pipelines": [
            {
                "id": "chest-ct",
                "file": "builtin:chest-ct",
                "destinations": [one["name"] for one in gateway.get("destinations", [])],
            }
        ],
        "console": {"port": free_port()},
    }
    root.mkdir(parents=True, exist_ok=True)
    path = root / "clarion.yaml"
    path.write_text(yaml.safe_dump(described))
    return path


@contextmanager
def running(config: Path) -> Iterator[System]:
    checked = check_config(config)
    with (config.parent / "clarion.log").open("ab") as log:
        supervisor = Supervisor(checked, log)
        try:
            supervisor.start()
            yield System(
                config.parent,
                checked,
                supervisor,
                Database(checked.config.database_url),
                FileStore(checked.config.data / "objects"),
            )
        finally:
            supervisor.stop()
