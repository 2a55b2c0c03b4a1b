"""Logging of a process: structlog to standard error; library loggers, which may quote data sets, are silenced."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from clarion.config import LogConfig

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
# These write values of elements, and so patient data, into their messages.
_SILENCED = ("pydicom", "pynetdicom", "highdicom")


def configure(config: LogConfig, stage: str) -> None:
    """Set the process's logging up."""
    for name in _SILENCED:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module="pydicom|pynetdicom|highdicom")
    renderer = (
        structlog.processors.JSONRenderer()
        if config.format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[config.level]),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=stage)
