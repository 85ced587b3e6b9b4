"""QM9 from the package qm9pack, written in the files that PyTorch Geometric reads.

``python -m examples.molecules.convert --out FOLDER`` writes ``FOLDER/raw``. The package holds the
130,831 molecules of Ramakrishnan, Dral, Rupp and von Lilienfeld, *Quantum chemistry structures and
properties of 134 kilo molecules*, Scientific Data 1, 2014, without the 3,054 whose structure did
not converge: their SMILES, the places of their atoms, and their properties, in the published units.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rdkit import Chem
from rdkit.Geometry import Point3D
from torch_geometric.datasets.qm9 import HAR2EV, KCALMOL2EV, atomrefs

FILES = ("qm9_part1.csv", "qm9_part2.csv", "qm9_part3.csv")
# PyTorch Geometric's column of a property: the package's. Its file has A, B and C first.
COLUMNS = {
    "A": "RotA_GHz",
    "B": "RotB_GHz",
    "C": "RotC_GHz",
    "mu": "Dipole_debye",
    "alpha": "Polarizability_bohr3",
    "homo": "HOMO_au",
    "lumo": "LUMO_au",
    "gap": "HOMO_LUMO_gap_au",
    "r2": "R2_bohr2",
    "zpve": "ZPVE_au",
    "u0": "InternalEnergy_0K_au",
    "u298": "InternalEnergy_298K_au",
    "h298": "Enthalphy_298K_au",
    "g298": "GibbsFreeEnergy_298K_au",
    "cv": "Heatcapacity_Cv_cal_mol_K",
}
# Of atoms alone, by column: their energies in eV for H, C, N, O, F, from PyTorch Geometric.
ATOMS = {"u0": atomrefs[7], "u298": atomrefs[8], "h298": atomrefs[9], "g298": atomrefs[10]}
ELEMENTS = ("H", "C", "N", "O", "F")
HEADER = (*("mol_id", *COLUMNS), *(f"{name}_atom" for name in ATOMS))


class Molecule(NamedTuple):
    """A molecule of the package."""

    name: str
    smiles: str
    elements: list[str]
    places: np.ndarray  # (A, 3), Ångström
    values: dict[str, float]  # by the names of `COLUMNS`


def package_folder() -> Path:
    """The data folder of qm9pack, which is not imported: it wants more than its files need."""
    spec = importlib.util.find_spec("qm9pack")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "Expected the package qm9pack but it is not installed. "
            "`pip install --no-deps qm9pack` (104 MB), or give `--source FOLDER`."
        )
    return Path(spec.submodule_search_locations[0]) / "data"


def rows(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """All rows of the package's files, in the order of QM9's numbers, each with where it stands.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a column is missing.
    """
    wanted = ("XYZ_file", "SMILES", "Elements", "XYZ_Ang", *COLUMNS.values())
    for name in FILES:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"Expected {path}, of the package qm9pack, but found no file.")
        with path.open(encoding="utf-8", newline="") as file:
            found = csv.DictReader(file)
            if missing := sorted(set(wanted) - set(found.fieldnames or ())):
                raise ValueError(f"Expected the columns {missing} in {path} but found none.")
            for row in found:
                yield f"line {found.line_num} of {path}", {key: row[key] for key in wanted}


def read(where: str, row: dict[str, str]) -> Molecule:
    """The molecule of a row.

    Raises:
        ValueError: what cannot be one; names file and line.
    """
    try:
        places = np.array(json.loads(row["XYZ_Ang"]), dtype=float)
        elements = json.loads(row["Elements"].replace("'", '"'))
        values = {name: float(row[column]) for name, column in COLUMNS.items()}
        if not set(elements) <= set(ELEMENTS):
            raise ValueError(f"the elements {sorted(set(elements) - set(ELEMENTS))}")
        if places.shape != (len(elements), 3):
            raise ValueError(f"places of shape {places.shape} for {len(elements)} atoms")
        if not np.isfinite([*places.flat, *values.values()]).all():
            raise ValueError("a number that is not finite")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Expected a molecule in {where} but found {error}. Install the package again."
        ) from error
    return Molecule(row["XYZ_file"].removesuffix(".xyz"), row["SMILES"], elements, places, values)


def bonded(molecule: Molecule) -> Chem.Mol | None:
    """The molecule with its bonds and places, ``None`` where SMILES and atoms do not agree.

    Heavy atoms stand in the order of the SMILES, in both; a hydrogen belongs to the nearest of
    them, and each must have as many as the SMILES says.
    """
    mol = Chem.MolFromSmiles(molecule.smiles)
    if mol is None:
        return None
    Chem.Kekulize(mol, clearAromaticFlags=True)
    heavy = [i for i, element in enumerate(molecule.elements) if element != "H"]
    if [molecule.elements[i] for i in heavy] != [atom.GetSymbol() for atom in mol.GetAtoms()]:
        return None
    counts = [atom.GetTotalNumHs() for atom in mol.GetAtoms()]
    whole = Chem.RWMol(mol)
    for atom in whole.GetAtoms():
        atom.SetNoImplicit(True)
        atom.SetNumExplicitHs(0)
    order = list(heavy)
    owned = [0] * len(heavy)
    for index, element in enumerate(molecule.elements):
        if element != "H":
            continue
        distances = np.linalg.norm(molecule.places[heavy] - molecule.places[index], axis=1)
        owner = int(distances.argmin())
        owned[owner] += 1
        whole.AddBond(owner, whole.AddAtom(Chem.Atom("H")), Chem.BondType.SINGLE)
        order.append(index)
    if owned != counts:
        return None
    conformer = Chem.Conformer(len(order))
    for place, index in enumerate(order):
        conformer.SetAtomPosition(place, Point3D(*molecule.places[index].tolist()))
    whole.AddConformer(conformer, assignId=True)
    # In the order of the package's file, which is that of QM9's own.
    found = Chem.RenumberAtoms(whole.GetMol(), np.argsort(order).tolist())
    found.SetProp("_Name", molecule.name)
    return found


def table_row(molecule: Molecule) -> list[str]:
    """The line of QM9's table: with energies of atomisation, in kcal/mol."""
    found = [f"{molecule.values[name]!r}" for name in COLUMNS]
    for name, energies in ATOMS.items():
        alone = sum(energies[ELEMENTS.index(element)] for element in molecule.elements)
        found.append(repr((molecule.values[name] * HAR2EV - alone) / KCALMOL2EV))
    return found


def write(out: Path, source: Path | None = None, count: int | None = None, seed: int = 0) -> int:
    """Write ``out/raw/{gdb9.sdf,gdb9.sdf.csv,uncharacterized.txt}``.

    Args:
        out: a new folder.
        source: the folder of the package's CSV files; by default the installed package's.
        count: how many molecules, drawn at random; all of them by default.
        seed: of the draw.

    Returns:
        How many were left out, because SMILES and atoms do not agree.

    Raises:
        FileExistsError: there is something in ``out`` already.
        FileNotFoundError: no such package or file.
        ValueError: a file that is not the package's; ``count`` out of range.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(
            f"Expected {out} to be a new or empty folder but found something there. Give another "
            f"`--out`, or remove it first."
        )
    found = list(rows(package_folder() if source is None else source))
    if count is not None:
        if not 1 <= count <= len(found):
            raise ValueError(f"Expected `count` from 1 to {len(found)} but found {count}.")
        chosen = np.random.default_rng(seed).permutation(len(found))[:count]
        found = [found[i] for i in np.sort(chosen)]
    raw = out / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    left_out = 0
    lines = [",".join(HEADER)]
    with Chem.SDWriter(str(raw / "gdb9.sdf")) as file:
        for where, row in found:
            molecule = read(where, row)
            mol = bonded(molecule)
            if mol is None:
                left_out += 1
                continue
            file.write(mol)
            lines.append(
                ",".join([molecule.name.replace("dsgdb9nsd", "gdb"), *table_row(molecule)])
            )
    (raw / "gdb9.sdf.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    # Its reader skips nine lines at the top and two at the end; all molecules are characterised.
    (raw / "uncharacterized.txt").write_text("\n" * 10, encoding="utf-8")
    return left_out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m examples.molecules.convert", description="Write QM9 from the package qm9pack."
    )
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--source", type=Path, help="CSV files (default: of the package)")
    parser.add_argument("--count", type=int, help="molecules (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(arguments))
    try:
        left_out = write(**options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if left_out:
        print(f"{left_out} molecules were left out: their SMILES and their atoms do not agree.")


if __name__ == "__main__":
    main()
