"""Write the JSON Schema of every event type to docs/schemas."""

from __future__ import annotations

import json
from pathlib import Path

from clarion.codec import json_schema
from clarion.events import ALL

if __name__ == "__main__":
    folder = Path(__file__).parents[2] / "docs" / "schemas"
    for kind in ALL:
        (folder / f"{kind.kind}.json").write_text(json.dumps(json_schema(kind), indent=2) + "\n")
