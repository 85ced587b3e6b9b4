"""Soft actor-critic whose actions are task weights: flat tensors in, flat tensors changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import linear, mse_loss

from lightning_mtl.numerics.adam import adam_step

_HIDDEN = 128
_DISCOUNT = 0.99
_POLYAK = 0.005
_TEMPERATURE = 0.2
_LOG_STD = (-20.0, 2.0)


def new_agent(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Untrained networks for ``size`` tasks, on the CPU, in float32.

    Args:
        size: number of tasks T.
        generator: what the weights are drawn from, as ``torch.nn.Linear`` draws them.

    Returns:
        All that is learned (actor, two critics, log of the temperature) in one vector of length N,
        the slowly following copy of the critics, and Adam's moments, shape ``(N, 3)``.
    """
    critics = [_drawn(_critic_widths(size), generator) for _ in range(2)]
    actor = _drawn(_actor_widths(size), generator)
    temperature = torch.tensor([math.log(_TEMPERATURE)], dtype=torch.float32, device="cpu")
    learned = torch.cat([actor, *critics, temperature])
    return learned, torch.cat(critics), learned.new_zeros(len(learned), 3)


def act(learned: Tensor, state: Tensor, noise: Tensor) -> Tensor:
    """The action of the agent in one state.

    Args:
        learned: from :func:`new_agent`.
        state: what the agent sees, shape ``(T,)``.
        noise: standard normal numbers, shape ``(T,)``.

    Returns:
        Weights of shape ``(T,)``, at least zero, with sum T.
    """
    actor = _parts(learned, len(state))[0]
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return len(state) * _samples(actor, state[None], noise[None])[2][0].softmax(0)


def log_density(mean: Tensor, log_std: Tensor, sample: Tensor) -> Tensor:
    r"""Logarithm of the density of :math:`a = T \, \mathrm{softmax}(u)` for normal :math:`u`.

    The softmax forgets a shift of :math:`u`, so that :math:`a` has :math:`T - 1` dimensions; its
    distribution is the logistic normal one. The density is with respect to the first :math:`T - 1`
    weights; with :math:`z = u - \mu` and :math:`\bar z` its mean weighted by
    :math:`1 / \sigma_t^2`,

    .. math:: \log \pi(a) = -\tfrac12 \sum_t \frac{(z_t - \bar z)^2}{\sigma_t^2}
              - \sum_t \log \sigma_t - \tfrac12 \log \sum_t \frac{1}{\sigma_t^2}
              - \tfrac{T - 1}{2} \log 2 \pi - \sum_t \log \frac{a_t}{T} - (T - 1) \log T

    Args:
        mean: :math:`\mu`, shape ``(B, T)``.
        log_std: :math:`\log \sigma`, the same shape.
        sample: :math:`u`, the same shape.

    Returns:
        Shape ``(B, 1)``; zero for one task.

    References:
        Aitchison & Shen, *Logistic-normal distributions: Some properties and uses*, Biometrika 67,
        1980.
    """
    size = mean.shape[1]
    precision = (-2 * log_std).exp()
    total = precision.sum(1, keepdim=True)
    z = sample - mean
    centred = z - (precision * z).sum(1, keepdim=True) / total
    constant = (size - 1) * (0.5 * math.log(2 * math.pi) + math.log(size))
    return (
        -0.5 * (precision * centred.square()).sum(1, keepdim=True)
        - log_std.sum(1, keepdim=True)
        - 0.5 * total.log()
        - sample.log_softmax(1).sum(1, keepdim=True)
        - constant
    )


def learn(
    learned: Tensor,
    targets: Tensor,
    moments: Tensor,
    batch: Tensor,
    generator: torch.Generator,
    lr: float,
) -> None:
    """One update of critics, actor and temperature, in place, by Adam.

    Args:
        learned: from :func:`new_agent`.
        targets: the same.
        moments: the same.
        batch: transitions, shape ``(B, 3 T + 1)``: state, action, reward, next state.
        generator: what actions are drawn with.
        lr: learning rate.

    References:
        Haarnoja et al., *Soft Actor-Critic Algorithms and Applications*, arXiv 1812.05905.
    """
    size = batch.shape[1] // 3
    state, action, reward, following = batch.split([size, size, 1, size], dim=1)
    actor, critics, temperature = _parts(learned, size)
    actor_moments, critic_moments, temperature_moments = _parts(moments, size)
    alpha = temperature.exp()

    def drawn(parameters: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn(seen.shape, generator=generator, dtype=seen.dtype, device="cpu")
        return _decide(parameters, seen, noise)

    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        with torch.no_grad():
            chosen, density = drawn(actor, following)
            value = torch.minimum(*_values(targets, following, chosen)) - alpha * density
            goal = reward + _DISCOUNT * value
        variable = critics.clone().requires_grad_()
        first, second = _values(variable, state, action)
        error = mse_loss(first, goal) + mse_loss(second, goal)
        adam_step(critics, torch.autograd.grad(error, variable)[0], critic_moments, lr)

        variable = actor.clone().requires_grad_()
        chosen, density = drawn(variable, state)
        cost = (alpha * density - torch.minimum(*_values(critics, state, chosen))).mean()
        adam_step(actor, torch.autograd.grad(cost, variable)[0], actor_moments, lr)

    # The simplex has T - 1 dimensions; one nat less than zero for each is the usual target.
    surplus = (density.detach() - (size - 1)).mean()
    adam_step(temperature, -surplus[None], temperature_moments, lr)
    targets.lerp_(critics, _POLYAK)


def _decide(actor: Tensor, state: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Actions ``(B, T)`` and the logarithms of their densities ``(B, 1)``."""
    mean, log_std, sample = _samples(actor, state, noise)
    return state.shape[1] * sample.softmax(1), log_density(mean, log_std, sample)


def _samples(actor: Tensor, state: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    size = state.shape[1]
    mean, log_std = _perceptron(actor, _actor_widths(size), state).split(size, dim=1)
    log_std = log_std.clamp(*_LOG_STD)
    return mean, log_std, mean + log_std.exp() * noise


def _values(critics: Tensor, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.cat([state, action], dim=1)
    widths = _critic_widths(state.shape[1])
    first, second = (_perceptron(half, widths, both) for half in critics.chunk(2))
    return first, second


def _perceptron(parameters: Tensor, widths: Sequence[int], inputs: Tensor) -> Tensor:
    start = 0
    for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
        if layer:
            inputs = inputs.relu()
        matrix, bias = parameters[start : (start := start + fan_out * (fan_in + 1))].split(
            [fan_out * fan_in, fan_out]
        )
        inputs = linear(inputs, matrix.view(fan_out, fan_in), bias)
    return inputs


def _drawn(widths: Sequence[int], generator: torch.Generator) -> Tensor:
    layers = [
        (2 * torch.rand(n * (m + 1), generator=generator, dtype=torch.float32, device="cpu") - 1)
        / math.sqrt(m)
        for m, n in pairwise(widths)
    ]
    return torch.cat(layers)


def _parts(vector: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views: actor, both critics, temperature."""
    actor, critic = (
        sum(n * (m + 1) for m, n in pairwise(widths))
        for widths in (_actor_widths(size), _critic_widths(size))
    )
    first, second, third = vector.split([actor, 2 * critic, 1])
    return first, second, third


def _actor_widths(size: int) -> tuple[int, ...]:
    return (size, _HIDDEN, _HIDDEN, 2 * size)


def _critic_widths(size: int) -> tuple[int, ...]:
    return (2 * size, _HIDDEN, _HIDDEN, 1)
