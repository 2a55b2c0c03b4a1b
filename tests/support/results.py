"""A small result set made by the real writers from a phantom and a hand-drawn segmentation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from pydicom import Dataset, dcmread
from support.world import make_series

from clarion.dicom import read_headers
from clarion.labels import Algorithm, Labels
from clarion.testing.phantom import PhantomSpec
from clarion.volume import Volume
from operators.chest_ct import SEGMENTS
from operators.dicom_reader import read_series
from operators.measurements import measure
from writers.gate import Finding, check_results
from writers.identity import JobIdentity, SourceSeries, save
from writers.overview import draw, write_overview
from writers.rtstruct import write_structure_set
from writers.seg import write_segmentation
from writers.sr import write_measurement_report


@dataclass
class Made:
    source: list[Dataset]
    labels: Labels
    objects: dict[str, Dataset]
    folder: Path
    job: JobIdentity

    def findings(self, **changed: Dataset) -> list[str]:
        """Write the set with some objects replaced and give the rules that it breaks."""
        results = []
        for name, ds in (self.objects | changed).items():
            syntax = str(ds.file_meta.TransferSyntaxUID)
            results.append((name, save(ds, self.folder, name, syntax)))
        return [f"{one.rule} {one.output}" for one in self.check(results)]

    def check(self, results: list[tuple[str, Path]]) -> list[Finding]:
        return check_results(results, self.source, self.labels, self.job)


def make_results(root: Path, names: dict[str, str] | None = None) -> Made:
    """Write the four results into a folder; `names` renames segments, then the source is in UTF-8."""
    for path in make_series(root / "series", PhantomSpec(slices=6, size=48, length_mm=120, seed=9)):
        if names:
            ds = dcmread(path)
            ds.SpecificCharacterSet = "ISO_IR 192"
            ds.save_as(path)
    segments = tuple(replace(one, name=(names or {}).get(one.name, one.name)) for one in SEGMENTS)
    slices = read_headers(root / "series")
    source = [ds for _, ds in slices]
    volume = read_series(slices)
    array = np.zeros(volume.array.shape, dtype=np.uint8)
    array[:, 4:44, 4:44] |= 1
    array[1:5, 10:30, 8:20] |= 2
    array[2:4, 15:20, 10:15] &= ~np.uint8(2)
    array[1:5, 10:30, 28:40] |= 4
    labels = Labels(
        volume=Volume(
            array=array, geometry=volume.geometry, unit="segments", series_uid=volume.series_uid, sources=volume.sources
        ),
        segments=segments,
        algorithm=Algorithm(name="Test", version="1", manufacturer="Clarion"),
    )
    job = JobIdentity(
        job_id="j1", requested=datetime(2026, 11, 24, tzinfo=UTC), pipeline="chest-ct", pipeline_version="0" * 12
    )
    by_uid = {str(ds.SOPInstanceUID): ds for ds in source}
    series = SourceSeries(tuple(by_uid[one.sop_instance_uid] for one in volume.sources))
    measured = measure(volume, labels)
    seg = write_segmentation(labels, series, job)
    objects = {
        "seg": seg,
        "rtstruct": write_structure_set(labels, series, job),
        "sr": write_measurement_report(labels, measured, seg=seg, source=series, job=job),
        "overview": write_overview(draw(volume, labels), series, job, labels),
    }
    written = {
        name: dcmread(save(ds, root, name, "1.2.840.10008.1.2" if name == "rtstruct" else "1.2.840.10008.1.2.1"))
        for name, ds in objects.items()
    }
    return Made(source, labels, written, root, job)
