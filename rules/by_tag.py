"""The rule `by-tag`: instances with one value of an attribute belong together; quiet for a while, it is complete."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydicom.datadict import tag_for_keyword

from clarion.errors import InvalidInstanceError
from clarion.model import Action, Decision, Trigger

if TYPE_CHECKING:
    from datetime import datetime

    from clarion.model import Group, Instance

_TAG = re.compile(r"[0-9A-Fa-f]{4},?[0-9A-Fa-f]{4}")
_PIPELINE = "pipeline-"
SHORTEST_TIMEOUT_S = 5


class ByTag:
    """Groups by the value of a tag; see the registry specification, section 5."""

    class Config(BaseModel):
        """Its settings; each `pipeline-NAME` names a pipeline to run on a closed group."""

        model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

        timeout: int = Field(default=SHORTEST_TIMEOUT_S, ge=0)
        job_retry_delay: int = Field(default=5000, ge=0, alias="jobRetryDelay")
        priority: Literal["lower", "normal", "higher", "immediate"] = "normal"
        group_by: str = Field(default="0020000D", alias="groupBy")
        deadline: int = Field(default=3600, ge=1)
        late: Literal["rerun", "attach"] = "rerun"
        pipelines: dict[str, str] = Field(min_length=1)

        @model_validator(mode="before")
        @classmethod
        def _collect_pipelines(cls, value: Any) -> Any:  # noqa: ANN401  the settings as they were written
            if not isinstance(value, dict):
                return value
            kept = {key: one for key, one in value.items() if not key.lower().startswith(_PIPELINE)}
            named = {key[len(_PIPELINE) :]: one for key, one in value.items() if key.lower().startswith(_PIPELINE)}
            if not named and "pipelines" not in kept:
                raise ValueError("at least one setting `pipeline-NAME: PIPELINE-ID` is required")
            return {"pipelines": named, **kept}

        @field_validator("timeout")
        @classmethod
        def _not_hasty(cls, value: int) -> int:
            return max(value, SHORTEST_TIMEOUT_S)

        @field_validator("priority", mode="before")
        @classmethod
        def _any_case(cls, value: object) -> object:
            return value.lower() if isinstance(value, str) else value

        @field_validator("group_by")
        @classmethod
        def _as_tag(cls, value: str) -> str:
            if _TAG.fullmatch(value):
                return value.replace(",", "").upper()
            tag = tag_for_keyword(value)
            if tag is None:
                raise ValueError(f"{value!r} is neither a tag like 0020,000D nor a DICOM keyword")
            return f"{tag:08X}"

    def __init__(self, config: Config) -> None:
        self._config = config

    def group_of(self, instance: Instance) -> str | None:
        """Give the trimmed value of the tag. An instance without one is quarantined."""
        value = instance.value(self._config.group_by)
        if not value:
            raise InvalidInstanceError("group-key-missing", f"no value for {self._config.group_by}")
        return value

    def is_complete(self, group: Group, now: datetime) -> Decision:
        """Close when idle for longer than the quiet period, or when the deadline since opening has passed."""
        quiet = group.last_received + timedelta(seconds=self._config.timeout)
        late = group.opened + timedelta(seconds=self._config.deadline)
        if now > quiet:
            return Decision(action=Action.CLOSE, reason=f"quiet for {self._config.timeout} s")
        if now > late:
            return Decision(action=Action.CLOSE, reason=f"deadline of {self._config.deadline} s")
        return Decision(action=Action.WAIT, again=min(quiet, late))

    def triggers(self, group: Group) -> list[Trigger]:
        """One job per pipeline; none for a late revision when `late` is `attach`."""
        if group.revision > 1 and self._config.late == "attach":
            return []
        return [
            Trigger(pipeline_id=pipeline, name=name, priority=self._config.priority)
            for name, pipeline in sorted(self._config.pipelines.items())
        ]
