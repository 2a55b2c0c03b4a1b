"""Bad surroundings: disk below the reserve, port taken, a second instance, a destination down, MR for CT."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.dcmtk import run, storescu
from support.processes import start_pacs
from support.system import System, describe, running
from support.world import free_port, make_series

from clarion.adapters.clock import SystemClock
from clarion.adapters.embedded import EmbeddedBus
from clarion.errors import ConfigError, ResourceBusyError
from clarion.events import GroupClosed
from clarion.model import Trigger
from clarion.service import read_heartbeats
from clarion.testing.phantom import PhantomSpec
from console.checks import check_config
from console.stages import STAGES, read_stages
from console.supervisor import Supervisor

CLARION = str(Path(sys.executable).parent / "clarion")


def clarion(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([CLARION, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[System, str]]:
    """A running Clarion that was given MR for CT, and the study."""
    root = tmp_path_factory.mktemp("refused")
    with running(describe(root)) as system:
        storescu(make_series(root / "series", modality="MR"), system.scp)
        system.wait_for(lambda: bool(system.studies()), "the study")
        study = system.studies()[0]
        system.wait_for_state(study, "Failed")
        yield system, study


def test_disk_below_reserve_is_a_transient_refusal(tmp_path: Path) -> None:
    config = describe(tmp_path, intake={"reserve_gb": 1e6})
    with running(config) as system:
        done = run(
            "storescu",
            "-v",
            "-aet",
            "SENDER",
            "-aec",
            "CHEST",
            "127.0.0.1",
            str(system.scp),
            str(make_series(tmp_path / "s")[0]),
        )
        assert "Rejected Transient" in done.stdout + done.stderr
        # Verification is not refused: the peer is there, only full.
        assert run("echoscu", "-aet", "SENDER", "-aec", "CHEST", "127.0.0.1", str(system.scp)).returncode == 0
        assert clarion("status", "--json", cwd=tmp_path).stdout.count('"space": "low"') == 1


def test_port_taken_says_which(tmp_path: Path) -> None:
    config = describe(tmp_path)
    checked = check_config(config)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", checked.config.gateway.scp.port))
        taken.listen()
        done = clarion("serve", "intake", "-c", str(config), cwd=tmp_path)
    assert done.returncode == 3
    assert str(checked.config.gateway.scp.port) in done.stderr
    assert "port taken" in done.stderr


def test_a_taken_page_port_stops_up_with_a_reason(tmp_path: Path) -> None:
    """`clarion up` starts nothing by halves: it says which port, and leaves no process behind."""
    config = describe(tmp_path)
    port = check_config(config).config.console.port
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        done = clarion("up", "-c", str(config), cwd=tmp_path)
    assert done.returncode == 3
    assert f"127.0.0.1:{port}" in done.stderr
    assert "console could not start" in done.stderr
    beats = read_heartbeats(tmp_path / "data" / "run")
    assert not any(one.alive for one in beats)


def test_receiving_goes_on_while_the_database_is_locked(tmp_path: Path) -> None:
    """Intake depends on the local disk alone; what was acknowledged meanwhile drains in order.

    Bites: let intake look anything up in the database, and the sender waits for whoever holds it.
    """
    config = describe(tmp_path)
    with running(config) as system:
        series = make_series(tmp_path / "series")
        holder = sqlite3.connect(tmp_path / "data" / "clarion.db", isolation_level=None)
        holder.execute("BEGIN EXCLUSIVE")
        sent = storescu(series, system.scp)
        assert len(sent) == len(series)
        # Twenty seconds is what the database is waited for; then grouping says that it is in trouble.
        system.wait_for(
            lambda: any(one["state"] == "troubled" for one in read_stages(system.checked.config)),
            "trouble is said",
        )
        told = clarion("status", "--json", "-c", str(config), cwd=tmp_path)
        assert told.returncode == 3
        holder.execute("ROLLBACK")
        holder.close()
        system.wait_for(lambda: bool(system.studies()), "the study")
        system.wait_for(lambda: system.view(system.studies()[0]).counts.grouped == len(series), "all grouped")


def test_an_unknown_pipeline_of_a_stranger_s_rule_is_seen(refused: tuple[System, str], tmp_path: Path) -> None:
    """The rule names a pipeline that nobody configured: the study is Failed, and says which one is missing."""
    system, other = refused
    storescu(make_series(tmp_path / "series", PhantomSpec(slices=2, size=16, length_mm=40, seed=3)), system.scp)
    system.wait_for(lambda: len(system.studies()) == 2, "the study")
    study = next(one for one in system.studies() if one != other)
    # As a rule of somebody else's would: a group is closed with a trigger that nobody knows.
    event = GroupClosed(
        subject="g", sequence=99, time=datetime.now(UTC), source="t", rule="strange", called_ae="CHEST", revision=1,
        instances=1, manifest=system.store.put(b"{}"), reason="", studies=(study,),
        triggers=(Trigger(pipeline_id="nowhere", name="n"),),
    )  # fmt: skip
    EmbeddedBus(system.database, SystemClock()).publish([event])
    system.wait_for(lambda: bool(system.view(study).dead_letters), "the dead letter")
    view = system.view(study)
    assert view.state == "Failed"
    assert "nowhere" in view.dead_letters[0].reason
    assert "nowhere" in clarion("status", cwd=system.root).stdout
    assert "nowhere" in httpx.get(f"{system.page}/studies/{study}").text
    _redrive_and_discard(system, study, view.dead_letters[0].letter_id)


def _redrive_and_discard(system: System, study: str, letter: str) -> None:
    """Redriven while its cause is there, it fails again; discarded, the study is no longer Failed for it."""
    listed = clarion("deadletters", "list", cwd=system.root)
    assert letter in listed.stdout.replace("\n", "").replace(" ", "") or "nowhere" in listed.stdout
    shown = json.loads(clarion("deadletters", "show", letter, "--json", cwd=system.root).stdout)
    assert (shown["consumer"], shown["body"]) == ("match", "masked")
    dry = clarion("deadletters", "redrive", "--all", "--dry-run", "--json", cwd=system.root)
    assert json.loads(dry.stdout)["letters"] == [letter]
    assert clarion("deadletters", "redrive", letter, cwd=system.root).returncode == 0
    system.wait_for(lambda: system.view(study).dead_letters[0].redrives == 1, "tried again")
    assert clarion("deadletters", "discard", "--all", "--yes", cwd=system.root).returncode == 0
    assert system.view(study).dead_letters == []
    assert clarion("deadletters", "discard", letter, cwd=system.root).returncode == 1
    assert clarion("deadletters", "redrive", cwd=system.root).returncode == 2


def test_every_json_can_be_read(refused: tuple[System, str]) -> None:
    """Each command's --json is JSON of the documented shape, alone on standard output."""
    system, study = refused
    wanted: dict[tuple[str, ...], Callable[[Any], bool]] = {
        ("version", "--json"): lambda said: set(said) == {"version", "python"},
        ("doctor", "--json"): lambda said: {one["name"] for one in said} >= {"disk", "configuration"},
        ("status", "--json"): lambda said: [one["stage"] for one in said["stages"]] == list(STAGES),
        ("study", "list", "--json"): lambda said: study in {one["study_uid"] for one in said},
        ("study", "show", study, "--json"): lambda said: said["jobs"][0]["priority"] == "normal",
        ("delivery", "list", "--json"): lambda said: said == [],
        ("delivery", "retry", "--failed", "--dry-run", "--json"): lambda said: said["taken_up"] == [],
        ("config", "check", "--json"): lambda said: (said["ok"], said["faults"]) == (True, []),
        ("config", "example", "--json"): lambda said: "gateway" in said,
    }
    for command, looks_right in wanted.items():
        done = clarion(*command, cwd=system.root)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        assert looks_right(json.loads(done.stdout)), command
    assert clarion("delivery", "retry", "nobody", cwd=system.root).returncode == 1
    assert clarion("delivery", "retry", cwd=system.root).returncode == 2
    assert clarion("study", "show", "1.2.3", cwd=system.root).returncode == 1


def test_what_is_behind_intake_leaves_the_processors_to_it(refused: tuple[System, str]) -> None:
    """Bites: give each stage a session of its own, and the kernel shares out processors whatever they are worth."""
    pids = {one: refused[0].supervisor.pid_of(one) for one in ("intake", "grouping", "streams", "delivery")}
    worth = {one: os.getpriority(os.PRIO_PROCESS, pid) for one, pid in pids.items()}
    assert worth == {"intake": os.getpriority(os.PRIO_PROCESS, 0), "grouping": 19, "streams": 19, "delivery": 19}
    assert {os.getsid(pid) for pid in pids.values()} == {os.getsid(0)}
    assert [os.getpgid(pid) for pid in pids.values()] == list(pids.values()), "a signal of the terminal is not for them"


def test_second_instance_on_the_same_data_is_refused(tmp_path: Path) -> None:
    config = describe(tmp_path)
    with running(config), pytest.raises(ResourceBusyError, match="another Clarion"):
        Supervisor(check_config(config))


def test_destination_down_keeps_the_results(tmp_path: Path) -> None:
    """The delivery waits, visibly; when the PACS is there it gets everything, once."""
    port = free_port()
    pacs_entry = {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": port}
    delivery = {"retry_delay_s": 1, "retry_delay_max_s": 1, "max_retries": 50, "connect_timeout_s": 2}
    config = describe(tmp_path, destinations=[pacs_entry], delivery=delivery)
    with running(config) as system:
        series = make_series(tmp_path / "series")
        sent = storescu(series, system.scp)
        assert len(sent) == len(series)
        system.wait_for(lambda: bool(system.studies()), "the study")
        study = system.studies()[0]
        system.wait_for(lambda: any(one.attempts >= 2 for one in system.view(study).deliveries), "two failed attempts")
        waiting = system.view(study).deliveries[0]
        assert waiting.state == "waiting"
        assert "no association" in waiting.reason
        pacs = start_pacs(tmp_path / "pacs", port, "PACS", ("CLARION", system.scp))
        try:
            view = system.wait_for_state(study, "Verified")
        finally:
            pacs.kill()
        assert [one.state for one in view.deliveries] == ["verified"]
        assert len(list((tmp_path / "pacs").glob("*.dcm"))) == 4


def test_destination_taken_out_of_the_configuration_keeps_the_results(tmp_path: Path) -> None:
    """The delivery fails by name and keeps its payload; written back, the destination gets everything."""
    port, scp = free_port(), free_port()
    entry = {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": port}
    delivery = {"retry_delay_s": 1, "retry_delay_max_s": 1, "max_retries": 50, "connect_timeout_s": 2}
    with_pacs = {"destinations": [entry], "delivery": delivery, "scp": {"port": scp}}
    with running(describe(tmp_path, **with_pacs)) as system:
        storescu(make_series(tmp_path / "series"), system.scp)
        system.wait_for(lambda: bool(system.studies()), "the study")
        study = system.studies()[0]
        system.wait_for(lambda: bool(system.view(study).deliveries), "a delivery")
    with running(describe(tmp_path, scp={"port": scp})) as system:
        view = system.wait_for_state(study, "Failed")
        assert [(one.state, one.reason) for one in view.deliveries] == [("failed", "unknown-destination")]
        assert any("unknown-destination" in line.text for line in view.story)
    pacs = start_pacs(tmp_path / "pacs", port, "PACS", ("CLARION", scp))
    try:
        with running(describe(tmp_path, **with_pacs)) as system:
            system.wait_for_state(study, "Verified")
    finally:
        pacs.kill()
    assert len(list((tmp_path / "pacs").glob("*.dcm"))) == 4


def test_mr_is_refused_by_the_pipeline_with_a_reason(refused: tuple[System, str]) -> None:
    system, study = refused
    view = system.view(study)
    assert view.jobs[0].cause == "UnreadableSeriesError"
    assert "wrong-modality" in view.jobs[0].reason
    assert any("wrong-modality" in line.text for line in view.story)
    text = clarion("study", "show", study, cwd=system.root)
    assert text.returncode == 0
    assert "wrong-modality" in text.stdout


BROKEN = [
    ("gateway: {scp: {prt: 1}}", "did you mean 'port'"),
    ("gateway: {scp: {port: 70000}}", "gateway.scp.port"),
    ("gateway: {ae_titles: [{ae_title: A, rule: by-tagg}]}", "no rule named 'by-tagg'"),
    ("gateway: {ae_titles: [{ae_title: A, settings: {groupby: x, pipeline-x: y}}]}", "did you mean 'groupBy'"),
    ("data:", "must be the path of a folder"),
    ("data: /etc/passwd/x", "is a file"),
    ("gateway: {ae_titles: [{ae_title: A, settings: {pipeline-x: nope}}]}", "no pipeline 'nope'"),
    ("gateway: {ae_titles: [{ae_title: A, settings: {}}]}", "pipeline-NAME"),
    ("gateway: {ae_titles: [{ae_title: 'A\\\\B', settings: {}}]}", "backslash"),
    ("gateway: {ae_titles: [{ae_title: ABCDEFGHIJKLMNOPQ}]}", "1 to 16 characters"),
    ("pipelines: [{id: a, file: 'builtin:nope'}]", "no bundled pipeline 'nope'"),
    ("pipelines: [{id: a, file: nowhere.yaml}]", "cannot be read"),
    ("pipelines: [{id: a, file: 'builtin:chest-ct', destinations: [x]}]", "no destination 'x'"),
    ("console: {host: 0.0.0.0}", "console.token"),
    ("gateway: {scp: {host: 0.0.0.0, reject_unknown_sources: false}}", "gateway.scp.allow_anybody"),
    ("database: {url: 'mysql://x'}", "postgresql://USER:PASSWORD@HOST:PORT/NAME"),
    ("data: [1", "is not YAML"),
    ("data: a\ndata: b", "written twice"),
    ("gateway: {sources: [{ae_title: A, host: 10.0.0.0/99}]}", "host"),
    ("a: &x 1\nb: *x", "aliases"),
    ("- 1", "must be a mapping"),
    ("data: !!python/object:os.system x", "data"),
]


@pytest.mark.parametrize(("text", "said"), BROKEN)
def test_broken_configuration_names_file_line_and_key(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "clarion.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        check_config(path)
    assert said in str(caught.value)
    assert all(fault.startswith(f"{path}:") for fault in caught.value.faults)


def test_all_faults_at_once_and_exit_status(tmp_path: Path) -> None:
    (tmp_path / "clarion.yaml").write_text("gateway:\n  scp: {port: 0}\n  scu: {ae_titel: X}\nbus: {kind: pigeon}\n")
    done = clarion("config", "check", cwd=tmp_path)
    assert done.returncode == 2
    for line in (
        "clarion.yaml:2: gateway.scp.port",
        "clarion.yaml:3: gateway.scu.ae_titel",
        "clarion.yaml:4: bus.kind",
    ):
        assert line in done.stderr


def test_example_is_good(tmp_path: Path) -> None:
    (tmp_path / "clarion.yaml").write_text(clarion("config", "example", cwd=tmp_path).stdout)
    assert clarion("config", "check", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    "command",
    [
        "up",
        "serve",
        "demo",
        "status",
        "doctor",
        "version",
        "study list",
        "study show",
        "delivery list",
        "delivery retry",
        "deadletters list",
        "deadletters show",
        "deadletters redrive",
        "deadletters discard",
        "topics apply",
        "topics check",
        "config check",
        "config example",
    ],
)
def test_every_command_has_help(command: str, tmp_path: Path) -> None:
    done = clarion(*command.split(), "--help", cwd=tmp_path)
    assert done.returncode == 0
    if command not in {"up", "serve"}:
        assert "--json" in done.stdout


def test_doctor_finds_a_taken_port_and_an_absent_peer(tmp_path: Path) -> None:
    config = describe(
        tmp_path, destinations=[{"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": free_port()}]
    )
    port = check_config(config).config.gateway.scp.port
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        done = clarion("doctor", cwd=tmp_path)
    assert done.returncode == 1
    assert "FAIL gateway.scp.port" in done.stdout
    assert "FAIL destination pacs" in done.stdout


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = """
import sys
sys.argv = ["clarion", "--help"]
try:
    import console.main
    console.main.main()
except SystemExit:
    pass
heavy = {"pydicom", "pynetdicom", "highdicom", "fastapi", "sqlalchemy", "numpy", "pydantic"} & set(sys.modules)
sys.exit(str(heavy) if heavy else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
