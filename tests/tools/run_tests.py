"""Run the test suite: the quick parts and the crash campaign side by side, each with its own report.

The machine has few cores and the crash tests mostly wait for processes, so two pytest runs share it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTEST = [str(Path(sys.executable).parent / "pytest"), "-q"]


def main() -> int:
    if len(sys.argv) > 1:
        return subprocess.call([*PYTEST, *sys.argv[1:]], cwd=ROOT)
    with tempfile.TemporaryFile("w+") as log:
        faults = subprocess.Popen([*PYTEST, "tests/faults"], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        rest = subprocess.call([*PYTEST, "tests", "--ignore=tests/faults", "--ignore=tests/architecture"], cwd=ROOT)
        failed = faults.wait()
        log.seek(0)
        print(log.read())
    return rest or failed


if __name__ == "__main__":
    sys.exit(main())
