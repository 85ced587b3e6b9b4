"""The one file of results of a run on a GPU, which is whole on disk after each of them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import lightning
import torch
import torchmetrics

Json = dict[str, Any]


class Results:
    """A JSON file that processes write in turn: read, changed and replaced each time.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    def read(self) -> Json:
        found: Json = json.loads(self.path.read_text(encoding="utf-8"))
        return found

    def begin(self, machine: Json, minutes: float) -> None:
        """Start a new file."""
        now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write(
            {"machine": machine, "begun": now, "minutes": minutes, "ended": None, "parts": {}}
        )

    def part(self, name: str, **values: Any) -> None:
        """How it stands with a part; what is empty is not written."""
        self.add("parts", name, {key: value for key, value in values.items() if value})

    def add(self, *keys_and_value: Any) -> None:
        """Merge a value into the place that the keys before it name."""
        *keys, value = keys_and_value
        found = self.read()
        place = found
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        if isinstance(value, dict) and isinstance(place.get(keys[-1]), dict):
            place[keys[-1]].update(value)
        else:
            place[keys[-1]] = value
        self._write(found)

    def end(self, seconds: float) -> Json:
        """Say that nothing more will come; returns everything."""
        self.add("ended", f"after {seconds:.0f} s")
        return self.read()

    def _write(self, found: Json) -> None:
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        part.replace(self.path)


def describe(device: str) -> Json:
    """The machine and the versions, as far as figures depend on them."""
    found: Json = {
        "device": device,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "torchmetrics": torchmetrics.__version__,
        "revision": _revision(),
    }
    if device == "cuda":
        of = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": of.name,
            "capability": f"{of.major}.{of.minor}",
            "memory GB": round(of.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": _nccl(),
            "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return found


def _nccl() -> str | None:
    if not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def _revision() -> str | None:
    return _said("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD")


def _said(*command: str) -> str | None:
    """The first line of what a program prints; ``None`` where there is no such program."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.strip().splitlines() or [None])[0]
