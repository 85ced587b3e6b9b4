"""The soft actor-critic of IGBv2: the density of its actions, its updates, and that it learns."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mtl.loss_balancers import _actor_critic as agent


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_density_is_that_of_the_softmax() -> None:
    mean = torch.tensor([[0.3, -0.4, 0.1]], dtype=torch.float64)
    log_std = torch.tensor([[-0.5, 0.2, -0.1]], dtype=torch.float64)
    points = (torch.arange(600, dtype=torch.float64) + 0.5) / 200  # of the weights, below 3
    first, second = torch.meshgrid(points, points, indexing="ij")
    inside = first + second < 3 - 1e-9
    weights = torch.stack([first[inside], second[inside], 3 - first[inside] - second[inside]], 1)
    density = agent.log_density(mean, log_std, weights.log()).exp()
    assert float(density.sum()) / 200**2 == pytest.approx(1.0, abs=2e-3)
    # The mean of the weights, by the density and by drawing.
    drawn = mean + log_std.exp() * torch.randn(200_000, 3, dtype=torch.float64)
    torch.testing.assert_close(
        (density * weights).sum(0) / 200**2, 3 * drawn.softmax(1).mean(0), rtol=0, atol=1e-2
    )


def test_density_of_one_and_two_tasks() -> None:
    sample = torch.tensor([[0.7], [-2.0]], dtype=torch.float64)
    one = agent.log_density(torch.zeros_like(sample), torch.ones_like(sample), sample)
    torch.testing.assert_close(one, torch.zeros(2, 1, dtype=torch.float64))
    grid = (torch.arange(2000, dtype=torch.float64) + 0.5) / 1000
    mean = torch.tensor([[0.5, -0.5]], dtype=torch.float64)
    weights = torch.stack([grid, 2 - grid], 1)
    density = agent.log_density(mean, torch.zeros_like(mean), weights.log()).exp()
    assert float(density.sum()) / 1000 == pytest.approx(1.0, abs=1e-6)


def test_density_does_not_know_the_shift() -> None:
    generator = seeded(0)
    mean, log_std, sample = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    expected = agent.log_density(mean, log_std, sample)
    assert expected.shape == (5, 1)
    torch.testing.assert_close(agent.log_density(mean, log_std, sample + 7.0), expected)
    order = [2, 0, 3, 1]
    moved = agent.log_density(mean[:, order], log_std[:, order], sample[:, order])
    torch.testing.assert_close(moved, expected)


def flat(*networks: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for net in networks for p in net.parameters()])


def test_updates_against_pytorch_modules_and_optimizers() -> None:
    size, lr = 3, 1e-3
    learned, targets, moments = agent.new_agent(size, seeded(1))
    actor_size = len(flat(modules_of(size)[0]))
    critic_size = (len(learned) - actor_size - 1) // 2
    actor, first, second = modules_of(size)
    nn.utils.vector_to_parameters(learned[:actor_size].clone(), actor.parameters())
    for k, net in enumerate((first, second)):
        start = actor_size + k * critic_size
        nn.utils.vector_to_parameters(
            learned[start : start + critic_size].clone(), net.parameters()
        )
    slow = copy.deepcopy((first, second))
    log_alpha = learned[-1:].clone().requires_grad_()
    assert float(log_alpha.detach().exp()) == pytest.approx(0.2)
    optimizers = [
        torch.optim.Adam(parameters, lr=lr)
        for parameters in (
            [*first.parameters(), *second.parameters()],
            actor.parameters(),
            [log_alpha],
        )
    ]

    def policy(state: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        mean, log_std = actor(state).chunk(2, dim=1)
        log_std = log_std.clamp(-20, 2)
        u = mean + log_std.exp() * torch.randn(state.shape, generator=generator)
        return size * torch.softmax(u, 1), agent.log_density(mean, log_std, u)

    def values(networks: Any, state: Tensor, action: Tensor) -> list[Tensor]:
        return [net(torch.cat([state, action], 1)) for net in networks]

    generator, other = seeded(2), seeded(2)
    for round_ in range(3):
        batch = torch.rand(16, 3 * size + 1, generator=seeded(10 + round_))
        agent.learn(learned, targets, moments, batch, generator, lr)

        s, a, r, s2 = batch[:, :3], batch[:, 3:6], batch[:, 6:7], batch[:, 7:]
        alpha = log_alpha.exp().detach()
        with torch.no_grad():
            a2, density = policy(s2, other)
            goal = r + 0.99 * (torch.min(*values(slow, s2, a2)) - alpha * density)
        loss = sum(((q - goal) ** 2).mean() for q in values((first, second), s, a))
        _apply(optimizers[0], loss)
        chosen, density = policy(s, other)
        _apply(
            optimizers[1], (alpha * density - torch.min(*values((first, second), s, chosen))).mean()
        )
        _apply(optimizers[2], -(log_alpha * (density - (size - 1)).detach()).mean())
        with torch.no_grad():
            for net, old in zip((first, second), slow, strict=True):
                for p, q in zip(net.parameters(), old.parameters(), strict=True):
                    q.mul_(1 - 0.005).add_(0.005 * p)
    expected = torch.cat([flat(actor, first, second), log_alpha.detach()])
    torch.testing.assert_close(learned, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(targets, flat(*slow), rtol=1e-4, atol=1e-6)
    # Adam's steps hide the length of a gradient; its first moments show it.
    means = {p: s["exp_avg"] for optimizer in optimizers for p, s in optimizer.state.items()}
    order = [p for net in (actor, first, second) for p in net.parameters()] + [log_alpha]
    expected = torch.cat([means[p].flatten() for p in order])
    torch.testing.assert_close(moments[:, 0], expected, rtol=1e-3, atol=1e-6)


def modules_of(size: int) -> tuple[nn.Sequential, nn.Sequential, nn.Sequential]:
    def network(*widths: int) -> nn.Sequential:
        a, b, c, d = widths
        return nn.Sequential(
            nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c), nn.ReLU(), nn.Linear(c, d)
        )

    return (
        network(size, 128, 128, 2 * size),
        network(2 * size, 128, 128, 1),
        network(2 * size, 128, 128, 1),
    )


def _apply(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None
    loss.backward(inputs=[p for group in optimizer.param_groups for p in group["params"]])
    optimizer.step()


def test_networks_start_like_pytorch_layers() -> None:
    learned, targets, moments = agent.new_agent(2, seeded(0))
    actor, first, second = modules_of(2)
    assert len(learned) == len(flat(actor, first, second)) + 1
    assert torch.equal(targets, learned[len(flat(actor)) : -1])
    assert moments.shape == (len(learned), 3)
    assert not moments.any()
    wide = learned[2 * 129 + 128 : 2 * 129 + 128 + 128 * 127]  # of the second layer of the actor
    assert float(wide.abs().max()) <= 1 / math.sqrt(128)
    assert float(wide.std()) == pytest.approx(1 / math.sqrt(3 * 128), rel=0.05)


def test_the_agent_finds_the_better_action() -> None:
    """A reward that grows with the first weight: the agent comes to prefer it."""
    generator = seeded(0)
    learned, targets, moments = agent.new_agent(2, generator)
    state = torch.tensor([1.0, 1.0])

    def preferred() -> float:
        noise = torch.randn(200, 2, generator=seeded(1))
        return float(torch.stack([agent.act(learned, state, z) for z in noise])[:, 0].mean())

    assert preferred() == pytest.approx(1.0, abs=0.25)
    for _ in range(150):
        action = 2 * torch.randn(64, 2, generator=generator).softmax(1)
        seen = state.expand(64, 2)
        reward = 3 * (action[:, :1] - action[:, 1:])
        batch = torch.cat([seen, action, reward, seen], dim=1)
        agent.learn(learned, targets, moments, batch, generator, lr=3e-3)
    assert preferred() > 1.6
