"""Plug-ins of strangers: found by entry point; what is broken, doubled or misconfigured is named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from clarion import loading
from clarion.errors import ConfigError

GROUP = "clarion.rules"
MODULE = """
from pydantic import BaseModel, ConfigDict

class Rule:
    class Config(BaseModel):
        model_config = ConfigDict(extra="forbid")
        beds: int = 1
    def __init__(self, config):
        self.beds = config.beds
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A distribution of somebody else's with three rules; one of them takes a name of ours."""
    (tmp_path / "strangers_rules.py").write_text(MODULE)
    described = tmp_path / "strangers-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: strangers\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text(
        f"[{GROUP}]\nby-bed = strangers_rules:Rule\nbroken = strangers_rules:Nothing\nby-tag = strangers_rules:Rule\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    loading._points.cache_clear()
    yield
    loading._points.cache_clear()


@pytest.mark.usefixtures("install")
def test_a_strangers_rule_is_found_and_gets_its_settings() -> None:
    assert loading.names(GROUP) == ["broken", "by-bed", "by-tag"]
    assert loading.build(GROUP, "by-bed", {"beds": "3"}).beds == 3


@pytest.mark.usefixtures("install")
@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("by-bde", {}, "no rule named 'by-bde'; there are: broken, by-bed, by-tag"),
        ("broken", {}, "strangers_rules:Nothing) cannot be loaded"),
        ("by-tag", {}, "provided twice, as strangers_rules:Rule of strangers"),
        ("by-bed", {"beds": "many"}, "beds: "),
        ("by-bed", {"bed": "1"}, "bed: "),
    ],
)
def test_what_is_wrong_is_named(name: str, settings: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        loading.build(GROUP, name, settings)
