"""examples/molecules: QM9's files from the package's, PyTorch Geometric's loader, bad files."""

import shutil

import pytest
import torch
import torch_geometric.transforms as transforms
from rdkit import Chem
from torch_geometric.data import Batch
from torch_geometric.datasets import QM9
from torch_geometric.datasets.qm9 import HAR2EV
from torch_geometric.utils import remove_self_loops

from examples.molecules import convert
from examples.molecules.data import TARGETS
from examples.molecules.graphs import completed, with_lengths
from tests.examples.molecules import SMILES, module, package, rows


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return package(tmp_path_factory.mktemp("package") / "data")


@pytest.fixture(scope="module")
def root(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("qm9") / "data"
    assert convert.write(out, source) == 0
    module(out).prepare_data()
    return out


@pytest.fixture
def copy(root, tmp_path):
    """Files that a test may spoil, unprocessed."""
    return shutil.copytree(root, tmp_path / "copy", ignore=shutil.ignore_patterns("processed"))


# ------------------------------------------------------------ from the package


def test_molecules_are_those_of_the_package(root):
    dataset = QM9(str(root))
    assert len(dataset) == len(SMILES) == 24
    for data, smiles, row in zip(dataset, SMILES, rows(), strict=True):
        read = Chem.RemoveHs(Chem.MolFromSmiles(data.smiles))
        assert Chem.MolToSmiles(read, isomericSmiles=False) == Chem.CanonSmiles(smiles)
        assert data.name == row["XYZ_file"].removesuffix(".xyz")
        elements = ["HCNOF"[i] for i in data.x[:, :5].argmax(dim=1)]
        assert str(elements).replace(" ", "") == row["Elements"]
        places = torch.tensor(convert.read("here", row).places, dtype=torch.float32)
        torch.testing.assert_close(data.pos, places, atol=6e-5, rtol=0)  # four digits in the file


def test_targets_are_in_the_units_of_the_table(root):
    y = torch.cat([data.y for data in QM9(str(root))]).double()
    values = [convert.read("here", row).values for row in rows()]
    units = {"mu": 1, "alpha": 1, "HOMO": HAR2EV, "LUMO": HAR2EV, "R2": 1, "ZPVE": HAR2EV, "cv": 1}
    for task, unit in units.items():
        expected = torch.tensor([v[task.lower()] * unit for v in values], dtype=torch.float64)
        torch.testing.assert_close(y[:, TARGETS[task][0]], expected, atol=0, rtol=1e-6)
    atoms = torch.tensor([len(data.z) for data in QM9(str(root))], dtype=torch.float64)
    for task in ("U0", "U", "H", "G"):  # of atomisation: without the energies of atoms alone
        expected = -0.2 * HAR2EV * atoms
        torch.testing.assert_close(y[:, TARGETS[task][0]], expected, atol=0, rtol=1e-5)


def test_methane_has_its_published_energy_of_atomisation():
    # The first lines of the package's file and of QM9's own table.
    values = dict.fromkeys(convert.COLUMNS, 0.0)
    values |= {"u0": -40.47893, "u298": -40.476062, "h298": -40.475117, "g298": -40.498597}
    methane = convert.Molecule("", "C", ["C", "H", "H", "H", "H"], None, values)
    energies = [float(value) for value in convert.table_row(methane)[-4:]]
    published = [-395.999594594, -398.643290011, -401.014646522, -372.471772148]
    assert energies == pytest.approx(published, rel=1e-6)


def test_a_molecule_whose_smiles_is_of_another_is_left_out(source, tmp_path, capsys):
    other = shutil.copytree(source, tmp_path / "other")
    path = other / convert.FILES[0]
    path.write_text(path.read_text().replace(",C=C,", ",C#C,").replace(",C=O,", ",CO,"))
    convert.main(["--out", str(tmp_path / "out"), "--source", str(other)])
    assert "2 molecules were left out" in capsys.readouterr().out
    assert len((tmp_path / "out/raw/gdb9.sdf.csv").read_text().splitlines()) == 1 + 22
    module(tmp_path / "out").prepare_data()
    assert len(QM9(str(tmp_path / "out"))) == 22


def test_a_draw_is_the_same_whenever_its_seed_is(source, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        convert.write(tmp_path / name, source, count=10, seed=seed)
    one, two, three = ((tmp_path / n / "raw/gdb9.sdf").read_text() for n in ("one", "two", "three"))
    assert one == two != three
    assert one.count("$$$$") == 10


BAD_PACKAGE = {
    "missing": (lambda folder: (folder / convert.FILES[1]).unlink(), "qm9_part2.csv, of the"),
    "no column": (
        lambda folder: change(folder, "Dipole_debye", "Dipole"),
        r"columns \['Dipole_debye'\] in .*qm9_part1.csv",
    ),
    "no number": (
        lambda folder: change(folder, ",2,", ",2,", "dsgdb9nsd_000002.xyz,N,", "x,N,", cut=True),
        r"line 3 of .*qm9_part1.csv but found",
    ),
    "another element": (
        lambda folder: change(folder, "['N',", "['P',"),
        r"line 3 of .*qm9_part1.csv but found the elements \['P'\]",
    ),
    "an atom too many": (
        lambda folder: change(folder, "['O',", "['O','H',"),
        r"line 4 of .* but found places of shape \(3, 3\) for 4 atoms",
    ),
}


def change(folder, *pairs, cut=False):
    path = folder / convert.FILES[0]
    text = path.read_text()
    for before, after in zip(pairs[::2], pairs[1::2], strict=True):
        text = text.replace(before, after)
    if cut:
        lines = text.splitlines()
        lines[2] = lines[2].rpartition(",")[0] + ",much"
        text = "\n".join(lines)
    path.write_text(text)


@pytest.mark.parametrize("case", BAD_PACKAGE)
def test_a_bad_file_of_the_package_is_named(source, tmp_path, case):
    spoil, message = BAD_PACKAGE[case]
    folder = shutil.copytree(source, tmp_path / "package")
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert.write(tmp_path / "out", folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "`count` from 1 to 24 but found 0"),
        (["--count", "25"], "`count` from 1 to 24 but found 25"),
        (["--source", "nowhere"], "of the package qm9pack, but found no file"),
        (None, "to be a new or empty folder"),
    ],
)
def test_what_cannot_be_written_is_refused(source, root, tmp_path, arguments, message, capsys):
    out = root if arguments is None else tmp_path / "out"
    with pytest.raises(SystemExit):
        convert.main(["--out", str(out), "--source", str(source), *(arguments or [])])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps qm9pack"):
        convert.write(tmp_path / "out")


# ---------------------------------------------------------------------- graphs


def complete_as_published(data):
    """One molecule at a time, as in PyTorch Geometric's example of message passing on QM9."""
    n = data.num_nodes
    row = torch.arange(n).view(-1, 1).repeat(1, n).view(-1)
    column = torch.arange(n).repeat(n)
    attributes = data.edge_attr.new_zeros(n * n, data.edge_attr.shape[1])
    attributes[data.edge_index[0] * n + data.edge_index[1]] = data.edge_attr
    edges, attributes = remove_self_loops(torch.stack([row, column]), attributes)
    data = data.clone()
    data.edge_index, data.edge_attr = edges, attributes
    return transforms.Distance(norm=False)(data)


def test_edges_are_those_of_the_published_transform(root):
    dataset = QM9(str(root))
    expected = Batch.from_data_list([complete_as_published(data) for data in dataset])
    before = Batch.from_data_list(list(dataset))
    found = with_lengths(completed(before))
    assert torch.equal(found.edge_index, expected.edge_index)
    assert torch.equal(found.edge_attr, expected.edge_attr)
    assert before.edge_attr.shape[1] == 4  # a copy


# ----------------------------------------------------------------- data module


def test_targets_are_standardised_over_all_molecules(root):
    data = module(root)
    data.setup()
    raw = torch.cat([d.y for d in QM9(str(root))])
    seen = []
    for part in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for batch in part:
            graphs, targets = data.on_after_batch_transfer(batch, 0)
            assert graphs.edge_attr.shape[1] == 5
            assert list(targets) == list(TARGETS)
            seen.append((batch.idx, targets))
    order = torch.cat([index for index, _ in seen])
    assert order.sort().values.tolist() == list(range(24))
    for task, (column, scale) in TARGETS.items():
        values = torch.cat([targets[task] for _, targets in seen])
        assert values.mean().item() == pytest.approx(0, abs=1e-5)
        assert values.std().item() == pytest.approx(1, abs=1e-5)
        assert data.deviation[task] == pytest.approx(scale * raw[:, column].std().item(), rel=1e-5)
        expected = (raw[order, column] - raw[:, column].mean()) / raw[:, column].std()
        torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-4)


def test_bonds_alone_are_an_option(root):
    data = module(root, complete=False)
    data.setup()
    batch = next(iter(data.val_dataloader()))
    graphs, _ = data.on_after_batch_transfer(batch, 0)
    assert torch.equal(graphs.edge_index, batch.edge_index)
    assert torch.equal(graphs.edge_attr[:, :4], batch.edge_attr)


def numbers(data, part):
    return [int(molecule.idx) for molecule in data.parts[part]]


def test_the_published_permutation_divides_the_molecules(root, tmp_path):
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    torch.save(order, tmp_path / "random_split.t")
    data, own, again = module(root, split=tmp_path / "random_split.t"), module(root), module(root)
    for one in (data, own, again):
        one.setup()
    parts = [numbers(data, part) for part in ("test", "val", "train")]
    assert parts == [order[:6].tolist(), order[6:12].tolist(), order[12:].tolist()]
    assert numbers(own, "test") == numbers(again, "test") != parts[0]


def spoil_table(text):
    lines = text.splitlines()
    parts = lines[3].split(",")
    parts[4] = "nan"
    lines[3] = ",".join(parts)
    return "\n".join(lines) + "\n"


BAD_FILES = {
    "missing file": (
        lambda raw: (raw / "gdb9.sdf.csv").unlink(),
        FileNotFoundError,
        r"the files .* in .*raw but did not find \['gdb9.sdf.csv'\].*download.*convert",
    ),
    "missing folder": (shutil.rmtree, FileNotFoundError, r"did not find \['gdb9.sdf', "),
    "rows are missing": (
        lambda raw: (raw / "gdb9.sdf.csv").write_text("mol_id\n"),
        ValueError,
        r"as many rows of gdb9.sdf.csv as molecules of gdb9.sdf, but PyTorch Geometric cannot",
    ),
    "molecules cut off": (
        lambda raw: (raw / "gdb9.sdf").write_text("oops\n"),
        ValueError,
        r"QM9's files in .*raw",
    ),
    "not a number": (
        lambda raw: (raw / "gdb9.sdf.csv").write_text(
            spoil_table((raw / "gdb9.sdf.csv").read_text())
        ),
        ValueError,
        r"finite targets in .*gdb9.sdf.csv but found \[nan.* for molecule 2",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_before_training(copy, case):
    spoil, error, message = BAD_FILES[case]
    spoil(copy / "raw")
    with pytest.raises(error, match=message):
        module(copy).setup()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.arange(23), r"permutation of the 24 molecules in .*split.t but found shape \(23,\)"),
        (torch.zeros(24, dtype=torch.long), "permutation of the 24 molecules"),
        ("oops", "a tensor in .*split.t"),
        (None, "permutation of the molecules in .*split.t but found no file"),
    ],
)
def test_a_bad_permutation_is_named(root, tmp_path, content, message):
    path = tmp_path / "split.t"
    if isinstance(content, torch.Tensor):
        torch.save(content, path)
    elif content is not None:
        path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        module(root, split=path).setup()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"held_out": 0}, "`held_out` to be at least 1"),
        ({"batch_size": 0}, "`batch_size` to be at least 1"),
        ({"held_out": 12}, "more than 24 molecules in .* but found 24"),
    ],
)
def test_wrong_arguments_are_refused(root, kwargs, message):
    with pytest.raises(ValueError, match=message):
        module(root, **kwargs).setup()
