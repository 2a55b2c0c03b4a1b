"""The kinds of value that a configuration has: AE titles, ports, names, files; and the model of its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo


def check_ae_title(text: str) -> str:
    """Check an AE title (PS3.5 6.2, VR AE); outer spaces are not part of it. Raises ValueError."""
    trimmed = text.strip(" ")
    if not 1 <= len(trimmed) <= 16:  # noqa: PLR2004  the length of VR AE
        raise ValueError("an AE title has 1 to 16 characters")
    if "\\" in trimmed or not trimmed.isascii() or not trimmed.isprintable():
        raise ValueError("an AE title has no backslash, no control characters and only ASCII")
    return trimmed


def _beside_the_file(path: Path, info: ValidationInfo) -> Path:
    """Take a relative path as beside the configuration file."""
    return (info.context["beside"] / path).resolve() if info.context else path


AeTitle = Annotated[str, AfterValidator(check_ae_title)]
BesideFile = Annotated[Path, AfterValidator(_beside_the_file)]
TlsProfile = Literal["bcp195", "bcp195-modified"]
Port = Annotated[int, Field(ge=1, le=65535)]
Name = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[A-Za-z0-9_-]+$")]


class Model(BaseModel):
    """A part of the configuration: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")
