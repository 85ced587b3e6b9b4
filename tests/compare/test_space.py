"""What an entry may try: faults are named with their cure, and settings go where they are meant."""

from __future__ import annotations

import pytest

from lightning_mtl.compare import CompareError
from lightning_mtl.compare.tuning.settings import arguments, described, with_settings
from lightning_mtl.compare.tuning.space import read_space

LR = {"low": 0.001, "high": 0.1, "log": True}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"gird": {}}, r"`m` to hold some of callbacks, .* found `gird`. Did you mean `grid`\?"),
        ({"grid": {"a": [1]}, "search": {"a": LR}}, "`grid` or `search` but found both"),
        ({"grid": {"a": 1}}, r"to map keys to lists of values"),
        ({"grid": {"a": []}}, r"to map keys to lists of values"),
        ({"grid": []}, "to hold a point but found none"),
        ({"grid": {"a": [1]}, "trials": 3}, "`trials` of `m` beside a `search`"),
        ({"grid": {"seed_everything": [1]}}, "`seed_everything`, which has to be the same for all"),
        ({"grid": {3: [1]}}, "but found `3`"),
        ({"search": {"a": LR}}, "`trials` of `m` to be a number from 1 on"),
        ({"search": {"a": LR}, "trials": True}, "found True"),
        ({"search": {"a": LR}, "trials": 0}, "found 0"),
        ({"search": {}, "trials": 3}, "to map keys to ranges"),
        ({"search": {"a": {"low": 1}}, "trials": 3}, "`a` in the `search` of `m`"),
        ({"search": {"a": {"low": 1, "high": 1}}, "trials": 3}, "low 1.0 and high 1.0"),
        ({"search": {"a": {**LR, "low": 0}}, "trials": 3}, "above 0 as `log` needs it"),
        ({"search": {"a": {**LR, "low": "x"}}, "trials": 3}, "could not convert"),
        ({"search": {"a": {**LR, "lgo": 1}}, "trials": 3}, "'lgo'"),
        ({"search": {"a": {"low": 0, "high": float("inf")}}, "trials": 3}, "high inf"),
        ({"search": {"a": [{}]}, "trials": 3}, "Lists and mappings go into a `grid`"),
    ],
)
def test_faults_are_named(entry: dict, message: str):
    with pytest.raises(CompareError, match=message):
        read_space("m", entry)


def test_a_grid_is_a_product_and_a_list_of_grids_their_union():
    space = read_space("m", {"grid": [{"a": [1, 2], "b": ["x", "y"]}, {"c": [None]}]})
    assert space is not None
    assert space.points == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
        {"c": None},
    ]
    assert space.trials == 5
    assert list(space.extremes()) == [{"a": 1}, {"a": 2}, {"b": "x"}, {"b": "y"}, {"c": None}]


def test_a_search_reads_numbers_that_yaml_takes_for_words():
    entry = {"search": {"a": {"low": "1e-3", "high": 1}, "n": {"low": 1, "high": 9, "int": True}}}
    space = read_space("m", {**entry, "trials": 3})
    assert space is not None
    assert space.ranges["a"] == {"low": 0.001, "high": 1.0, "log": False, "int": False}
    assert space.ranges["n"]["low"] == 1
    assert list(space.extremes()) == [{"a": 0.001}, {"a": 1.0}, {"n": 1}, {"n": 9}]


def test_settings_reach_the_arguments_they_name():
    specs = [
        {"class_path": "LogLoss"},
        {"class_path": "TaskTensioner", "init_args": {"base": {"class_path": "MinNorm"}}},
        {"class_path": "Scalarization"},
    ]
    settings = {
        "callbacks.1.base.normalization": "l2",
        "callbacks.2.weights.depth": 3.0,
        "model.lr": 0.01,
        "trainer.gradient_clip_val": None,
        "model.kind": "wide",
    }
    changed = with_settings(specs, settings)
    assert changed[0] == specs[0]
    base = {"class_path": "MinNorm", "init_args": {"normalization": "l2"}}
    assert changed[1] == {"class_path": "TaskTensioner", "init_args": {"base": base}}
    assert changed[2]["init_args"] == {"weights": {"depth": 3.0}}
    assert "init_args" not in specs[2]  # the file's own stay as they are
    given = ["--model.lr=0.01", "--trainer.gradient_clip_val=null", "--model.kind=wide"]
    assert arguments(settings) == given
    assert described({}) == "as in the file"
    assert described({"a": 0.123456, "w": {"x": 2.0}}) == "a 0.1235, w {x: 2}"


@pytest.mark.parametrize("key", ["callbacks.1.a", "callbacks.x.a", "callbacks.0", "callbacks.-1.a"])
def test_a_callback_that_is_not_there(key: str):
    with pytest.raises(CompareError, match="found no callback of that number"):
        with_settings([{"class_path": "MinNorm"}], {key: 1})


def test_a_way_that_leads_nowhere():
    specs = [{"class_path": "Every", "init_args": {"n": 3}}]
    with pytest.raises(CompareError, match="`n` holds 3"):
        with_settings(specs, {"callbacks.0.n.m": 1})
