"""``lightning-mtl diagnose``: what the gradients of a short run say before methods are compared."""

from __future__ import annotations


class DiagnoseError(Exception):
    """The diagnosis cannot be made; no file was written, and the message has the cure."""
