"""From the files of a comparison to models, data, balancers and trainers."""

from __future__ import annotations

import difflib
import inspect
import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
    Timer,
)
from lightning.pytorch.cli import LightningArgumentParser

import lightning_mtl
from lightning_mtl import Balancer, EqualWeighting, MultiTaskModule, Scalarization
from lightning_mtl.compare import CompareError
from lightning_mtl.compare.grid import SINGLE
from lightning_mtl.compare.texts import error_text, shortened
from lightning_mtl.compare.tuning.settings import arguments, with_settings
from lightning_mtl.compare.tuning.space import KEYS, Space, read_space
from lightning_mtl.parsing import MultiTaskCLI

# What a run leaves out: it writes no files of its own and prints no bars.
_QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
_LEFT_OUT = (Checkpoint, DeviceStatsMonitor, LearningRateMonitor, ModelSummary, ProgressBar)
_STOPS_EARLY = (EarlyStopping, Timer)


class RunCLI(MultiTaskCLI):
    """Model, data and trainer of one run, built from the config that ``fit`` takes.

    Args:
        config: path of the config.
        seed: seeds everything before the model is built.
        callbacks: balancers and recorders to add to the config's own callbacks.
        trainer: Trainer arguments that replace those of the config.
        may_stop_early: keep callbacks such as EarlyStopping.
        overrides: more of the command line, which replaces what the config says.
    """

    def __init__(
        self,
        config: str,
        seed: int,
        callbacks: Sequence[Callback] = (),
        trainer: Mapping[str, Any] | None = None,
        may_stop_early: bool = True,
        overrides: Sequence[str] = (),
    ) -> None:
        self.more_callbacks = list(callbacks)
        self.replace = dict(trainer or {})
        self.left_out = _LEFT_OUT if may_stop_early else _LEFT_OUT + _STOPS_EARLY
        self.given = ["--config", config, f"--seed_everything={seed}", *overrides]
        super().__init__(
            self.given,
            run=False,
            save_config_callback=None,
            parser_kwargs={"exit_on_error": False},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Accept what only ``fit`` has, so that its saved config can be used as it is."""
        for name in ("ckpt_path", "weights_only"):
            parser.add_argument(f"--{name}", type=Any, default=None)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The config's trainer on one device, without loggers, checkpoints and bars."""
        settings = self.config_init["trainer"]
        own = settings.callbacks or []
        own = own if isinstance(own, list) else [own]
        kept = [callback for callback in own if not isinstance(callback, self.left_out)]
        if settings.devices == "auto":
            kwargs["devices"] = 1
        return super().instantiate_trainer(
            **{**kwargs, **_QUIET, **self.replace, "callbacks": kept + self.more_callbacks}
        )


@dataclass
class Balancers:
    """The content of the file of balancers.

    Attributes:
        methods: callbacks, by name.
        spaces: settings to try, of the entries that try some; ``single-task`` may be among them.
        identity: what the file means, however it is written.
    """

    methods: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    spaces: dict[str, Space] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)


def read_balancers(path: str, content: Any) -> Balancers:
    """The content of the file of balancers.

    Raises:
        CompareError: not a mapping of names to callbacks, or to mappings with ``callbacks`` and
            what is tried of them.
    """
    example = "minnorm: [{class_path: MinNorm}]"
    expected = f"Expected {path} to map a name to its callbacks, such as `{example}`,"
    if not isinstance(content, dict) or not content:
        raise CompareError(
            f"{expected} but found {type(content).__name__}. Name at least one balancer."
        )
    found = Balancers()
    for name, spec in content.items():
        space = None
        tuned = (
            isinstance(spec, dict) and "class_path" not in spec and not spec.keys().isdisjoint(KEYS)
        )
        if tuned:
            space = read_space(str(name), spec)
        callbacks = _callbacks(expected, str(name), spec.get("callbacks") if tuned else spec)
        if space is not None:
            found.spaces[str(name)] = space
            if name == SINGLE and not callbacks:  # the baselines have no callbacks to name
                found.identity[SINGLE] = spec
                continue
        found.methods[str(name)] = callbacks
        found.identity[str(name)] = {**spec, "callbacks": callbacks} if tuned else callbacks
    return found


def _callbacks(expected: str, name: str, spec: Any) -> list[dict[str, Any]]:
    callbacks = spec if isinstance(spec, list) else [] if spec is None else [spec]
    callbacks = [{"class_path": c} if isinstance(c, str) else c for c in callbacks]
    for callback in callbacks:
        if not isinstance(callback, dict) or "class_path" not in callback:
            raise CompareError(
                f"{expected} but `{name}` holds {shortened(repr(callback), 300)}. Give it a "
                f"`class_path`."
            )
    return callbacks


def callbacks_from(name: str, specs: Sequence[Mapping[str, Any]]) -> list[Callback]:
    """Instantiate the callbacks of one balancer.

    Raises:
        CompareError: a class that does not exist, or arguments that it does not take.
    """
    found: list[Callback] = []
    for spec in specs:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--callback", type=Callback)
        try:
            config = parser.parse_object({"callback": dict(spec)})
            # the newer name came with jsonargparse 4.49
            instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
            found.append(instantiate(config).callback)
        except (Exception, SystemExit) as error:
            raise CompareError(
                f"Expected balancer `{name}` to be a callback that can be built, but found "
                f"{shortened(repr(dict(spec)), 300)}: {_reason(str(spec['class_path']), error)}"
            ) from error
    return found


def callbacks_with(
    name: str, specs: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> list[Callback]:
    """Instantiate the callbacks of an entry with settings that it tries.

    Raises:
        CompareError: an argument that does not exist, or a value that it does not take.
    """
    try:
        return callbacks_from(name, with_settings(specs, settings))
    except CompareError as error:
        if not settings:
            raise
        shown = ", ".join(f"`{key}: {value!r}`" for key, value in settings.items())
        raise CompareError(
            f"Expected `{name}` to try values that its callbacks and the config take, but found "
            f"{shortened(shown, 300)}. {error}"
        ) from error


def _reason(class_path: str, error: BaseException) -> str:
    known = [n for n in lightning_mtl.__all__ if _is_balancer(getattr(lightning_mtl, n))]
    near = difflib.get_close_matches(class_path, known, 1)
    exists = class_path in known or "." in class_path
    if exists:
        return error_text(error)
    hint = f"Did you mean `{near[0]}`? " if near else ""
    return (
        f"there is no class `{class_path}`. {hint}Give one of {', '.join(known)}, or the full "
        f"import path of a callback of yours, such as `my_package.MyBalancer`."
    )


def _is_balancer(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, Balancer)


def kind_of(callbacks: Sequence[Callback]) -> str:
    """``equal``, ``fixed`` (weights chosen beforehand) or ``balancer``."""
    balancers = [
        c for c in callbacks if isinstance(c, Balancer) and not isinstance(c, EqualWeighting)
    ]
    if not balancers:
        return "equal"
    return "fixed" if all(isinstance(c, Scalarization) for c in balancers) else "balancer"


def check_space(
    name: str,
    specs: list[dict[str, Any]],
    space: Space,
    cli: RunCLI,
    fits: Callable[[list[Callback]], None],
) -> None:
    """Find out now whether every value that is tried is taken, each on its own.

    Args:
        name: of the entry.
        specs: its callbacks.
        space: what it tries.
        cli: knows the config.
        fits: raises where callbacks do not fit the model.

    Raises:
        CompareError: an argument that does not exist, or a value that it does not take.
    """
    for settings in space.extremes():
        ((key, value),) = settings.items()
        printed = io.StringIO()  # the parser prints what it found where it offers a cure
        try:
            if options := arguments(settings):
                with redirect_stderr(printed):
                    cli.parser.parse_args([*cli.given, *options])
            else:
                whole = {**space.first(), **settings}  # which may be needed beside one another
                fits(callbacks_with(name, specs, whole))
        except (Exception, SystemExit) as error:
            why = printed.getvalue().strip().removeprefix("error: ") or error_text(error)
            raise CompareError(
                f"Expected `{name}` to try values that its callbacks and the config take, but "
                f"found `{key}: {shortened(repr(value), 100)}`. {why}"
            ) from error


def build(config: str, **kwargs: Any) -> RunCLI:
    """Build everything that ``config`` describes, with its errors as ours.

    Raises:
        CompareError: the config cannot be used for a comparison.
    """
    try:
        cli = RunCLI(config, 0, **kwargs)
    except (Exception, SystemExit) as error:
        raise CompareError(
            f"Expected {config} to be a config that `lightning-mtl fit` takes, with `model`, "
            f"`data` and `trainer`, but building it failed. {error_text(error)}"
        ) from error
    trainer: Any = cli.trainer
    model = cli.model
    balancers = [type(c).__name__ for c in trainer.callbacks if isinstance(c, Balancer)]
    if balancers:
        raise CompareError(
            f"Expected no balancer in the `trainer.callbacks` of {config} but found "
            f"{', '.join(balancers)}. Move it to the file of balancers, so that every run has "
            f"just its own."
        )
    if cli.config.get("ckpt_path"):
        raise CompareError(
            f"Expected no `ckpt_path` in {config} but found {cli.config.ckpt_path}. Every run "
            f"starts from its seed: remove it, or load the weights in the model's constructor."
        )
    if trainer.num_devices * trainer.num_nodes > 1:
        raise CompareError(
            f"Expected one device a run but {config} asks for "
            f"{trainer.num_devices * trainer.num_nodes}. Set `trainer.devices: 1`; runs go side by "
            f"side with --workers."
        )
    if not isinstance(model, MultiTaskModule):
        raise CompareError(
            f"Expected a MultiTaskModule in {config} but found {type(model).__name__}."
        )
    return cli
