"""Tables of what stiffness gives, and what its criteria say: see `lifelong_properties`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

from clstream.experiments.pretrained_features import interval

Row = dict[str, Any]


def in_most(values: Iterable[bool]) -> str:
    """Return whether something is so in at least four of five seeds, and in how many."""
    answers = list(values)
    return f"{'holds' if sum(answers) >= math.ceil(0.8 * len(answers)) else 'FAILS'} ({sum(answers)} of {len(answers)} seeds)"


def verdicts(name: str, of: dict[str, list[Row]]) -> list[str]:
    """Return what the criteria of a property say; `of` is `by_method`."""
    if name == "non-forgetting":
        large = [not row["same"] for row in of["1e6"]]
        return [
            f"same bits with infinity: {sum(row['same'] for row in of['infinity'])} of {len(large)} seeds",
            f"and not with 1e6: {sum(large)} of {len(large)} seeds",
        ]
    if name == "forward":
        ways = [[statistics.mean(map(math.log2, row["samples"][1:])) for row in of[method]] for method in ("fresh", "nearest_task")]
        gains = [fresh - near for fresh, near in zip(*ways, strict=True)]
        return [f"forward transfer {in_most(gain > 0 for gain in gains)}: log2 of the ratio {interval(gains)}"]
    if name == "backward":
        changes, plain = ([row["given"] for row in of[method]] for method in ("b = 0.01", "b = 0"))
        return [
            f"backward transfer {in_most(change > 0 for change in changes)}: {interval(changes)}",
            f"stiffness helps {in_most(a > b for a, b in zip(changes, plain, strict=True))}",
        ]
    if name == "confusion":
        fallen = sum(row["accuracy_before"] - row["accuracy_after"] > 0.01 for row in of["pair"])
        return [
            f"the pair's error falls, which {in_most(row['error_after'] < row['error_before'] for row in of['pair'])}",
            f"the accuracy over four classes falls by more than 0.01 in {fallen} seeds: {'FAILS' if fallen > 1 else 'holds'}",
        ]
    if name == "few-shot":
        near, fresh = ([row["given"] for row in of[method]] for method in ("nearest_class", "fresh"))
        return [
            f"few-shot start {in_most(a > b for a, b in zip(near, fresh, strict=True))}: {interval(near)} and {interval(fresh)}"
        ]
    if name == "graceful":
        steps = [max(a - b for a, b in zip(row["given"], row["given"][1:6], strict=False)) for row in of["Fisher"]]
        return [f"no cliff up to a half, which {in_most(step <= 0.05 for step in steps)}: the greatest step {interval(steps)}"]
    return []


def table(name: str, rows: list[Row]) -> str:
    """Return a property's Markdown table: means over seeds, of single numbers with 95 % confidence intervals."""
    of = by_method(name, rows)
    columns = [column for column in next(iter(of.values()))[0] if column not in ("property", "seed", "method", "pair")]
    lines = [f"| {name} | {' | '.join(column.replace('_', ' ') for column in columns)} |", "|---|" + "---|" * len(columns)]
    for method, own in of.items():
        cells = []
        for column in columns:
            values = [row[column] for row in own]
            if isinstance(values[0], list):
                cells.append(" ".join(f"{statistics.mean(part):.3g}" for part in zip(*values, strict=True)))
            else:
                cells.append(f"{values[0]:.3g}" if len(set(values)) == 1 else interval(values))
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_method(name: str, rows: list[Row]) -> dict[str, list[Row]]:
    """Return the rows of a property by method, in the order of seeds."""
    of: dict[str, list[Row]] = {}
    for row in sorted((row for row in rows if row["property"] == name), key=lambda row: int(row["seed"])):
        of.setdefault(row["method"], []).append(row)
    return of
