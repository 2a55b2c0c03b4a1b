"""Operator: labels on a volume -> volume in ml and mean HU per structure."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from clarion.labels import load_labels
from clarion.volume import load_volume

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from clarion.labels import Labels
    from clarion.plugins import Workspace
    from clarion.volume import Volume


class StructureMeasurements:
    """Measures every segment."""

    def run(self, inputs: Mapping[str, Path], workspace: Workspace) -> None:
        """Write `measurements.json`: what `measure` gives."""
        measured = measure(load_volume(inputs["volume"]), load_labels(inputs["labels"]))
        (workspace.outputs["measurements"] / "measurements.json").write_text(json.dumps(measured))


def measure(volume: Volume, labels: Labels) -> list[dict[str, Any]]:
    """Give per segment its number, voxels, volume_ml, mean in the volume's unit; mean is None without voxels."""
    per_voxel = volume.geometry.voxel_volumes_ml
    measured = []
    for segment in labels.segments:
        mask = labels.mask(segment)
        voxels = np.count_nonzero(mask, axis=(1, 2))
        total = int(voxels.sum())
        measured.append(
            {
                "segment": segment.number,
                "voxels": total,
                "volume_ml": float((voxels * per_voxel).sum()),
                "mean": float(volume.array[mask].mean(dtype=np.float64)) if total else None,
                "unit": volume.unit,
            }
        )
    return measured
