"""QM9: eleven properties of a molecule from its atoms and where they are."""
