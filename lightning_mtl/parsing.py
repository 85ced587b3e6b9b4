"""From words to objects: the parser of Lightning's commands, on which ``compare`` stands too."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, callbacks
from lightning_utilities.core.imports import RequirementCache

import lightning_mtl  # the short names of balancers resolve once they are imported

CLI_EXTRA = RequirementCache("jsonargparse[signatures]>=4.39,<5")
_DESCRIPTION = (
    "Train, balance and compare multi-task models. The commands below are Lightning's own for "
    "any MultiTaskModule; `lightning-mtl diagnose --help` shows how to look at the task gradients "
    "of a short run first, `lightning-mtl compare --help` how to compare balancers over seeds with "
    "single-task baselines."
)

if TYPE_CHECKING or CLI_EXTRA:
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


def hint(message: str) -> str | None:
    """What is wrong with a class in a parser's message, if it is a name that does not exist.

    Args:
        message: of jsonargparse.
    """
    key = re.match(r'Parser key "([\w.]+)"', message)
    where = f"`{key.group(1)}`: " if key else ""
    if found := re.search(r"import path string: (\w+)\s*$", message, re.MULTILINE):
        known = _callbacks()
        near = _near(found.group(1), known)
        rest = f"Give one of {', '.join(known)}, or" if not near else "Or give"
        return (
            f"{where}there is no class `{found.group(1)}`.{near} {rest} the full import path of a "
            f"class of yours, such as `my_package.MyClass`."
        )
    if found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        module, name = found.groups()
        if near := _near(name, list(vars(_imported(module)))):
            return f"{where}`{module}` has no class `{name}`.{near}"
    # The second are the words of jsonargparse 4.39.
    refused = r"(?:Option '(\w+)' is not accepted|Validation failed: Key '(\w+)' is not expected)"
    pattern = rf"class_path '([\w.]+)\.(\w+)':\s+{refused}"
    if found := re.search(pattern, message):
        module, name, *options = found.groups()
        option = next(o for o in options if o)
        given = list(inspect.signature(getattr(_imported(module), name)).parameters)
        return (
            f"{where}`{name}` has no argument `{option}`.{_near(option, given)} Its arguments are "
            f"{', '.join(given) or 'none'}."
        )
    pattern = (
        r"expects a function or a callable class: [\s\S]*?class_path='([\w.]+)\.(\w+)', init_args="
    )
    if found := re.search(pattern, message):
        module, name = found.groups()
        named = getattr(_imported(module), name)
        if named is functools.partial or not isinstance(named, type):
            return (
                f"{where}`{module}.{name}` cannot be given arguments in a file: a function is "
                f"named by its import path alone, and arguments are those of a class. Name a "
                f"class, such as `torch.nn.CrossEntropyLoss` with its `init_args`, or a function "
                f"of yours that passes them on."
            )
    return None


def _imported(module: str) -> Any:
    return importlib.import_module(module)


def _callbacks() -> list[str]:
    """The callbacks that have a short name."""
    ours = {n: getattr(lightning_mtl, n) for n in lightning_mtl.__all__}
    theirs = {n: getattr(callbacks, n) for n in callbacks.__all__}
    return [
        name
        for name, found in {**ours, **theirs}.items()
        if isinstance(found, type) and issubclass(found, Callback) and not inspect.isabstract(found)
    ]


def _near(name: str, known: list[str]) -> str:
    by_lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), by_lower, 1)
    return f" Did you mean `{by_lower[near[0]]}`?" if near else ""
