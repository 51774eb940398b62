"""What an engine answers that can't do what a switch asks of it. Pure."""

from __future__ import annotations


class SwitchRefused(RuntimeError):
    """This engine can't do its part; nothing was changed here."""
