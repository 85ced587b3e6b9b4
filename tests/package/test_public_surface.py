"""What users can name stays: public names, attributes, arguments and their defaults."""

from __future__ import annotations

import json

from tests.package.public_surface import PATH, surface


def test_public_names_attributes_and_arguments_are_those_on_record() -> None:
    known, found = json.loads(PATH.read_text()), surface()
    hint = "where this is meant, write the record anew: python -m tests.package.public_surface"
    assert found.keys() == known.keys(), hint
    for name, attributes in known.items():
        assert found[name] == attributes, f"{name}: {hint}"
