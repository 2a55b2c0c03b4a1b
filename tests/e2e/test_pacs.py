"""Real PACS as destinations, and real series: Orthanc proves by storage commitment, storescp can prove nothing."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.data import real
from support.dcmtk import ENVIRONMENT, need, run, storescu, tool
from support.processes import ORTHANC, start_orthanc, wait_for_port
from support.system import System, describe, running
from support.world import free_port, make_series

from clarion.model import derive_uid


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[System, int, Path]]:
    """A Clarion with two destinations: Orthanc and DCMTK's storescp."""
    need(ORTHANC, "orthanc")
    root = tmp_path_factory.mktemp("pacs")
    scp, dicom, http, plain = (free_port() for _ in range(4))
    received = root / "storescp"
    received.mkdir()
    orthanc = start_orthanc(root / "orthanc", dicom=dicom, http=http, caller=("CLARION", scp))
    storescp = subprocess.Popen(
        [tool("storescp"), "--fork", "-od", str(received), "-aet", "PLAIN", "+xa", str(plain)], env=ENVIRONMENT
    )
    wait_for_port(plain, storescp)
    try:
        destinations = [
            {"name": "orthanc", "ae_title": "ORTHANC", "host": "127.0.0.1", "port": dicom},
            {"name": "plain", "ae_title": "PLAIN", "host": "127.0.0.1", "port": plain},
        ]
        titles = [{"ae_title": "CHEST", "settings": {"pipeline-chest": "chest-ct"}}]
        with running(
            describe(root / "clarion", destinations=destinations, ae_titles=titles, scp={"port": scp})
        ) as system:
            yield system, http, received
    finally:
        orthanc.kill()
        storescp.kill()


def test_orthanc_verifies_and_storescp_stays_sent(both: tuple[System, int, Path], tmp_path: Path) -> None:
    system, http, received = both
    sent = storescu(make_series(tmp_path / "series"), system.scp)
    assert len(sent) == 4
    system.wait_for(lambda: bool(system.studies()), "the study")
    study = system.studies()[0]
    system.wait_for(
        lambda: {one.state for one in system.view(study).deliveries} == {"verified", "unverified"}, "both delivered"
    )
    how = {one.destination: (one.state, one.reason) for one in system.view(study).deliveries}
    assert how["orthanc"] == ("verified", "storage-commitment")
    assert how["plain"][0] == "unverified"
    stored = httpx.get(f"http://127.0.0.1:{http}/instances").json()
    tags = [httpx.get(f"http://127.0.0.1:{http}/instances/{one}/simplified-tags").json() for one in stored]
    assert sorted(one["Modality"] for one in tags) == ["OT", "RTSTRUCT", "SEG", "SR"]
    assert {one["StudyInstanceUID"] for one in tags} == {study}
    assert len([path for path in received.iterdir() if path.is_file()]) == 4


def test_a_real_chest_ct_by_dcmtk_into_orthanc(both: tuple[System, int, Path]) -> None:
    """275 JPEG-LS slices as they are, sent by dcmsend; the results lie in Orthanc and in storescp's folder."""
    system, http, received = both
    before, files = set(system.studies()), len(list(received.iterdir()))
    folder = real("ct-chest-lidc-0314")
    here = ("127.0.0.1", str(system.scp), str(folder))
    done = run("dcmsend", "-aet", "SENDER", "-aec", "CHEST", "+sd", "+r", "-dn", *here, timeout=120)
    assert done.returncode == 0, done.stderr
    system.wait_for(lambda: len(set(system.studies()) - before) == 1, "the study")
    study = (set(system.studies()) - before).pop()
    system.wait_for(
        lambda: {one.state for one in system.view(study).deliveries} == {"verified", "unverified"}, "delivered", 240
    )
    view = system.view(study)
    assert (view.counts.received, view.counts.grouped, view.counts.quarantined) == (275, 275, 0)
    found = httpx.post(
        f"http://127.0.0.1:{http}/tools/find",
        json={"Level": "Instance", "Query": {"StudyInstanceUID": study}, "Expand": True},
    ).json()
    kept = {one["MainDicomTags"]["SOPInstanceUID"] for one in found}
    assert kept == {str(one.sop_instance_uid) for instances in view.results.values() for one in instances}
    assert len(list(received.iterdir())) == files + 4


def test_restart_in_the_middle_finishes_the_work(both: tuple[System, int, Path], tmp_path: Path) -> None:
    """The engine is ended while a job runs; the second attempt writes the same UIDs."""
    import os
    import signal

    from clarion.testing.phantom import PhantomSpec

    system, _, _ = both
    series = make_series(tmp_path / "series", PhantomSpec(slices=5, size=64, length_mm=160, seed=77))
    before = set(system.studies())
    assert len(storescu(series, system.scp)) == 5
    system.wait_for(lambda: len(set(system.studies()) - before) == 1, "the study")
    study = (set(system.studies()) - before).pop()
    system.wait_for(lambda: any(one.state == "running" for one in system.view(study).jobs), "the job runs")
    os.kill(system.supervisor.pid_of("orchestrator"), signal.SIGKILL)
    system.wait_for(
        lambda: {one.state for one in system.view(study).deliveries} == {"verified", "unverified"}, "delivered", 180
    )
    view = system.view(study)
    assert (view.jobs[0].state, view.jobs[0].attempt) == ("succeeded", 2)
    # The attempt has no part in what a result is called.
    made = {str(one.sop_instance_uid) for one in view.results[view.jobs[0].job_id]}
    assert made == {derive_uid(view.jobs[0].job_id, kind, "instance") for kind in ("seg", "rtstruct", "sr", "overview")}


def test_late_instance_makes_a_new_revision(both: tuple[System, int, Path], tmp_path: Path) -> None:
    """Rule 7 of the specification: a second job on the whole revision, the first superseded."""
    from clarion.testing.phantom import PhantomSpec

    system, _, _ = both
    series = make_series(tmp_path / "series", PhantomSpec(slices=5, size=64, length_mm=160, seed=78))
    before = set(system.studies())
    storescu(series[:4], system.scp)
    system.wait_for(lambda: len(set(system.studies()) - before) == 1, "the study")
    study = (set(system.studies()) - before).pop()
    system.wait_for(lambda: any(one.state == "succeeded" for one in system.view(study).jobs), "the first job")
    storescu(series[4:], system.scp)
    system.wait_for(
        lambda: sorted(one.state for one in system.view(study).jobs) == ["succeeded", "superseded"], "the second job"
    )
    revisions = {one.state: one.revision for one in system.view(study).jobs}
    assert revisions == {"superseded": 1, "succeeded": 2}


@pytest.mark.parametrize(
    ("folder", "state", "reason"),
    [
        ("ct-phantom-catphan-cbct", "Failed", "no lungs found"),
        ("mr-phantom-acr-ge", "Failed", "wrong-modality"),
        ("mr-prostate-adc", "Failed", "wrong-modality"),
    ],
)
def test_real_series_that_the_pipeline_refuses(
    both: tuple[System, int, Path], folder: str, state: str, reason: str, tmp_path: Path
) -> None:
    """Received whole with dcmsend, then refused by the pipeline with a reason that a person can read."""
    system, _, _ = both
    copy = tmp_path / folder
    shutil.copytree(real(folder), copy)
    before = set(system.studies())
    here = ("127.0.0.1", str(system.scp), str(copy))
    done = run("dcmsend", "-aet", "SENDER", "-aec", "CHEST", "+sd", "+r", "-dn", *here, timeout=120)
    assert done.returncode == 0, done.stderr
    system.wait_for(lambda: len(set(system.studies()) - before) == 1, "the study")
    view = system.wait_for_state((set(system.studies()) - before).pop(), state)
    assert reason in view.jobs[0].reason
    assert view.counts.received == len([path for path in copy.rglob("*") if path.is_file()])
