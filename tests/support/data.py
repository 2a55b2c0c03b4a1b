"""Real DICOM beside the checkout; absent on a stranger's machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("CLARION_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def real(name: str) -> Path:
    """Give a folder of the real data, or skip by name; in CI a missing one fails."""
    folder = DATA / name
    if folder.is_dir():
        return folder
    message = f"{folder} is missing; set CLARION_TEST_DATA to the folder of the test data"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)
