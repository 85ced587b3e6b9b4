"""The command ``lightning-mtl fit | validate | test | predict | diagnose | compare | report``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning_mtl.parsing import CLI_EXTRA, MultiTaskCLI, use_current_directory


def main(args: Sequence[str] | None = None) -> int | None:
    """Run a command.

    Args:
        args: command line without the program's name; ``None`` for that of the process.

    Returns:
        The exit status of ``diagnose``, ``compare`` and ``report``; ``None`` for Lightning's
        commands.
    """
    args = list(sys.argv[1:] if args is None else args)
    use_current_directory()
    if not CLI_EXTRA:
        print(
            f"lightning-mtl needs jsonargparse, which was not found ({CLI_EXTRA}). Install it "
            f"with: "
            f'pip install "lightning-mtl[cli]"',
            file=sys.stderr,
        )
        return 2
    if args[:1] == ["diagnose"]:
        from lightning_mtl.diagnose.command import main as diagnose

        return diagnose(args[1:])
    if args[:1] == ["compare"]:
        from lightning_mtl.compare.command import main as compare

        return compare(args[1:])
    if args[:1] == ["report"]:
        from lightning_mtl.compare.again import main as report

        return report(args[1:])
    MultiTaskCLI(args)
    return None
