"""Move the labels of close lines apart."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean


def spread_positions(positions: Sequence[float], gap: float) -> list[float]:
    """Move positions until neighbors are at least `gap` apart, with the least sum of squared moves.

    Isotonic regression by pooling adjacent violators (Ayer et al., 1955), on positions minus their rank times `gap`.

    Args:
        positions: preferred positions of labels, in any order.
        gap: least distance between two labels, in the same unit.

    Returns:
        New positions, in the given order.
    """
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    pools: list[list[float]] = []
    for rank, index in enumerate(order):
        pools.append([positions[index] - rank * gap])
        while len(pools) > 1 and fmean(pools[-2]) > fmean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    levels = [fmean(pool) for pool in pools for _ in pool]
    spread = {index: level + rank * gap for rank, (index, level) in enumerate(zip(order, levels, strict=True))}
    return [spread[index] for index in range(len(positions))]
