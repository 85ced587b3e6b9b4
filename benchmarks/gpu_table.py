"""The results of a run on a GPU as Markdown."""

from __future__ import annotations

from typing import Any

from report import Cell, markdown
from ways import PLAIN

HEAD = ["way", "ms a step", "least to most", "× plain PyTorch"]
COUNTS = {"launches": "launches", "waits": "waits", "to host": "to host", "to device": "to device"}


def tables(found: dict[str, Any]) -> str:
    """What was measured on, the outcome of the tests, and a table a network."""
    texts = [_machine(found), _tests(found.get("tests", {}))]
    for name, about in found.get("figures", {}).items():
        texts += [f"### {name}", _about(about), _ways(about.get("ways", {}))]
        texts += [_failures(about.get("ways", {}))]
    missing = {name: part for name, part in found["parts"].items() if part["state"] != "done"}
    for name, part in missing.items():
        texts.append(f"Not complete: {name}, {part['state']}: {part.get('why', 'it was cut off')}.")
    return "\n\n".join(text for text in texts if text)


def _machine(found: dict[str, Any]) -> str:
    of = found["machine"]
    on = (
        f"{of['gpu']}, CUDA {of['cuda']}, driver {of['driver']}" if "gpu" in of else "the processor"
    )
    versions = f"torch {of['torch']}, lightning {of['lightning']}, Python {of['python']}"
    return f"On {on}; {versions}; {found['begun'][:10]}."


def _tests(found: dict[str, Any]) -> str:
    counts = ", ".join(f"{n} {outcome}" for outcome, n in found.get("counts", {}).items() if n)
    failed = "".join(f"\n- {name}" for name in found.get("failures", {}))
    return f"Tests: {counts}.{failed}" if counts else ""


def _about(about: dict[str, Any]) -> str:
    return (
        f"P = {about['shared parameters'] / 1e6:.2f} million in {about['dtype']}, batch "
        f"{' × '.join(map(str, about['batch']))}."
    )


def _ways(ways: dict[str, Any]) -> str:
    """A row a way, with the columns that any of them has."""
    shown = {name: of for name, of in ways.items() if "ms" in of}
    if not shown:
        return ""
    counts = [key for key in COUNTS if any(of.get(key) is not None for of in shown.values())]
    memory = any(of.get("peak MB") is not None for of in shown.values())
    plain = shown.get(PLAIN)
    rows: list[list[Cell]] = []
    for name, of in shown.items():
        ms = of["ms"]
        ratio = ms["median"] / plain["ms"]["median"] if plain else None
        row: list[Cell] = [name, ms["median"], f"{ms['least']:.2f} to {ms['most']:.2f}", ratio]
        row += [of.get(key) for key in counts]
        rows.append([*row, of.get("peak MB")] if memory else row)
    head = [*HEAD, *(COUNTS[key] for key in counts), *(["peak, MB"] if memory else [])]
    return markdown(head, rows)


def _failures(ways: dict[str, Any]) -> str:
    return "\n".join(f"– {name}: {of['fails']}" for name, of in ways.items() if "fails" in of)
