"""The Gramian from block to block of a graph is that of all rows, on graphs of any kind."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from lightning_mtl import MinNorm, MultiTaskModule, UPGrad
from lightning_mtl.engine.gradients.cuts import blocks, parts
from tests.common.models import Batched, trainer
from tests.engine.test_forms import Observer

TASKS = ("a", "b", "c")


class Net(nn.Module):
    """From a batch to an output for each task; what `heads` get is each graph's own."""

    method: type[Any] = MinNorm

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({t: nn.Linear(6, 1) for t in TASKS})

    def outputs(self, *z: Tensor) -> dict[str, Tensor]:
        return {t: head(z[i % len(z)]) for i, (t, head) in enumerate(self.heads.items())}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError


class Mlp(Net):
    def __init__(self) -> None:
        super().__init__()
        layers = [m for _ in range(5) for m in (nn.Linear(6, 6), nn.Tanh())]
        self.trunk = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.outputs(self.trunk(x))


class InPlace(Mlp):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for i, layer in enumerate(self.trunk[::2]):
            x = layer(x).relu_() if i % 2 else layer(x).add_(1).tanh_()
        return self.outputs(x)


class Residual(Net):
    """Convolutions with skips, normalisation and a downsampling way beside."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.convolutions = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(6))
        self.beside = nn.Conv2d(4, 4, 1)
        self.last = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.first(x[:, None, :, None] * x[:, None, None])
        for i, norm in enumerate(self.norms):
            inner = self.convolutions[2 * i](z).relu()
            z = (norm(self.convolutions[2 * i + 1](inner)) + (self.beside(z) if i else z)).relu()
        return self.outputs(self.last(z.mean((2, 3))))


class UNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(12, 6) for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        kept = []
        for layer in self.down:
            kept.append(x)
            x = layer(x).tanh()
        for layer in self.up:
            x = layer(torch.cat([x, kept.pop()], 1)).tanh()
        return self.outputs(x)


class Pyramid(Net):
    """Heads at three depths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.levels = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.sides = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z, found = self.stem(x), []
        for level in self.levels:
            z = level(z).tanh()
            found.append(z)
        top = found[-1]
        out = []
        for side, z in zip(self.sides, reversed(found), strict=True):
            top = top + side(z)
            out.append(top)
        return self.outputs(*out)


class Tied(Net):
    """A transformer whose embedding is its output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(6, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.encoder((x[:, :, None] * self.embedding).tanh())
        return self.outputs((z @ self.embedding.T).mean(1))


class Recurrent(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 6, num_layers=2, batch_first=True)
        self.cell = nn.GRUCell(1, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z, hidden = self.lstm(x[:, :, None])[0][:, -1], torch.zeros_like(x)
        for i in range(x.shape[1]):
            hidden = self.cell(x[:, i : i + 1], hidden)
        return self.outputs(z + hidden)


class Dense(Net):
    """Every layer sees all before it: no place has all paths."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6 * (i + 1), 6) for i in range(4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = [x]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)).tanh())
        return self.outputs(*found[2:])


class Twice(Mlp):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.outputs(self.trunk(x) * self.trunk(x.roll(1, 1)))


class Repeated(Mlp):
    """A layer used again and again, and weights under a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = weight_norm(nn.Linear(6, 6))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for _ in range(3):
            x = self.normed(self.trunk[0](x).tanh())
        return self.outputs(self.trunk(x))


class DeadBranch(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.unused, self.dead = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.trunk(x)
        return self.outputs(z + self.dead(z).detach() + 0 * self.dead(x))


class Checkpointed(Mlp):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.trunk[:4](x)
        return self.outputs(self.trunk[8:](checkpoint(self.trunk[4:8], z, use_reentrant=False)))


class Hooked(Mlp):
    """Hooks that change gradients, on tensors that all paths pass and on a parameter."""

    method = UPGrad  # a direction that is not one task's gradient

    def __init__(self) -> None:
        super().__init__()
        self.trunk[0].weight.register_hook(lambda g: -3 * g)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.trunk:
            x = layer(x)
            x.register_hook(lambda g: 0.5 * g + g.flip(-1))
            x.grad_fn.register_prehook(lambda grads: tuple(2 * g for g in grads))
            x.grad_fn.register_hook(
                lambda grads, above: tuple(g if g is None else -g for g in grads)
            )
        return self.outputs(x)


class Changing(Mlp):
    """Another depth in every step."""

    steps = 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.steps += 1
        return self.outputs(self.trunk[: 2 * (1 + self.steps % 5)](x))


class Regularised(Mlp):
    """A task whose loss is of the parameters themselves too."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = self.outputs(self.trunk(x))
        return {**found, "c": found["c"] + sum(p.square().sum() for p in self.trunk.parameters())}


KINDS: list[Callable[[], Net]] = [
    Mlp,
    InPlace,
    Residual,
    UNet,
    Pyramid,
    Tied,
    Recurrent,
    Dense,
    Twice,
    Repeated,
    DeadBranch,
    Checkpointed,
    Hooked,
    Changing,
    Regularised,
]


class Module(MultiTaskModule):
    def __init__(self, kind: Callable[[], Net], **kwargs: Any) -> None:
        super().__init__(TASKS, **kwargs)
        torch.manual_seed(3)
        self.net = kind().double()

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return {
            t: (y.squeeze(-1) - batch[:, i]).square().mean() * 10**i
            for i, (t, y) in enumerate(self.net(batch).items())
        }

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def fitted(
    kind: Callable[[], Net], memory: str, number: int = 4, *, compiled: bool = False, **flags: Any
) -> tuple[Tensor, list[Any]]:
    module, seen = Module(kind, gradient_memory=memory, gradient_blocks=number), Observer()
    if compiled:
        module.net.compile(backend="aot_eager")
    generator = torch.Generator().manual_seed(0)
    data = Batched(torch.randn(4, 5, 6, dtype=torch.float64, generator=generator))
    trainer(callbacks=[module.net.method(), seen], precision="64-true", **flags).fit(module, data)
    return torch.cat([p.detach().flatten() for p in module.net.parameters()]), seen.records


@pytest.mark.filterwarnings("ignore:Backward passes are repeated")
@pytest.mark.parametrize("number", [1, 4, 99])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_weights_and_directions_of_all_rows(kind: Callable[[], Net], number: int) -> None:
    whole, rows = fitted(kind, "full")
    found, records = fitted(kind, "blocks", number)
    assert len(rows) == len(records) == 4
    for expected, record in zip(rows, records, strict=True):
        torch.testing.assert_close(record.gramian, expected.gramian, rtol=1e-12, atol=0)
        close = {"rtol": 1e-9, "atol": 1e-12}
        torch.testing.assert_close(record.gradient_weights, expected.gradient_weights, **close)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Backward passes are repeated")
@pytest.mark.parametrize("flags", [{"detect_anomaly": True}, {"compiled": True}], ids=str)
@pytest.mark.parametrize("kind", [Mlp, Residual, UNet])
def test_under_anomaly_detection_and_compiled(kind: Callable[[], Net], flags: Any) -> None:
    torch._dynamo.reset()
    (whole, _), (found, _) = fitted(kind, "full"), fitted(kind, "blocks", **flags)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "said"), [(Mlp, 0), (Dense, 1), (Tied, 1)])
def test_repeated_passes_are_said_once(kind: Callable[[], Net], said: int) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fitted(kind, "blocks")
    words = [w for w in found if str(w.message).startswith("Backward passes are repeated")]
    assert len(words) == said


def wanted(net: Net) -> set[int]:
    return {id(p) for name, p in net.named_parameters() if "heads" not in name}


@pytest.mark.parametrize(("kind", "number"), [(Mlp, 5), (Residual, 3), (UNet, 1), (Dense, 1)])
def test_a_chain_is_cut_where_all_paths_pass(kind: Callable[[], Net], number: int) -> None:
    net = kind()
    made = blocks(parts(list(net(torch.randn(5, 6)).values())), wanted(net), 99, len(TASKS))
    assert sum(block.top is not None for block in made) + 1 >= number
    tops = [block.top for block in made[1:]]
    assert [block.bottom for block in made[:-1]] == tops  # one goes on where the other ended
    once = [id(p) for block in made for group in block.groups for p in group]
    assert sorted(once) == sorted(wanted(net))


@pytest.mark.parametrize(("width", "tasks", "number"), [(512, 1, 4), (256, 4, 4), (256, 2, 2)])
def test_rows_of_a_block_stay_in_the_cache(width: int, tasks: int, number: int) -> None:
    """Where parts end they cost no pass, so that one block is asked for and more are made."""
    layers = nn.Sequential(*[nn.Linear(width, width) for _ in range(4)])
    loss = layers(torch.randn(2, width)).square().mean()
    found = {id(p) for p in layers.parameters()}
    assert len(blocks(parts([loss]), found, 1, tasks)) == number


class Graph(Net):
    """A random graph of small layers, some shared, some skipped, some seen by one task."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.draw = random.Random(seed)
        self.size = self.draw.randint(2, 9)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(self.size))
        self.plan = [
            (
                self.draw.sample(range(i + 1), self.draw.randint(1, min(2, i + 1))),
                self.draw.randint(0, i) if self.draw.random() < 0.25 else i,
                self.draw.choice(["tanh", "relu", "add", "functional"]),
            )
            for i in range(self.size)
        ]
        self.stem = nn.Linear(6, 6)
        self.ends = [self.draw.randint(max(0, self.size - 3), self.size) for _ in TASKS]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = [self.stem(x)]
        for sources, layer, kind in self.plan:
            z = self.layers[layer](sum(found[s] for s in sources))
            if kind == "tanh":
                z = z.tanh()
            elif kind == "relu":
                z = functional.leaky_relu(z)
            elif kind == "add":
                z = z + found[sources[0]]
            else:
                z = functional.layer_norm(z, (6,))
            found.append(z)
        return self.outputs(*(found[end] for end in self.ends))


@pytest.mark.filterwarnings("ignore:Backward passes are repeated")
@pytest.mark.parametrize("seed", range(40))
def test_random_graphs(seed: int) -> None:
    net = Graph(seed).double()
    losses = [y.square().mean() for y in net(torch.randn(5, 6, dtype=torch.float64)).values()]
    inside = [p for n, p in net.named_parameters() if "heads" not in n]
    whole = torch.zeros(len(TASKS), sum(p.numel() for p in inside), dtype=torch.float64)
    for t, loss in enumerate(losses):
        grads = torch.autograd.grad(loss, inside, retain_graph=True, allow_unused=True)
        whole[t] = torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).flatten()
                for p, g in zip(inside, grads, strict=True)
            ]
        )
    kind = lambda: Graph(seed)  # noqa: E731
    _, records = fitted(kind, "blocks", 6)
    _, rows = fitted(kind, "full")
    for expected, record in zip(rows, records, strict=True):
        torch.testing.assert_close(record.gramian, expected.gramian, rtol=1e-12, atol=0)
    made = blocks(parts(losses), {id(p) for p in inside}, 6, len(TASKS))
    once = [id(p) for block in made for group in block.groups for p in group]
    assert len(once) == len(set(once))
    reached = {
        id(p)
        for p, c in zip(inside, whole.split([p.numel() for p in inside], 1), strict=True)
        if c.any()
    }
    assert reached <= set(once)
