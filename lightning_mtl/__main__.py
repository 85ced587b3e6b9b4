"""``python -m lightning_mtl`` is ``lightning-mtl``."""

from __future__ import annotations

import sys

from lightning_mtl.cli import main

if __name__ == "__main__":
    sys.exit(main())
