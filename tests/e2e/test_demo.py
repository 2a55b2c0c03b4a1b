"""The main job as a user runs it: the demo's phantom and a real chest CT, in and back, seen in a browser."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from pydicom import Dataset, dcmread
from support.data import real
from support.dcmtk import need, tool
from support.world import pause

CLARION = str(Path(sys.executable).parent / "clarion")
DCIODVFY = str(Path(sys.executable).parent / "dciodvfy")
ARTIFACTS = Path(os.environ.get("CLARION_TEST_ARTIFACTS", Path.home() / ".cache" / "clarion" / "test-artifacts"))
CHROMIUM = Path("/usr/bin/chromium")


@dataclass
class Run:
    folder: Path
    summary: dict[str, Any]
    page: str

    def results(self) -> dict[str, Dataset]:
        found = {one["sop_instance_uid"]: one["modality"] for one in self.summary["results"]}
        files = [dcmread(path) for path in (self.folder / "pacs").glob("*.dcm")]
        return {found[str(ds.SOPInstanceUID)]: ds for ds in files}

    def files(self) -> list[Path]:
        return sorted((self.folder / "pacs").glob("*.dcm"))


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """`clarion demo` without --once: the page stays up until Ctrl-C."""
    folder = tmp_path_factory.mktemp("demo") / "kept"
    process = subprocess.Popen(
        [CLARION, "demo", "--keep", str(folder)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    said: list[str] = []
    for line in process.stderr:
        said.append(line)
        if "The page stays up" in line:
            break
    text = "".join(said)
    match = re.search(r"http://127\.0\.0\.1:\d+/", text)
    assert match is not None, text
    yield Run(folder, {}, match.group())
    os.kill(process.pid, signal.SIGINT)
    process.stderr.read()
    assert process.wait(60) in {0, 130}, "Ctrl-C ends the demo"


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_once(tmp_path_factory.mktemp("once") / "kept")


@pytest.fixture(scope="module")
def lidc(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_once(tmp_path_factory.mktemp("lidc") / "kept", "--input", str(real("ct-chest-lidc-0314")))


def run_once(folder: Path, *more: str) -> Run:
    done = subprocess.run(
        [CLARION, "demo", "--once", "--json", "--keep", str(folder), *more],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    log = (folder / "clarion.log").read_text() if (folder / "clarion.log").exists() else ""
    assert done.returncode == 0, done.stdout + done.stderr + log[-3000:]
    return Run(folder, json.loads(done.stdout), "")


def test_phantom_comes_back_verified(once: Run) -> None:
    """Done when 2."""
    summary = once.summary
    states = {one["modality"]: one["state"] for one in summary["results"]}
    assert states == {"SEG": "Verified", "RTSTRUCT": "Verified", "SR": "Verified", "OT": "Verified"}
    assert summary["acknowledged"] >= 120
    assert summary["refused"] == 0
    assert min(summary["dice"]["Left lung"], summary["dice"]["Right lung"]) >= 0.98


def test_real_chest_ct_comes_back_verified(lidc: Run) -> None:
    """Done when 3."""
    assert lidc.summary["acknowledged"] == 275
    assert {one["state"] for one in lidc.summary["results"]} == {"Verified"}
    assert lidc.summary["verified"] is True


@pytest.mark.parametrize("which", ["once", "lidc"])
def test_every_object_is_clean(which: str, request: pytest.FixtureRequest) -> None:
    """dciodvfy finds no error in anything that left."""
    files = request.getfixturevalue(which).files()
    assert len(files) == 4
    for path in files:
        done = subprocess.run(
            [DCIODVFY, "-allpffgitems", str(path)], capture_output=True, text=True, timeout=120, check=False
        )
        errors = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")]
        assert errors == [], path.name


@pytest.mark.parametrize("which", ["once", "lidc"])
def test_geometry_is_that_of_the_source(which: str, request: pytest.FixtureRequest) -> None:
    """Every frame lies where the slice it cites lies; every contour in the plane of the slice it cites."""
    run = request.getfixturevalue(which)
    source_folder = real("ct-chest-lidc-0314") if which == "lidc" else run.folder / "phantom"
    source = {
        str(ds.SOPInstanceUID): ds
        for path in source_folder.glob("*.dcm")
        if (ds := dcmread(path, stop_before_pixels=True))
    }
    results = run.results()
    seg = results["SEG"]
    assert {str(results[one].StudyInstanceUID) for one in results} == {
        str(next(iter(source.values())).StudyInstanceUID)
    }
    for frame in seg.PerFrameFunctionalGroupsSequence:
        cited = source[str(frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID)]
        there = frame.PlanePositionSequence[0].ImagePositionPatient
        assert np.allclose([float(v) for v in there], [float(v) for v in cited.ImagePositionPatient], atol=1e-3)
    for roi in results["RTSTRUCT"].ROIContourSequence:
        for contour in roi.ContourSequence:
            cited = source[str(contour.ContourImageSequence[0].ReferencedSOPInstanceUID)]
            depths = np.array(contour.ContourData, dtype=float)[2::3]
            assert np.abs(depths - float(cited.ImagePositionPatient[2])).max() <= 1e-3


def test_read_back_by_independent_readers(once: Run) -> None:
    """highdicom reads the SEG and the SR; the volumes it finds are the voxels of the SEG."""
    import highdicom as hd

    results = once.results()
    seg = hd.seg.Segmentation.from_dataset(results["SEG"])
    volume = seg.get_volume(combine_segments=False, rescale_fractional=False)
    spacing = np.prod(volume.spacing) / 1000
    counted = {number: float(volume.array[..., number - 1].sum()) * spacing for number in seg.segment_numbers}
    report = hd.sr.Comprehensive3DSR.from_dataset(results["SR"])
    groups = report.content.get_volumetric_roi_measurement_groups()
    assert len(groups) == len(counted) == 4
    for group in groups:
        measured = [float(one.value) for one in group.get_measurements() if one.name.meaning == "Volume"]
        number = int(group.referenced_segment.referenced_segment_numbers[0])
        assert measured == [pytest.approx(counted[number], rel=1e-3)]


@pytest.mark.parametrize("which", ["once", "lidc"])
def test_contours_filled_by_another_reader_are_the_segments(which: str, request: pytest.FixtureRequest) -> None:
    """RTSTRUCT read with pydicom, mapped by the source's own header, filled by Pillow at eight times the size.

    Compared with the SEG as highdicom reads it: not a voxel differs on the slices looked at. Nothing of ours reads.
    """
    import highdicom as hd
    from PIL import Image, ImageDraw

    run = request.getfixturevalue(which)
    folder = real("ct-chest-lidc-0314") if which == "lidc" else run.folder / "phantom"
    source = {
        str(ds.SOPInstanceUID): ds for path in folder.glob("*.dcm") if (ds := dcmread(path, stop_before_pixels=True))
    }
    results = run.results()
    seg = hd.seg.Segmentation.from_dataset(results["SEG"])
    labels = {seg.get_segment_description(number).segment_label: number for number in seg.segment_numbers}
    names = {int(one.ROINumber): str(one.ROIName) for one in results["RTSTRUCT"].StructureSetROISequence}
    assert set(names.values()) == set(labels)
    scale = 8
    for roi in results["RTSTRUCT"].ROIContourSequence:
        name = names[int(roi.ReferencedROINumber)]
        rings: dict[str, list[list[tuple[float, float]]]] = {}
        for contour in roi.ContourSequence:
            uid = str(contour.ContourImageSequence[0].ReferencedSOPInstanceUID)
            header = source[uid]
            cosines = np.array(header.ImageOrientationPatient, dtype=float)
            points = np.array(contour.ContourData, dtype=float).reshape(-1, 3) - np.array(
                header.ImagePositionPatient, dtype=float
            )
            columns = points @ cosines[:3] / float(header.PixelSpacing[1])
            rows = points @ cosines[3:] / float(header.PixelSpacing[0])
            at = [((x + 0.5) * scale - 0.5, (y + 0.5) * scale - 0.5) for x, y in zip(columns, rows, strict=True)]
            rings.setdefault(uid, []).append(at)
        uids = sorted(rings)
        for uid in uids[:: max(1, len(uids) // 6)]:
            canvas = Image.new("1", (int(source[uid].Columns) * scale, int(source[uid].Rows) * scale))
            for ring in rings[uid]:
                ImageDraw.Draw(canvas).polygon(ring, fill=1)
            filled = np.asarray(canvas)[scale // 2 :: scale, scale // 2 :: scale]
            frame = seg.get_pixels_by_source_instance([uid], segment_numbers=[labels[name]])[0, ..., 0]
            differ = int(np.count_nonzero(filled != (frame != 0)))
            assert differ == 0, f"{name} on {uid}: {differ} voxels differ"


def test_a_second_run_gives_the_same_uids(once: Run, phantom: Run) -> None:
    """Same series, same pipeline, same group: the same identifiers, also on another data folder."""
    first = {str(dcmread(path, stop_before_pixels=True).SOPInstanceUID) for path in once.files()}
    second = {str(dcmread(path, stop_before_pixels=True).SOPInstanceUID) for path in phantom.files()}
    assert first == second


def test_dcmtk_reads_every_object(once: Run) -> None:
    for path in once.files():
        assert (
            subprocess.run([tool("dcmdump"), "-q", str(path)], capture_output=True, timeout=60, check=False).returncode
            == 0
        )
    report = next(path for path in once.files() if dcmread(path, stop_before_pixels=True).Modality == "SR")
    done = subprocess.run([tool("dsrdump"), str(report)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert "Left lung" in done.stdout


def test_page_shows_the_study(phantom: Run) -> None:
    """What a person sees, kept as pictures in the user's cache folder (or CLARION_TEST_ARTIFACTS)."""
    chromium = need(CHROMIUM, "chromium")
    listing = httpx.get(phantom.page).text
    uid = re.search(r"/studies/([0-9.]+)", listing)
    assert uid is not None
    assert "Verified" in listing
    from playwright.sync_api import sync_playwright

    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(chromium), args=flags)
        page = browser.new_page(viewport={"width": 1500, "height": 950})
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto(phantom.page)
        page.screenshot(path=ARTIFACTS / "studies.png")
        page.click("tbody a")
        page.wait_for_selector("figure img")
        assert page.evaluate("document.querySelector('figure img').naturalWidth") > 1000
        assert "storage-commitment" in page.inner_text(".story")
        assert page.inner_text("h1").endswith("Verified")
        page.screenshot(path=ARTIFACTS / "study.png", full_page=True)
        # htmx asks again by itself: the fragment is fetched without a click.
        with page.expect_response(lambda answer: answer.url.endswith("/story"), timeout=8000):
            pass
        page.goto(phantom.page + "quarantine")
        page.screenshot(path=ARTIFACTS / "quarantine.png")
        page.click("text=Operations")
        page.wait_for_selector("text=Latest events")
        page.screenshot(path=ARTIFACTS / "operations.png", full_page=True)
        browser.close()
    assert problems == []


def test_page_is_safe_by_default(phantom: Run) -> None:
    answer = httpx.get(phantom.page)
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert answer.headers["x-content-type-options"] == "nosniff"
    # Another name for our address is somebody else's page talking to us.
    assert httpx.get(phantom.page, headers={"Host": "evil.example"}).status_code == 401
    for path in ("studies/..%2f..%2fetc", "studies/9.9.9", "studies/x/pictures/y.png", "static/..%2froutes.py"):
        assert httpx.get(phantom.page + path).status_code == 404
    assert "Phantom^Chest" not in httpx.get(phantom.page).text
    assert httpx.get(phantom.page + "health/ready").text == "Healthy"


def test_status_while_it_runs(phantom: Run) -> None:
    done = subprocess.run(
        [CLARION, "status", "--json", "-c", str(phantom.folder / "clarion.yaml")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    state = json.loads(done.stdout)
    assert done.returncode == 0
    assert state["ok"] is True
    assert (state["dead_letters"], state["quarantined"]) == (0, 0)
    listed = subprocess.run(
        [CLARION, "study", "list", "-c", str(phantom.folder / "clarion.yaml")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert listed.stdout.startswith("Verified")


def test_doctor_on_a_running_system(phantom: Run) -> None:
    end = time.monotonic() + 30
    while True:
        done = subprocess.run(
            [CLARION, "doctor", "-c", str(phantom.folder / "clarion.yaml")],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode == 0 or time.monotonic() > end:
            break
        pause(0.5)
    assert done.returncode == 0, done.stdout
    assert "offers storage commitment, query" in done.stdout
