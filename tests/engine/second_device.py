"""A second device where there is none: its tensors are wrappers around tensors of the processor.

Operations refuse tensors of both devices, as they do with a GPU, and what crosses over is noted. It
has the memory of its own that a GPU has, and nothing of its arithmetic, speed or asynchrony.

``python -m tests.engine.second_device FILE`` fits all cases of `CASES` and writes what came out; it
needs a process of its own, because a device stays registered and `torch.tensor` learns of it.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    return_and_correct_aliasing,
)
from torch.utils._pytree import tree_leaves, tree_map

from lightning_mtl import LogLoss, MinNorm
from tests.common.methods import METHODS
from tests.common.models import trainer
from tests.ranks.rank_cases import Labelled, batches

REGISTER = "_setup_privateuseone_for_python_backend"
AVAILABLE = hasattr(backend_registration, REGISTER)  # from torch 2.10 on
NAME = "second"
STEPS, LOOKED_AT = 4, 3  # batches of a fit, and the one whose crossings are counted
READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")


class There(Tensor):
    """A tensor on the second device."""

    inner: Tensor
    crossed: ClassVar[dict[str, int]] = {"to host": 0, "to device": 0}

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        made: There = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        crosses("to host")
        return self.inner.detach().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert a tensor of {NAME} to numpy")

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, list):  # which PyTorch makes a tensor of, past dispatch
            crosses("to device")
            index = torch.tensor(index)
        return super().__getitem__(index)

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)


class Watches(TorchDispatchMode):
    """Sends what makes tensors on the second device there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        there = any(isinstance(t, There) for t in tree_leaves((args, kwargs)))
        if there or _is_there(kwargs.get("device")):
            return run(func, args, kwargs)
        return func(*args, **kwargs)


def crosses(way: str) -> None:
    There.crossed[way] += 1


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the tensors inside; its result is where its tensors are, or where asked."""
    name = func.overloadpacket.__name__
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    there = [isinstance(t, There) for t in tensors]
    result_there = any(there)
    if kwargs.get("device") is not None:
        result_there = _is_there(kwargs["device"])
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if name in ("copy_", "_foreach_copy_", "_to_copy"):
        _note_copies(name, args, result_there)
    elif any(there) and not name.startswith(("index", "_index")):  # indices may be on the host
        here = [tuple(t.shape) for t in tensors if not isinstance(t, There) and t.ndim]
        if here:
            raise RuntimeError(f"Expected all tensors on the same device: {func} got {here} here.")
        if name in READS:
            crosses("to host")
    with _disable_current_modes():
        result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if result_there:
        result = tree_map(lambda x: There(x) if type(x) is Tensor else x, result)
    return return_and_correct_aliasing(func, args, kwargs, result)


def _note_copies(name: str, args: Any, result_there: bool) -> None:
    if name == "_to_copy":
        pairs = [(result_there, args[0])]
    elif name == "copy_":
        pairs = [(isinstance(args[0], There), args[1])]
    else:
        pairs = [(isinstance(to, There), t) for to, t in zip(args[0], args[1], strict=True)]
    for to_there, source in pairs:
        if isinstance(source, There) != to_there:
            crosses("to device" if to_there else "to host")


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, There) else x


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def register() -> None:
    """Make the device known to PyTorch, and to the one function that goes past dispatch."""
    getattr(backend_registration, REGISTER)(NAME)
    plain = torch.tensor

    def tensor(data: Any, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Tensor:
        if not _is_there(device):
            return plain(data, dtype=dtype, device=device, **kwargs)
        return plain(data, dtype=dtype, **kwargs).to(device)

    torch.tensor = tensor


# --------------------------------------------------------------------------------- fits


class Anywhere(CPUAccelerator):
    """Lets Lightning train on the second device."""

    def setup_device(self, device: torch.device) -> None:
        pass


class Stays(SingleDeviceStrategy):
    """Leaves the module where it was trained."""

    def teardown(self) -> None:
        pass


class Counts(Callback):
    """Crossings in one batch in the middle."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == LOOKED_AT:
            There.crossed.update(dict.fromkeys(There.crossed, 0))

    def on_train_batch_end(self, *args: Any) -> None:
        if args[-1] == LOOKED_AT:
            self.found = dict(There.crossed)


class Quiet(Labelled):
    """All labels are there, which needs no look at the device."""

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        x, targets = batch
        predictions = self(x)
        return {t: torch.nn.functional.mse_loss(p, targets[t]) for t, p in predictions.items()}


FIRST = {method.cls: method for method in reversed(METHODS)}.values()  # a row a class
MAKE: dict[str, Any] = {m.name: (lambda m=m: [m.make()], m.flags) for m in FIRST}
MAKE |= {"none": (list, {}), "LogLoss + MinNorm": (lambda: [LogLoss(), MinNorm()], {})}
ROWS = ["MinNorm", "DualBalance", "PCGrad", "MTAdam", "LogLoss + MinNorm"]
ROWS = ("MinNorm", "DualBalance", "PCGrad", "MTAdam", "LogLoss + MinNorm")
OTHERS = [name for name in MAKE if name.startswith(ROWS)]
CASES = [f"full|1|{name}" for name in MAKE]
CASES += [f"{way}|{name}" for name in OTHERS for way in ("full|2", "host|1", "host|2", "bf16|1")]


def fit(case: str, *, there: bool) -> tuple[list[float], dict[str, int]]:
    """Parameters, and what crossed over in one step."""
    memory, every, name = case.split("|")
    make, flags = MAKE[name]
    if int(every) > 1:
        flags = {"accumulate_grad_batches": int(every), **flags}
    torch.manual_seed(5)
    module, counts = Quiet(False, gradient_memory=memory), Counts()
    more = {"callbacks": [counts, *make()], "max_epochs": 1, "limit_train_batches": STEPS, **flags}
    data = batches(0, 1, False)
    if there:
        strategy = Stays(device=torch.device(NAME, 0), accelerator=Anywhere())
        run: Trainer = trainer(accelerator="auto", strategy=strategy, **more)
        with Watches():
            run.fit(module, data)
    else:
        trainer(**more).fit(module, data)
    found = [_inner(p.detach()).flatten() for p in module.net.parameters()]
    return torch.cat(found).tolist(), counts.found


def main(path: Path) -> None:
    """Every case, on both devices."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    register()
    found: dict[str, Any] = {}
    for case in CASES:
        try:
            there, crossed = fit(case, there=True)
            found[case] = {"there": there, "here": fit(case, there=False)[0], "crossed": crossed}
        except Exception:  # told by the test that reads it
            found[case] = {"error": traceback.format_exc()[-3000:]}
    path.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
