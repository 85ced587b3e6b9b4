"""examples/beside.py: a comparison's table beside a printed one."""

import csv
import json

import pytest

from examples import beside

TABLE = "table 4, Office-31"


def written(folder, gains):
    """A comparison's summary with these Δp."""
    names = ["method", "kind", "plain/Accuracy mean", "delta_p mean", "delta_p std"]
    names.append("delta_p/plain mean")
    with (folder / "summary.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(names)
        table.writerow(["single-task", "single", 0.9, 0.0, 0.5, 0.0])
        for method, gain in gains.items():
            table.writerow([method, "balancer", 0.8, gain, 0.25, gain])
    return folder


def test_rows_of_both_are_set_side_by_side(tmp_path):
    folder = written(tmp_path, {"equal weighting": -2.0, "GLS": -3.0, "DB-MTL": 1.5, "other": 9.0})
    text = beside.beside(folder, [TABLE, "table 4, Office-Home"])
    lines = text.splitlines()
    assert lines[0] == "| method | plain | Δp | table 4, Office-31 | table 4, Office-Home |"
    assert lines[3] == "| equal weighting | 0.8 | -2.0 ± 0.2 | -0.61 | -0.92 |"
    assert lines[5] == "| DB-MTL | 0.8 | +1.5 ± 0.2 | +1.05 | +0.17 |"
    assert lines[6] == "| other | 0.8 | +9.0 ± 0.2 |  |  |"  # and not in the correlation
    assert "table 4, Office-31: Spearman's ρ +1.00 over 3 methods" in text


def test_the_time_of_a_step_is_shown_where_it_was_measured(tmp_path):
    written(tmp_path, {"equal weighting": -2.0, "GLS": -3.0, "DB-MTL": 1.5})
    path = tmp_path / "summary.csv"
    header, *rows = path.read_text(encoding="utf-8").splitlines()
    ratios = ["", "1.0", "", "1.456"]
    timed = [f"{row},{ratio}" for row, ratio in zip(rows, ratios, strict=True)]
    path.write_text("\n".join([f"{header},step_ratio", *timed]), encoding="utf-8")
    lines = beside.beside(tmp_path, [TABLE]).splitlines()
    assert lines[0] == "| method | plain | Δp | × equal a step | table 4, Office-31 |"
    assert lines[4] == "| GLS | 0.8 | -3.0 ± 0.2 |  | -1.63 |"
    assert lines[5] == "| DB-MTL | 0.8 | +1.5 ± 0.2 | 1.46 | +1.05 |"


def test_the_correlation_is_that_of_the_ranks(tmp_path, capsys):
    printed = beside.printed(TABLE)
    order = sorted(printed, key=printed.get)
    turned = {method: -float(rank) for rank, method in enumerate(order)}
    written(tmp_path, {{"EW": "equal weighting"}.get(m, m): v for m, v in turned.items()})
    beside.main(["--results", str(tmp_path), "--tables", TABLE])
    # Equal ranks of printed values keep it from -1 by little.
    found = capsys.readouterr().out.partition("Spearman's ρ ")[2].split()
    assert float(found[0]) == pytest.approx(-1, abs=0.01)
    assert found[2] == "20"  # MoCo has no printed Δp


def test_printed_tables_are_without_single_tasks():
    tables = json.loads(beside.PUBLISHED.read_text(encoding="utf-8"))["tables"]
    assert beside.printed("table 3")["DB-MTL"] == -58.10
    assert all("STL" not in beside.printed(table) for table in tables)


@pytest.mark.parametrize(
    ("gains", "tables", "message"),
    [
        (None, [TABLE], "summary.csv of `lightning-mtl compare"),
        ({"GLS": 1.0}, ["table 9"], "a table of ['table 1', 'table 2'"),
        ({"GLS": 1.0, "other": 2.0}, [TABLE], "three methods or more in both tables"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, gains, tables, message, capsys):
    if gains is not None:
        written(tmp_path, gains)
    with pytest.raises(SystemExit):
        beside.main(["--results", str(tmp_path), "--tables", *tables])
    assert message in capsys.readouterr().err


def test_the_interval_of_a_correlation():
    """Of 0.8 in 20 pairs; no interval where it cannot be told."""
    assert beside.interval(0.8, 20) == pytest.approx((0.5023, 0.9283), abs=1e-3)
    assert beside.interval(1.0, 20) == beside.interval(0.3, 3) == (-1.0, 1.0)


def test_metrics_of_a_task_have_their_names(tmp_path):
    with (written(tmp_path, {}) / "summary.csv").open("w", encoding="utf-8") as file:
        file.write("method,kind,a/IoU mean,a/Acc mean,b/Error mean,delta_p mean,delta_p std\n")
        file.writelines(f"{m},balancer,1,2,3,{g},\n" for g, m in enumerate(("GLS", "UW", "RLW")))
    first = beside.beside(tmp_path, [TABLE]).splitlines()[0]
    assert first == f"| method | a IoU | a Acc | b | Δp | {TABLE} |"
