"""The orchestrator: a requested job becomes a finished one."""
