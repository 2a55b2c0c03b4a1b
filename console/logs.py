"""Logging of a process: structlog to standard error; library loggers, which may quote data sets, are silenced."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from typing import TYPE_CHECKING

import structlog

from clarion.errors import describe

if TYPE_CHECKING:
    from structlog.typing import EventDict, WrappedLogger

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
            _describe_exception,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[config.level]),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=stage)
    threading.excepthook = _thread_died


def _thread_died(arguments: threading.ExceptHookArgs) -> None:
    """Say that a thread ended by an exception, without its text."""
    structlog.get_logger().error(
        "thread.died", thread=arguments.thread and arguments.thread.name, exc_info=arguments.exc_value
    )


def _describe_exception(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Put type and place of an exception in the stead of its text and trace."""
    given = event.pop("exc_info", None)
    error = sys.exc_info()[1] if given is True else given
    if isinstance(error, BaseException):
        event["exception"] = describe(error)
    return event
