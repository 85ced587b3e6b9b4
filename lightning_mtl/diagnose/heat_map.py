"""A heat map as inline SVG: where in the network tasks part."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from lightning_mtl.compare.texts import name as short

_LEFT, _TOP, _HEIGHT, _LETTER = 230, 165, 26, 7.2
_RIGHT = 130  # for the last name, which leans over
_LEAST = 0.1  # the range of colours, where all cosines are smaller


def heat_map(
    rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[float | None]], label: str
) -> str:
    """Cosines in colours: red below zero, blue above, grey where there is none.

    Args:
        rows: names of the rows.
        columns: names of the columns, written upwards.
        cells: a row of numbers for every row; ``None`` for none.
        label: what it shows, for those who do not see it.
    """
    numbers = [abs(c) for row in cells for c in row if c is not None]
    most = max([_LEAST, *numbers])
    width = 52 if len(columns) <= 14 else max(14, 728 // len(columns))
    total = _LEFT + width * len(columns) + _RIGHT, _TOP + _HEIGHT * len(rows) + 10
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(label)}" '
            f'viewBox="0 0 {total[0]} {total[1]}" width="{total[0]}" height="{total[1]}" '
            f'font-family="system-ui, sans-serif" font-size="12">'
        )
    ]
    for j, column in enumerate(columns):
        x, y = _LEFT + width * j + width / 2 + 4, _TOP - 8
        text = escape(short(column, 26))
        parts.append(f'<text x="{x}" y="{y}" transform="rotate(-50 {x} {y})">{text}</text>')
    for i, (row, values) in enumerate(zip(rows, cells, strict=True)):
        y = _TOP + _HEIGHT * i
        text = escape(short(row, int(_LEFT / _LETTER)))
        parts.append(
            f'<text x="{_LEFT - 8}" y="{y + _HEIGHT * 0.66}" text-anchor="end">{text}</text>'
        )
        for j, value in enumerate(values):
            x = _LEFT + width * j
            shown = "–" if value is None else f"{value:.2f}"
            title = escape(f"{row}, {columns[j]}: {shown}")
            parts.append(
                f'<rect x="{x}" y="{y}" width="{width - 1}" height="{_HEIGHT - 1}" '
                f'fill="{colour(value, most)}"><title>{title}</title></rect>'
            )
            if width >= 40:
                ink = "#fff" if value is not None and abs(value) > 0.6 * most else "#1c1c1c"
                parts.append(
                    f'<text x="{x + width / 2}" y="{y + _HEIGHT * 0.66}" text-anchor="middle" '
                    f'fill="{ink}" pointer-events="none">{shown}</text>'
                )
    return "".join(parts) + "</svg>"


def colour(value: float | None, most: float) -> str:
    """From red at ``-most`` over white to blue at ``most``; grey for ``None``."""
    if value is None:
        return "#e4e4e4"
    part = min(1.0, abs(value) / most)
    end = (178, 24, 43) if value < 0 else (33, 102, 172)
    mixed = (round(255 + part * (c - 255)) for c in end)
    return "#" + "".join(f"{c:02x}" for c in mixed)
