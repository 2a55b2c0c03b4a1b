"""Run the test suite: the quick parts beside the crash campaign and what needs Kafka, each with its own report.

The machine has few cores and the crash tests mostly wait for processes, so two pytest runs share it.
"""

from __future__ import annotations

import compileall
import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from clarion.loading import PACKAGES

ROOT = Path(__file__).parents[2]
KAFKA = ["tests/contract/test_kafka_bus.py", "tests/e2e/test_kafka.py"]
# Faults that run in the main half, so that both take about as long.
ELSEWHERE = {"test_kill.py", "test_power_cut.py"}
PYTEST = [str(Path(sys.executable).parent / "pytest"), "-q", "--durations=20", "--durations-min=5"]
# Either half takes less; each test has a deadline of its own, but what stands still between or behind them has none.
_LONGEST_S = 50 * 60


def main() -> int:
    if len(sys.argv) > 1:
        return subprocess.call([*PYTEST, *sys.argv[1:]], cwd=ROOT)
    # Hundreds of processes are started, some of them where Python may not write what it has compiled.
    for folder in (*PACKAGES, "tests"):
        compileall.compile_dir(ROOT / folder, quiet=2)
    with tempfile.TemporaryFile("w+") as log:
        here = sorted(one.name for one in (ROOT / "tests" / "faults").glob("test_*.py"))
        apart = [*(f"tests/faults/{one}" for one in here if one not in ELSEWHERE), *KAFKA]
        faults = subprocess.Popen([*PYTEST, *apart], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        passed_over = [f"--ignore={one}" for one in ("tests/architecture", *apart)]
        others = subprocess.Popen([*PYTEST, "tests", *passed_over], cwd=ROOT)
        until = time.monotonic() + _LONGEST_S
        rest, failed = _wait(others, "the main half", until), _wait(faults, "the half with the faults", until)
        log.seek(0)
        print(log.read())
    return rest or failed


def _wait(process: subprocess.Popen[bytes], name: str, until: float) -> int:
    """Wait for a half; of one that stands still every thread's place is printed, and it has failed."""
    try:
        return process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        print(f"run_tests: {name} did not end within {_LONGEST_S // 60} minutes", flush=True)
        process.send_signal(signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        return 1


if __name__ == "__main__":
    sys.exit(main())
