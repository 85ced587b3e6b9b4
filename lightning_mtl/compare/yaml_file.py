"""A YAML file as it was when the comparison started: what runs is what the report shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped] # ships no types

from lightning_mtl.compare import CompareError
from lightning_mtl.compare.folder import content_hash
from lightning_mtl.compare.texts import shortened


class YamlFile:
    """The file's text and content, read once.

    Args:
        path: of the file.

    Attributes:
        path: of the file.
        hash: of its bytes.
        text: what it says.
        content: what that means.

    Raises:
        CompareError: no such file, not UTF-8, not YAML, or a key that one mapping has twice.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            if not Path(path).is_file():
                raise CompareError(
                    f"Expected a YAML file at {path} but found none. Check the path."
                )
            data = Path(path).read_bytes()
            self.hash = content_hash(data)
            self.text = data.decode("utf-8-sig").replace("\r\n", "\n")
            self.content = self._load()
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise CompareError(
                f"Expected {path} to be YAML in UTF-8 but found other bytes at line {line}: "
                f"{error}. Save it as UTF-8."
            ) from error
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise CompareError(
                f"Expected {shortened(path, 200)} to be YAML but could not read it: "
                f"{shortened(str(error), 600)}"
            ) from error

    def _load(self) -> Any:
        loader = yaml.SafeLoader(self.text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None
            for mapping in _mappings(root):
                self._check_keys(mapping, loader)
            return loader.construct_document(root)
        finally:
            loader.dispose()

    def _check_keys(self, mapping: Any, loader: Any) -> None:
        """YAML lets the later of two equal keys replace the earlier without a word."""
        lines: dict[str, int] = {}
        for key, _ in mapping.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            # as text: `1` and `"1"` name the same method
            name = str(loader.construct_object(key, deep=True))
            if name in lines:
                raise CompareError(
                    f"Expected every name once in {self.path} but found `{shortened(name, 100)}` "
                    f"at line {lines[name]} and again at line {line}, where it would replace the "
                    f"first. Rename or remove one of them."
                )
            lines[name] = line


def _mappings(root: Any) -> Iterator[Any]:
    """All mappings of a document; through aliases they may even hold themselves."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            yield node
            waiting += [inner for pair in reversed(node.value) for inner in reversed(pair)]
        elif isinstance(node, yaml.SequenceNode):
            waiting += reversed(node.value)
