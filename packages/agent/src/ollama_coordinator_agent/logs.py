"""Where the log goes: above the live status in a terminal, else to standard error."""

import logging

from rich.console import Console
from rich.logging import RichHandler

from ollama_coordinator_common.commandline import PLAIN, log_to


def set_up(level: str, console: Console | None) -> None:
    """Log to the terminal that shows the live status, else as plain lines."""
    if console is None:
        log_to(logging.StreamHandler(), level, PLAIN)
    else:
        log_to(RichHandler(console=console, show_path=False, markup=False), level, "%(message)s")
