"""Run the test suite: the quick parts beside the crash campaign and what needs Kafka, each with its own report.

The machine has few cores and the crash tests mostly wait for processes, so two pytest runs share it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
KAFKA = ["tests/contract/test_kafka_bus.py", "tests/e2e/test_kafka.py"]
PYTEST = [str(Path(sys.executable).parent / "pytest"), "-q"]


def main() -> int:
    if len(sys.argv) > 1:
        return subprocess.call([*PYTEST, *sys.argv[1:]], cwd=ROOT)
    with tempfile.TemporaryFile("w+") as log:
        faults = subprocess.Popen([*PYTEST, "tests/faults", *KAFKA], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        passed_over = [f"--ignore={one}" for one in ("tests/faults", "tests/architecture", *KAFKA)]
        rest = subprocess.call([*PYTEST, "tests", *passed_over], cwd=ROOT)
        failed = faults.wait()
        log.seek(0)
        print(log.read())
    return rest or failed


if __name__ == "__main__":
    sys.exit(main())
