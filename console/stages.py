"""The processes of a running Clarion, in the order in which they drain."""

from __future__ import annotations

STAGES = ("intake", "grouping", "streams", "orchestrator", "delivery", "console")
