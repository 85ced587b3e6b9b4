"""``lightning-mtl compare``: balancers over seeds against single-task baselines."""

from __future__ import annotations


class CompareError(Exception):
    """The request cannot be carried out; nothing was trained, and the message has the cure."""
