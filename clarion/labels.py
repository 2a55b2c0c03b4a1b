"""Labels on a series' own grid, and what each of them means.

A label volume's array is uint8 `[slice, row, column]`; bit n-1 says that the voxel belongs to segment n, so that
segments may overlap. Up to eight segments.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from clarion.volume import load_volume, save_volume

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from clarion.volume import Volume

MAX_SEGMENTS = 8
_FILE = "segments.json"


@dataclass(frozen=True, slots=True)
class CodedConcept:
    """A code with its scheme and meaning (PS3.3 8.8)."""

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """What one label means; `colour` is RGB, 0 to 255."""

    number: int
    name: str
    category: CodedConcept
    kind: CodedConcept
    roi_type: str
    colour: tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """What made the labels: shown in every result."""

    name: str
    version: str
    manufacturer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """A label volume with its segments, in ascending number, and the algorithm that made it."""

    volume: Volume
    segments: tuple[Segment, ...]
    algorithm: Algorithm

    def mask(self, segment: Segment) -> NDArray[np.bool_]:
        """Give one segment as booleans `[slice, row, column]`."""
        mask: NDArray[np.bool_] = (self.volume.array & (1 << (segment.number - 1))) != 0
        return mask

    def written(self) -> list[Segment]:
        """List the segments that have a voxel: the ones that results describe, numbered 1 to n in this order."""
        return [one for one in self.segments if bool((self.volume.array & (1 << (one.number - 1))).any())]


def save_labels(labels: Labels, folder: Path) -> None:
    """Write labels as a volume and `segments.json`."""
    save_volume(labels.volume, folder)
    described = {"segments": [asdict(one) for one in labels.segments], "algorithm": asdict(labels.algorithm)}
    (folder / _FILE).write_text(json.dumps(described))


def load_labels(folder: Path) -> Labels:
    """Read what `save_labels` wrote."""
    raw = json.loads((folder / _FILE).read_text())
    return Labels(
        volume=load_volume(folder),
        segments=tuple(_segment(one) for one in raw["segments"]),
        algorithm=Algorithm(**raw["algorithm"]),
    )


def _segment(raw: dict[str, Any]) -> Segment:
    return Segment(
        number=raw["number"],
        name=raw["name"],
        category=CodedConcept(**raw["category"]),
        kind=CodedConcept(**raw["kind"]),
        roi_type=raw["roi_type"],
        colour=(raw["colour"][0], raw["colour"][1], raw["colour"][2]),
    )
