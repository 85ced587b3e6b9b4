"""Small molecules in the files of the package qm9pack, for the tests of `examples/molecules`."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from rdkit import Chem
from rdkit.Chem import AllChem
from torch_geometric.datasets.qm9 import HAR2EV, atomrefs

from examples.molecules.convert import COLUMNS, FILES
from examples.molecules.data import MoleculesDataModule

# Of every element, rings, an aromatic one, every kind of bond.
SMILES = (
    *("C", "N", "O", "CC", "C=C", "C#C", "C#N", "C=O", "CO", "CN", "CF", "CCO", "CC=O"),
    *("C1CC1", "C1CO1", "c1ccncc1", "c1cc[nH]c1", "OC=O", "CC#N", "NC=O", "CC(C)C", "FC(F)F"),
    *("COC", "OCCO"),
)


def rows() -> list[dict[str, str]]:
    """Molecules as the package has them: places by a force field, properties by their atoms."""
    rng = np.random.default_rng(0)
    found = []
    for number, smiles in enumerate(SMILES, start=1):
        mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
        AllChem.EmbedMolecule(mol, randomSeed=0)
        elements = [atom.GetSymbol() for atom in mol.GetAtoms()]
        row = {
            "XYZ_file": f"dsgdb9nsd_{number:06d}.xyz",
            "SMILES": smiles,
            "Elements": str(elements).replace(" ", ""),
            "XYZ_Ang": json.dumps(mol.GetConformer().GetPositions().tolist()),
            "Index": str(number),
        }
        for index, column in enumerate(COLUMNS.values()):
            row[column] = repr(round(len(elements) * (1 + index) + float(rng.normal()), 5))
        for index, column in zip((7, 8, 9, 10), list(COLUMNS.values())[10:14], strict=True):
            alone = sum(atomrefs[index]["HCNOF".index(element)] for element in elements)
            row[column] = repr(alone / HAR2EV - 0.2 * len(elements))  # so much holds it together
        found.append(row)
    return found


def package(folder: Path) -> Path:
    """The package's three files."""
    folder.mkdir(parents=True)
    found = rows()
    for number, name in enumerate(FILES):
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, fieldnames=list(found[0]))
            table.writeheader()
            table.writerows(found[8 * number : 8 * (number + 1)])
    return folder


def module(root: Path, **kwargs: Any) -> MoleculesDataModule:
    return MoleculesDataModule(root, **{"held_out": 6, "batch_size": 5, **kwargs})
