"""Δp, gradient norms, cosines and conflicts: values, states, pictures and messages."""

from __future__ import annotations

import math
import pickle

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch
from torchmetrics import MetricCollection

from lightning_mtl.metrics import (
    ConflictRate,
    DeltaP,
    GradientCosine,
    GradientNorm,
    conflict_rate,
    gradient_cosines,
    gradient_norms,
)

mpl.use("Agg")

UP = {"classify": {"accuracy": True}, "depth": {"error": False, "relative": False}}
BASE = {"classify": {"accuracy": 0.8}, "depth": {"error": 0.5, "relative": 0.2}}
RUN = {"classify": {"accuracy": 0.84}, "depth": {"error": 0.45, "relative": 0.21}}
NAMES = ["a", "b", "c"]


def gramian(dtype=torch.float64, seed=0, tasks=3):
    rows = torch.randn(tasks, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (rows @ rows.T).to(dtype)


# --------------------------------------------------------------------- norms, cosines, conflicts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradient_metrics_against_the_gradients_themselves(dtype):
    rows = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).to(dtype).double()
    matrix = (rows @ rows.T).to(dtype)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    norms = rows.norm(dim=1)
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
    pairs = [cosines[i, j].item() for i, j in ((0, 1), (0, 2), (1, 2))]
    expected = torch.promote_types(dtype, torch.float32)
    assert gradient_norms(matrix).dtype == gradient_cosines(matrix).dtype == expected
    for metric, value in (
        (GradientNorm(NAMES), norms),
        (GradientCosine(NAMES), cosines),
        (ConflictRate(NAMES), torch.tensor(sum(c < 0 for c in pairs) / 3)),
    ):
        torch.testing.assert_close(metric(matrix), value.float(), atol=tolerance, rtol=tolerance)


def test_float64_states_on_demand():
    matrix = gramian()
    metrics = [metric(3).set_dtype(torch.float64) for metric in (GradientNorm, GradientCosine)]
    for metric, function in zip(metrics, (gradient_norms, gradient_cosines), strict=True):
        metric.update(matrix)
        torch.testing.assert_close(metric.compute(), function(matrix), atol=1e-15, rtol=0)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_cosines_do_not_depend_on_scale(scale):
    factors = torch.tensor([scale, 1.0, 1 / scale], dtype=torch.float64)
    matrix = gramian()
    scaled = (factors[:, None] * matrix * factors).float()
    torch.testing.assert_close(
        gradient_cosines(scaled), gradient_cosines(matrix).float(), atol=1e-5, rtol=0
    )
    assert conflict_rate(scaled) == conflict_rate(matrix)


def test_means_over_updates():
    first, second = gramian(seed=2), gramian(seed=3)
    norm, cosine, rate = (m(NAMES) for m in (GradientNorm, GradientCosine, ConflictRate))
    for matrix in (first, second):
        for metric in (norm, cosine, rate):
            metric.update(matrix)
    norms = (gradient_norms(first) + gradient_norms(second)) / 2
    cosines = (gradient_cosines(first) + gradient_cosines(second)) / 2
    torch.testing.assert_close(norm.compute(), norms.float())
    torch.testing.assert_close(cosine.compute(), cosines.float())
    assert rate.compute() == (conflict_rate(first) + conflict_rate(second)) / 2


def test_absent_tasks_are_left_out():
    whole = gramian(seed=4)
    part = torch.tensor([[4.0, -1.0], [-1.0, 9.0]])
    norm, cosine, rate = (m(NAMES) for m in (GradientNorm, GradientCosine, ConflictRate))
    for metric in (norm, cosine, rate):
        metric.update(whole)
        metric.update(part, tasks=["c", "a"])  # rows in another order
    norms, cosines = gradient_norms(whole).float(), gradient_cosines(whole).float()
    expected = torch.stack([(norms[0] + 3) / 2, norms[1], (norms[2] + 2) / 2])
    torch.testing.assert_close(norm.compute(), expected)
    expected = cosines.clone()
    expected[0, 2] = expected[2, 0] = (cosines[0, 2] - 1 / 6) / 2
    torch.testing.assert_close(cosine.compute(), expected)
    negative = int((cosines.triu(1) < 0).sum())
    assert rate.compute().item() == pytest.approx((negative + 1) / (3 + 1))


@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
def test_a_gradient_without_direction_is_not_counted(bad):
    matrix = torch.tensor([[1.0, -1.0, bad], [-1.0, 4.0, bad], [bad, bad, bad]])
    cosine, rate = GradientCosine(NAMES), ConflictRate(NAMES)
    cosine.update(matrix)
    rate.update(matrix)
    result = cosine.compute()
    torch.testing.assert_close(result[:2, :2], torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
    assert result[2].isnan().all()
    assert result[:, 2].isnan().all()
    assert rate.compute() == 1.0
    whole = torch.eye(3)
    cosine.update(whole)
    rate.update(whole)
    assert cosine.compute()[2].tolist() == [0.0, 0.0, 1.0]
    assert rate.compute().item() == 1 / 4  # one pair, then three


@pytest.mark.parametrize("square", [0.0, math.inf])
def test_a_norm_out_of_range_gives_no_cosine(square):
    """The square of a norm leaves the range of float32 before the inner products do."""
    cosines = gradient_cosines(torch.tensor([[4.0, 1.0], [1.0, square]]))
    assert cosines.isnan().tolist() == [[False, True], [True, True]]


def test_one_task_has_a_norm_and_no_pair():
    matrix = torch.tensor([[9.0]])
    for metric, value in ((GradientNorm(1), 3.0), (GradientCosine(1), 1.0)):
        assert metric(matrix).item() == value  # torchmetrics makes a scalar of one entry
        figure, _ = metric.plot()
        plt.close(figure)
    assert ConflictRate(1)(matrix).isnan()
    assert conflict_rate(matrix).isnan()


def test_a_task_that_was_never_present_is_nan():
    norm = GradientNorm(3)
    norm.update(torch.eye(2), tasks=[0, 2])
    assert norm.compute().isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("metric", [GradientNorm, GradientCosine, ConflictRate])
def test_gradient_metrics_refuse_wrong_input(metric):
    for tasks in ([], ["a", "a"], "ab", 0):
        with pytest.raises(ValueError, match=r"different task names or their number but got"):
            metric(tasks)
    two = metric(["a", "b"])
    with pytest.raises(
        ValueError, match=r"shape \(2, 2\) for the tasks \['a', 'b'\].*\(3, 3\).*J @"
    ):
        two.update(gramian())
    for tasks in (["a", "z"], ["a", "a"]):
        with pytest.raises(ValueError, match=r"out of \['a', 'b'\] but got \['a', '.'\].*Name the"):
            two.update(torch.eye(2), tasks=tasks)


# -------------------------------------------------------------------- living with torchmetrics


def test_in_a_metric_collection():
    gradients = MetricCollection(
        [GradientNorm(NAMES), GradientCosine(NAMES), ConflictRate(NAMES)], prefix="train/"
    )
    for seed in (5, 6):
        gradients.update(gramian(seed=seed), tasks=NAMES)
    result = gradients.compute()
    assert set(result) == {"train/ConflictRate", "train/GradientCosine", "train/GradientNorm"}
    alone = GradientNorm(NAMES)
    for seed in (5, 6):
        alone.update(gramian(seed=seed))
    torch.testing.assert_close(result["train/GradientNorm"], alone.compute())
    quality = MetricCollection([DeltaP(BASE, UP)], prefix="val/")
    quality.update(RUN)
    assert set(quality.compute()) == {"val/delta_p", "val/delta_p/classify", "val/delta_p/depth"}
    quality.reset()
    quality.update(BASE)
    assert quality.compute()["val/delta_p"] == 0


def filled():
    metrics = [GradientNorm(NAMES), GradientCosine(NAMES), ConflictRate(NAMES)]
    for metric in metrics:
        metric.update(gramian(seed=7))
        metric.update(torch.eye(2), tasks=["a", "b"])
    quality = DeltaP(BASE, UP)
    quality.update(RUN)
    return [*metrics, quality]


@pytest.mark.parametrize("index", range(4))
def test_pickled_cloned_and_reset(index):
    metric = filled()[index]
    more = BASE if isinstance(metric, DeltaP) else gramian(seed=8)
    copy = pickle.loads(pickle.dumps(metric))
    clone = metric.clone()
    for one in (metric, copy, clone):
        one.update(more)
    expected = metric.compute()
    torch.testing.assert_close(copy.compute(), expected)
    torch.testing.assert_close(clone.compute(), expected)
    metric.reset()
    metric.update(more)
    fresh = pickle.loads(pickle.dumps(filled()[index]))
    fresh.reset()
    torch.testing.assert_close(fresh(more), metric.compute())


@pytest.mark.parametrize("index", range(4))
def test_ranks_are_added_up(index):
    """Two ranks with two and one updates give what one process gives for the three."""
    metric = filled()[index]
    other = filled()[index]
    other.reset()
    more = BASE if isinstance(metric, DeltaP) else gramian(seed=9)
    other.update(more)
    states = {name: getattr(other, name) for name in other._defaults}
    assert all(reduction is not None for reduction in metric._reductions.values())
    synced = metric.clone()
    synced.sync(
        dist_sync_fn=lambda state, group=None: [
            state,
            next(s for n, s in states.items() if getattr(synced, n) is state),
        ],
        distributed_available=lambda: True,
    )
    metric.update(more)
    for name in states:
        torch.testing.assert_close(getattr(synced, name), getattr(metric, name))


def test_directions_for_torchmetrics():
    assert DeltaP.higher_is_better is True
    assert ConflictRate.higher_is_better is False
    assert GradientNorm.higher_is_better is GradientCosine.higher_is_better is None


# ------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("over_steps", [False, True])
def test_plot_draws_a_picture(index, over_steps, tmp_path):
    metric = filled()[index]
    val = [metric.compute(), metric.compute()] if over_steps else None
    figure, axes = metric.plot(val)
    path = tmp_path / "metric.png"
    figure.savefig(path)
    plt.close(figure)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert path.stat().st_size > 4000
    texts = " ".join(t.get_text() for t in axes.texts)
    labels = " ".join(t.get_text() for t in [*axes.get_xticklabels(), *axes.get_yticklabels()])
    if not over_steps:
        expected = [(NAMES, "2"), (NAMES, "1.00"), ([], ""), (["classify", "depth", "Δp"], "+3.75")]
        names, value = expected[index]
        assert all(name in labels for name in names)
        assert value in texts
    elif index != 2:
        named = " ".join(t.get_text() for t in axes.get_legend().get_texts())
        assert [["a b c"], ["a-b a-c b-c"], [], ["delta_p delta_p/classify delta_p/depth"]][
            index
        ] == [named]


@pytest.mark.parametrize("index", range(4))
def test_plot_on_given_axes(index):
    figure, axes = plt.subplots()
    filled()[index].plot(ax=axes)
    assert axes.has_data()
    plt.close(figure)


def test_bars_show_losses_and_gains_apart():
    metric = DeltaP(BASE, UP)
    metric.update({**RUN, "classify": {"accuracy": 0.4}})
    figure, axes = metric.plot()
    heights = [bar.get_height() for bar in axes.patches]
    colors = [bar.get_facecolor() for bar in axes.patches]
    assert heights == pytest.approx([-50, 2.5, (-50 + 2.5) / 2], abs=1e-4)
    assert colors[0] == colors[2] != colors[1]
    plt.close(figure)


def test_plot_without_matplotlib_names_the_cure(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install lightning-mtl\[plot\]"):
        filled()[0].plot()
