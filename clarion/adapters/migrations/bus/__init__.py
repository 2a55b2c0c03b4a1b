"""The outbox's tables, oldest version first."""
