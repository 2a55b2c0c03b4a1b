"""Stream processors: events to events."""
