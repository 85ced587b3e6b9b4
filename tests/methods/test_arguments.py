"""Arguments of the methods: what is refused, and that the message says what, where and the cure."""

from __future__ import annotations

import pytest
import torch

from lightning_mtl.balancer import GradientBalancer
from lightning_mtl.gradient_balancers import (
    CentralDirection,
    DualBalance,
    MinNorm,
    TaskTensioner,
    central_direction_weights,
    min_norm_weights,
)
from lightning_mtl.loss_balancers import EqualWeighting, LogLoss, Scalarization

NAN = float("nan")
REFUSED = [
    (LogLoss, {"eps": -1e-8}, r"`eps` of LogLoss .* at least 0, found -1e-08"),
    (LogLoss, {"eps": "small"}, r"`eps` of LogLoss .* at least 0, found 'small'"),
    (LogLoss, {"eps": NAN}, r"`eps` of LogLoss .* found nan"),
    (Scalarization, {"weights": {}}, "at least one weight, found none"),
    (Scalarization, {"weights": []}, "at least one weight, found none"),
    (Scalarization, {"weights": {"depth": -1.0}}, r"at least 0, found -1.0 for task 'depth'"),
    (Scalarization, {"weights": [1.0, NAN]}, r"found nan for task 1"),
    (MinNorm, {"normalization": "l1"}, r"\('none', 'l2', 'loss', 'loss\+'\), found 'l1'"),
    (TaskTensioner, {"window": 0}, "`window` of TaskTensioner .* at least 1, found 0"),
    (TaskTensioner, {"window": 2.5}, "`window` of TaskTensioner .* integer .* found 2.5"),
    (TaskTensioner, {"window": True}, "`window` of TaskTensioner .* found True"),
    (TaskTensioner, {"alpha": 1.5}, r"`alpha` of TaskTensioner .* \[0, 1\], found 1.5"),
    (TaskTensioner, {"alpha": NAN}, r"`alpha` of TaskTensioner .* found nan"),
    (TaskTensioner, {"history": "median"}, r"\('mean', 'ema'\) or a function, found 'median'"),
    (TaskTensioner, {"feasibility": "yes"}, r"\('published', 'exact', 'none'\), found 'yes'"),
    (TaskTensioner, {"base": EqualWeighting()}, "from the Gramian, found EqualWeighting. Use"),
    (TaskTensioner, {"base": DualBalance()}, "from the Gramian, found DualBalance. Use"),
    (TaskTensioner, {"base": MinNorm(weight_heads=True)}, "MinNorm with `weight_heads=True`. Set"),
    (DualBalance, {"beta": 1.0}, r"`beta` of DualBalance to be in \[0, 1\), found 1.0"),
    (DualBalance, {"beta": "x"}, r"`beta` of DualBalance to be in \[0, 1\), found 'x'"),
    (DualBalance, {"eps": None}, r"`eps` of DualBalance .* at least 0, found None"),
    (Scalarization, {"weights": {"a": "x"}}, r"finite and at least 0, found 'x' for task 'a'"),
    (DualBalance, {"beta": -0.1}, r"`beta` of DualBalance to be in \[0, 1\), found -0.1"),
    (DualBalance, {"beta_sigma": -1.0}, "`beta_sigma` of DualBalance .* at least 0, found -1.0"),
    (DualBalance, {"eps": float("inf")}, "`eps` of DualBalance .* finite .* found inf"),
    (DualBalance, {"scale": "sum"}, r"\('max', .* 'constant'\), found 'sum'"),
]


@pytest.mark.parametrize(("cls", "arguments", "message"), REFUSED)
def test_refused(cls, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


@pytest.mark.parametrize("weights", [min_norm_weights, central_direction_weights])
@pytest.mark.parametrize("shape", [(2, 3), (3,), (0, 0)])
def test_gramian_must_be_square(weights, shape) -> None:
    with pytest.raises(ValueError, match=r"`gramian` of shape \(T, T\) .* found \(.*@ jacobian.T"):
        weights(torch.ones(shape))


@pytest.mark.parametrize("normalization", ["loss", "loss+"])
def test_normalization_by_losses_needs_them(normalization: str) -> None:
    with pytest.raises(ValueError, match=r"needs the task losses\. Pass `losses`"):
        min_norm_weights(torch.eye(2), normalization=normalization)
    bad = min_norm_weights(torch.eye(2), torch.tensor([1.0, 0.0]), normalization)
    assert bad.isnan().all()


def test_which_methods_need_positive_losses() -> None:
    needing = [LogLoss(), MinNorm("loss"), MinNorm("loss+"), TaskTensioner(), DualBalance()]
    free = [EqualWeighting(), MinNorm(), MinNorm("l2"), CentralDirection()]
    free += [DualBalance(loss_part=False), Scalarization([1.0])]
    assert all(balancer.requires_positive_losses for balancer in needing)
    assert not any(balancer.requires_positive_losses for balancer in free)


def test_what_the_flow_has_to_provide() -> None:
    assert not EqualWeighting().needs_current_losses
    assert not Scalarization([1.0]).needs_current_losses
    assert LogLoss().needs_current_losses
    assert DualBalance().needs_current_losses
    assert not DualBalance(loss_part=False).needs_current_losses
    assert DualBalance().needs_jacobian
    assert not DualBalance(gradient_part=False).needs_jacobian
    assert not DualBalance().gramian_weighted
    assert DualBalance(beta=0.0).gramian_weighted
    assert MinNorm(weight_heads=True).weight_heads
    assert not MinNorm().weight_heads


@pytest.mark.parametrize("balancer", [LogLoss(), DualBalance()])
def test_negative_loss_never_gets_a_weight(balancer) -> None:
    weights = balancer.loss_weights(torch.tensor([1.0, -1.0]))
    assert weights.isnan().tolist() == [False, True]


def test_tensioner_gives_no_weights_for_a_loss_without_logarithm() -> None:
    tensioner = TaskTensioner(window=1)
    for _ in range(2):
        weights = tensioner.weights(torch.eye(2), torch.tensor([1.0, 0.0]))
    assert weights.isnan().all()


def test_dual_balance_has_no_weights_while_it_averages() -> None:
    with pytest.raises(ValueError, match=r"Expected `beta=0` .* found 0\.9.*Call `direction`"):
        DualBalance().weights(torch.eye(2), torch.ones(2))


def test_history_function_must_return_one_value_a_task() -> None:
    tensioner = TaskTensioner(window=1, history=lambda window: window.mean())
    tensioner.weights(torch.eye(2), torch.ones(2))
    with pytest.raises(ValueError, match=r"`history` .* return shape \(2,\).* found \(\)"):
        tensioner.weights(torch.eye(2), torch.ones(2))


class TestScalarization:
    def test_by_name(self) -> None:
        balancer = Scalarization({"c": 3.0, "a": 2.0})
        balancer.check_tasks(["a", "b", "c"])
        with balancer.only(["a", "b", "c"]):
            assert balancer.loss_weights(torch.zeros(3)).tolist() == [2.0, 1.0, 3.0]
        with balancer.only(["a", "b", "c"], [1, 2]):
            assert balancer.loss_weights(torch.zeros(2)).tolist() == [1.0, 3.0]

    def test_list_follows_the_names_when_tasks_are_absent(self) -> None:
        balancer = Scalarization([2.0, 1.0, 3.0])
        balancer.check_tasks(["a", "b", "c"])
        with balancer.only(["a", "b", "c"], [0, 2]):
            assert balancer.loss_weights(torch.zeros(2)).tolist() == [2.0, 3.0]

    def test_list_by_hand(self) -> None:
        balancer = Scalarization([2.0, 3.0])
        weights = balancer.loss_weights(torch.zeros(2, dtype=torch.bfloat16))
        assert weights.dtype == torch.bfloat16
        assert weights.tolist() == [2.0, 3.0]
        with pytest.raises(ValueError, match=r"hold 2 losses, .* found 3\. Call `check_tasks`"):
            balancer.loss_weights(torch.zeros(3))

    def test_unknown_task(self) -> None:
        with pytest.raises(ValueError, match=r"unknown tasks \['z'\]; the tasks are \['a', 'b'\]"):
            Scalarization({"z": 1.0, "a": 2.0}).check_tasks(["a", "b"])

    def test_list_of_another_length(self) -> None:
        with pytest.raises(ValueError, match=r"3 tasks \['a', 'b', 'c'\], found 2"):
            Scalarization([1.0, 2.0]).check_tasks(["a", "b", "c"])

    def test_names_without_tasks(self) -> None:
        with pytest.raises(ValueError, match="knows no task names in this call"):
            Scalarization({"a": 2.0}).loss_weights(torch.zeros(1))


def test_from_yaml() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--balancers", type=list[GradientBalancer])
    found = parser.parse_string(
        """
        balancers:
        - class_path: lightning_mtl.gradient_balancers.TaskTensioner
          init_args: {base: {class_path: lightning_mtl.gradient_balancers.MinNorm}, history: ema}
        - class_path: lightning_mtl.gradient_balancers.TaskTensioner
        - class_path: lightning_mtl.gradient_balancers.DualBalance
          init_args: {scale: median}
        - class_path: lightning_mtl.gradient_balancers.MinNorm
          init_args: {normalization: loss+}
        """
    )
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    tensioned, default, dual, min_norm = instantiate(found).balancers
    assert type(tensioned.base) is MinNorm
    assert tensioned.history == "ema"
    assert type(default.base) is CentralDirection
    assert (default.window, default.alpha, default.feasibility) == (10, 0.3, "published")
    assert dual.scale == "median"
    assert min_norm.normalization == "loss+"
