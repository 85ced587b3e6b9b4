"""The command ``lightning-mtl fit | validate | test | predict | compare | report``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.imports import RequirementCache

import lightning_mtl  # the short names of balancers resolve once they are imported
from lightning_mtl.hints import hint

_CLI_EXTRA = RequirementCache("jsonargparse[signatures]>=4.39,<5")
_DESCRIPTION = (
    "Train, balance and compare multi-task models. The commands below are Lightning's own for "
    "any MultiTaskModule; `lightning-mtl compare --help` shows how to compare balancers over "
    "seeds with single-task baselines."
)

if TYPE_CHECKING or _CLI_EXTRA:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
else:
    LightningCLI = SaveConfigCallback = object


class _SaveConfig(SaveConfigCallback):
    """Saves the config into the logger's folder, where no other run has been.

    Without a logger Lightning's own would write ``config.yaml`` into the current directory and
    stop when there is one, which is what users call theirs.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class MultiTaskCLI(LightningCLI):
    """LightningCLI for any importable MultiTaskModule.

    A checkpoint given as ``--ckpt_path`` is loaded with ``weights_only=True`` unless asked
    otherwise, so that code in it is refused instead of run. Lightning has the choice from 2.6 on;
    before, it runs what a checkpoint holds: give it only those of your own.
    """

    def __init__(self, args: Sequence[str], **kwargs: Any) -> None:
        super().__init__(
            lightning_mtl.MultiTaskModule,
            subclass_mode_model=True,
            args=list(args),
            **{
                "parser_kwargs": {"description": _DESCRIPTION},
                "save_config_callback": _SaveConfig,
                **kwargs,
            },
        )

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Lightning's parser, with the safe way of loading checkpoints as the default."""
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        for parser in (self.parser, *getattr(self, "_subcommand_parsers", {}).values()):
            _explain(parser)
        for name, parser in (self._subcommand_parsers if add_subcommands else {}).items():
            if "weights_only" in self._subcommand_method_arguments[name]:  # Lightning 2.6 and later
                parser.set_defaults({"weights_only": True})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given arguments, whatever the command line of the process is."""
        self.config = parser.parse_args(args)


def _explain(parser: Any) -> None:
    """Let a parser say in one line which class or argument does not exist."""
    original = parser.error

    def error(message: str, *args: Any, **kwargs: Any) -> Any:
        if (found := hint(message)) is not None:
            parser.exit(2, f"error: {found}\n")
        return original(message, *args, **kwargs)

    parser.error = error


def use_current_directory() -> None:
    """Make the current directory importable: ``python -m`` does so, a console script does not."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


def main(args: Sequence[str] | None = None) -> int | None:
    """Run a command.

    Args:
        args: command line without the program's name; ``None`` for that of the process.

    Returns:
        The exit status of ``compare`` and ``report``; ``None`` for Lightning's commands.
    """
    args = list(sys.argv[1:] if args is None else args)
    use_current_directory()
    if not _CLI_EXTRA:
        print(
            f"lightning-mtl needs jsonargparse, which was not found ({_CLI_EXTRA}). Install it "
            f"with: "
            f'pip install "lightning-mtl[cli]"',
            file=sys.stderr,
        )
        return 2
    if args[:1] == ["compare"]:
        from lightning_mtl.compare.command import main as compare

        return compare(args[1:])
    if args[:1] == ["report"]:
        from lightning_mtl.compare.again import main as report

        return report(args[1:])
    MultiTaskCLI(args)
    return None
