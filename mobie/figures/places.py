"""Where a text stands beside a point so that it hides nothing: pixels only, the same every time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: directions in which a text may stand from its point, the first that is free is taken: right, left, up, down, …
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8))


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels around a centre."""

    x: float
    y: float
    width: float
    height: float

    def overlap(self, other: Box) -> float:
        """Area shared with another."""
        across = (self.width + other.width) / 2 - abs(self.x - other.x)
        up = (self.height + other.height) / 2 - abs(self.y - other.y)
        return max(0.0, across) * max(0.0, up)


def free_place(
    spot: tuple[float, float],
    size: tuple[float, float],
    taken: Sequence[Box],
    frame: tuple[float, float, float, float],
    pixel: float,
) -> Box:
    """The nearest box around a spot that overlaps nothing, in a fixed order of directions; else the least bad one."""
    left, bottom, right, top = frame
    candidates: list[Any] = []
    for reach in (1.0, 2.2, 3.4, 4.6):
        for across, up in DIRECTIONS:
            x = spot[0] + across * (3.4 * pixel + size[0] / 2) * reach
            y = spot[1] + up * (3.4 * pixel + size[1] / 2) * reach
            box = Box(x, y, *size)
            inside = left <= x - size[0] / 2 and x + size[0] / 2 <= right and bottom <= y - size[1] / 2
            if inside and y + size[1] / 2 <= top:
                hidden = sum(box.overlap(other) for other in taken)
                if hidden == 0:
                    return box
                candidates.append((hidden, len(candidates), box))
    return min(candidates)[2] if candidates else Box(*spot, *size)
