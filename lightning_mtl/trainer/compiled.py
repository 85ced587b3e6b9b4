"""``torch.compile(module)``: forward passes and losses are compiled, the training flow is not."""

from __future__ import annotations

from lightning_mtl.contract import TaskModule, base_of

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


def compile_losses(module: TaskModule) -> None:
    """Compile a user's ``task_losses`` in place of our steps, as ``torch.compile(module)`` asks.

    Lightning unwraps a compiled module and compiles its ``forward`` and its steps. A step of ours
    is no arithmetic to be traced: it takes gradients, looks at callbacks, and logs.

    Args:
        module: whose ``forward`` is compiled by now, if it is.
    """
    if module._compiler_ctx is None:
        return
    base = base_of(type(module))
    for name in _STEPS:
        if getattr(type(module), name) is getattr(base, name):
            vars(module).pop(name, None)
    own = type(module).task_losses is not base.task_losses
    if own and not hasattr(module.task_losses, "_torchdynamo_orig_callable"):
        compiled = module._compiler_ctx["dynamo_ctx"](module.task_losses)
        module.task_losses = compiled  # type: ignore[method-assign] # as Lightning does
