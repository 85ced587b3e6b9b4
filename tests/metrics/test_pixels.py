"""Metrics of depth and surface normals: the direct formulas, masks, batches, messages."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import Tensor

from lightning_mtl.metrics import (
    MaskedAbsoluteError,
    MaskedRelativeError,
    MeanAngle,
    MedianAngle,
    WithinAngle,
    angular_errors,
)

SHAPE = (4, 6, 8)  # images, height, width


def depths(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = 1 + 4 * torch.rand(SHAPE, generator=generator)
    target[torch.rand(SHAPE, generator=generator) < 0.3] = 0  # no measurement
    return 3 * torch.rand(SHAPE, generator=generator), target


def normals(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n, h, w = SHAPE
    target = torch.nn.functional.normalize(torch.randn(n, 3, h, w, generator=generator), dim=1)
    prediction = 2 * target + torch.randn(n, 3, h, w, generator=generator)
    target.mul_((torch.rand(n, 1, h, w, generator=generator) > 0.3).float())
    return prediction, target


def direct(prediction: Tensor, target: Tensor) -> list[float]:
    """Angles pixel by pixel, from the dot product in double precision."""
    angles = []
    for image, truth in zip(prediction.double(), target.double(), strict=True):
        for p, t in zip(image.flatten(1).T.tolist(), truth.flatten(1).T.tolist(), strict=True):
            if any(t):
                dot = sum(a * b for a, b in zip(p, t, strict=True))
                cosine = dot / math.hypot(*p) / math.hypot(*t)
                angles.append(math.degrees(math.acos(max(-1.0, min(1.0, cosine)))))
    return angles


METRICS = [
    MaskedAbsoluteError,
    MaskedRelativeError,
    MeanAngle,
    MedianAngle,
    lambda: WithinAngle(30),
]


def data(metric) -> tuple[Tensor, Tensor]:
    return depths() if isinstance(metric, (MaskedAbsoluteError, MaskedRelativeError)) else normals()


def test_errors_of_depth_are_means_over_valid_pixels():
    prediction, target = depths()
    pairs = zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True)
    valid = [(p, t) for p, t in pairs if t != 0]
    assert 0 < len(valid) < target.numel()
    absolute = sum(abs(p - t) for p, t in valid) / len(valid)
    relative = sum(abs(p - t) / t for p, t in valid) / len(valid)
    assert MaskedAbsoluteError()(prediction, target).item() == pytest.approx(absolute, rel=1e-5)
    assert MaskedRelativeError()(prediction, target).item() == pytest.approx(relative, rel=1e-5)


def test_another_number_can_stand_for_no_measurement():
    prediction, target = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, -1.0, 0.0])
    assert MaskedAbsoluteError(invalid=-1.0)(prediction, target) == 2.0


def test_angles_are_those_of_the_dot_product():
    prediction, target = normals()
    expected = direct(prediction, target)
    assert 0 < len(expected) < prediction[:, 0].numel()
    torch.testing.assert_close(
        angular_errors(prediction, target).sort().values,
        torch.tensor(expected).sort().values,
        rtol=0,
        atol=1e-3,
    )
    ordered = sorted(expected)
    assert MeanAngle()(prediction, target).item() == pytest.approx(
        sum(expected) / len(expected), rel=1e-5
    )
    lower = ordered[(len(ordered) - 1) // 2]
    assert MedianAngle()(prediction, target).item() == pytest.approx(lower, abs=1e-3)
    for bound in (11.25, 22.5, 30.0):
        share = sum(a < bound for a in expected) / len(expected)
        assert WithinAngle(bound)(prediction, target).item() == pytest.approx(share, abs=1e-6)


def test_small_angles_keep_their_precision():
    for angle in (0.0, 1e-4, 0.01, 179.99, 180.0):
        radians = math.radians(angle)
        vector = torch.tensor([[math.sin(radians), 0.0, math.cos(radians)]])
        found = angular_errors(vector, torch.tensor([[0.0, 0.0, 1.0]])).item()
        assert found == pytest.approx(angle, abs=2e-5)


def test_only_the_zero_vector_is_no_measurement():
    target = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])  # both sum to zero
    assert angular_errors(torch.zeros(2, 3), target).tolist() == [pytest.approx(90.0)]


def test_the_median_counts_the_ends_of_the_range():
    up = torch.tensor([[0.0, 0.0, 1.0]])
    assert MedianAngle()(up, up).item() == pytest.approx(0.0, abs=1e-3)
    assert MedianAngle()(up, -up).item() == pytest.approx(180.0, abs=1e-3)


@pytest.mark.parametrize("make", METRICS)
def test_batches_and_processes_give_the_result_of_the_whole(make):
    whole, parts, other = make(), make(), make()
    prediction, target = data(whole)
    for metric, pieces in ((whole, [slice(0, 4)]), (parts, [slice(0, 1), slice(1, 4)])):
        for piece in pieces:
            metric.update(prediction[piece], target[piece])
    torch.testing.assert_close(parts.compute(), whole.compute())
    # Two processes: their states are summed, which is what `dist_reduce_fx` says.
    one = make()
    one.update(prediction[:1], target[:1])
    other.update(prediction[1:], target[1:])
    for name in one._defaults:
        setattr(
            one,
            name,
            one._reductions[name](torch.stack([getattr(one, name), getattr(other, name)])),
        )
    one._computed = None
    torch.testing.assert_close(one.compute(), whole.compute())
    torch.testing.assert_close(pickle.loads(pickle.dumps(parts)).compute(), whole.compute())


@pytest.mark.parametrize("make", METRICS)
def test_without_a_valid_pixel_there_is_no_number(make):
    metric = make()
    prediction, target = data(metric)
    assert metric(prediction, torch.zeros_like(target)).isnan()


@pytest.mark.parametrize("make", METRICS)
def test_a_prediction_that_is_not_a_number_shows(make):
    metric = make()
    prediction, target = data(metric)
    value = metric(torch.full_like(prediction, math.nan), target)
    assert value.isnan() if metric.higher_is_better is False else value == 0


@pytest.mark.parametrize("make", METRICS)
def test_half_precision_counts_in_single(make):
    metric, single = make(), make()
    prediction, target = data(metric)
    prediction = prediction.bfloat16()
    torch.testing.assert_close(metric(prediction, target), single(prediction.float(), target))


@pytest.mark.parametrize(
    ("metric", "shapes", "message"),
    [
        (MaskedAbsoluteError(), [(2, 1, 4), (2, 4)], r"shape \(2, 4\) but found \(2, 1, 4\)"),
        (MeanAngle(), [(2, 4, 5), (2, 4, 5)], r"\(N, 3, ...\) but found \(2, 4, 5\)"),
        (MeanAngle(), [(2, 3, 4), (2, 3, 5)], r"\(N, 3, ...\) but found \(2, 3, 4\)"),
    ],
)
def test_wrong_shapes_are_refused(metric, shapes, message):
    with pytest.raises(ValueError, match=message):
        metric.update(*(torch.ones(shape) for shape in shapes))


@pytest.mark.parametrize("degrees", [0, -1, 181])
def test_a_bound_outside_the_range_is_refused(degrees):
    with pytest.raises(ValueError, match="`degrees` to be in"):
        WithinAngle(degrees)


def test_every_metric_has_a_picture():
    for make in METRICS:
        metric = make()
        metric.update(*data(metric))
        figure, _ = metric.plot()
        assert figure.axes
