"""What a step costs with this version beside another one of the same package.

Two processes, one a version, hold their fits ready and take turns, so that what slows the machine
slows both. The time is that of the processor, and the figure is the ratio of the fastest rounds,
with the median of the ratios within rounds beside it.

    git worktree add --detach OTHER v0.1.0
    python benchmarks/versions.py OTHER [--rounds 40] [--models "ResNet-18, T=3"]

``OTHER`` is the folder of the other version.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODELS = ["tiny MLP, T=2", "MLP 0.9M, T=3"]
NONE = "MultiTaskModule, no balancer"
WAYS = ("plain Lightning", NONE, "MinNorm", "DualBalance")
SECONDS = 0.1  # of a way in a round


class Version:
    """A process with one version: it answers each line with the seconds of some steps."""

    def __init__(self, folder: Path) -> None:
        paths = os.pathsep.join([str(folder), str(folder / "benchmarks")])
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )

    def time(self, model: str, way: str, steps: int) -> float:
        """Seconds of one step."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(model, way, steps, sep="|", file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line.startswith("="):
            raise RuntimeError(f"Expected a time from {self.process.args} but got {line!r}.")
        return float(line[1:])


def serve() -> None:
    """Answer the lines of standard input; fits are made when they are first asked for."""
    here = str(Path(__file__).parent.absolute())
    sys.path[:] = [place for place in sys.path if str(Path(place).absolute()) != here]
    sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)  # ways of that version
    from networks import MODELS as KNOWN
    from ways import FITS, balanced

    ready: dict[tuple[str, str], Any] = {}
    for line in sys.stdin:
        model, way, steps = line.strip().split("|")
        if (model, way) not in ready:
            clocked = dataclasses.replace(KNOWN[model], clock=time.process_time)
            ready[model, way] = (FITS.get(way) or balanced(way))(clocked)
        print(f"={ready[model, way](int(steps))!r}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, nargs="?", help="folder of the other version")
    parser.add_argument("--models", nargs="+", default=MODELS, help="names in networks.py")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve()
    if args.other is None or not (args.other / "lightning_mtl").is_dir():
        parser.error(f"Expected a folder that holds lightning_mtl/ but got {args.other}.")
    here, other = Version(Path(__file__).parent.parent), Version(args.other.absolute())
    print(f"{'':44}  fastest  median of {args.rounds} rounds")
    for model in args.models:
        for way in WAYS:
            steps = max(3, int(SECONDS / here.time(model, way, 3)))
            other.time(model, way, 3)
            rounds = []
            for turn in range(args.rounds):
                order = (here, other) if turn % 2 else (other, here)
                found = {version: version.time(model, way, steps) for version in order}
                rounds.append((found[here], found[other]))
            fastest = min(h for h, _ in rounds) / min(o for _, o in rounds)
            print(f"{model + ': ' + way:44}  {fastest:7.3f}", end="")
            print(f"  {statistics.median(h / o for h, o in rounds):7.3f}", flush=True)
    return None


if __name__ == "__main__":
    main()
