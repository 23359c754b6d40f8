"""Tables of a comparison: for the terminal, LaTeX, Markdown, CSV and pandas."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from clstream.comparison.comparisons import Cell, Comparison, Difference
from clstream.comparison.labels import StreamKey
from clstream.comparison.statistics import cliques

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import Console

MOST_LINES = 10
"""Pairs that each have a line of their own in what is printed; of more there is a line for each method."""


def numbers_of(comparison: Comparison) -> list[dict[str, Any]]:
    """Return a row for each stream, method and metric, by column, with all digits; NaN: not defined."""
    return [
        {
            "stream": title, "scenario": stream[1], "method": method, "tuned": comparison.tuned[stream, method] or "no",
            "metric": metric, "mean": cell.mean.mean, "low": cell.mean.low, "high": cell.mean.high,
            "standard_deviation": cell.mean.deviation, "runs": cell.mean.size, "best": cell.is_best,
            "not_shown_worse_than_best": cell.is_near_best,
        }
        for stream, title in comparison.streams.items()
        for method in comparison.methods
        for metric in comparison.metrics
        if (cell := comparison.cells.get((stream, method, metric))) is not None
    ]  # fmt: skip


def differences_of(comparison: Comparison) -> list[dict[str, Any]]:
    """Return a row for each pair of methods that was tested, or was asked and can't be, by column, with all digits."""
    return [
        {
            "stream": item.stream, "metric": item.metric, "first": item.first, "second": item.second, "difference": item.mean,
            "low": item.low, "high": item.high, "p": item.p, "p_holm": item.adjusted, "pairs": item.pairs, "better": item.winner,
        }
        for item in comparison.differences
    ]  # fmt: skip


def to_frame(comparison: Comparison) -> DataFrame:
    """Return what `numbers_of` has as a pandas DataFrame."""
    from pandas import DataFrame

    return DataFrame(numbers_of(comparison))


def differences_to_frame(comparison: Comparison) -> DataFrame:
    """Return what `differences_of` has as a pandas DataFrame."""
    from pandas import DataFrame

    return DataFrame(differences_of(comparison))


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows, of `numbers_of` or `differences_of`, as CSV; empty where there is no number.

    A text that a spreadsheet would take for a formula has an apostrophe before it.
    """
    if not rows:
        return ""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _csv(value) for name, value in row.items()})
    return out.getvalue()


def _csv(value: Any) -> Any:
    if isinstance(value, str):
        return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
    return "" if isinstance(value, float) and math.isnan(value) else value


def to_markdown(comparison: Comparison) -> str:
    """Return a table for each stream in Markdown: the best mean is bold, ~ marks what isn't shown to be worse; notes follow."""
    lines: list[str] = []
    for stream, title in comparison.streams.items():
        head = head_of(comparison)
        lines += [f"### {_markdown(title)}", "", f"| {' | '.join(map(_markdown, head))} |", f"|---{'|--:' * (len(head) - 1)}|"]
        for method in comparison.methods_on(stream):
            cells = [(comparison.cells[stream, method, name], name in comparison.costs) for name in comparison.metrics]
            texts = [
                f"**{text}**" if cell.is_best else f"{text} ~" if cell.is_near_best else text
                for cell, is_cost in cells
                for text in [shown(cell, is_cost)]
            ]
            row = [*map(_markdown, [method, *options_of(comparison, [stream], method)]), *texts]
            lines.append(f"| {' | '.join(row)} |")
        lines.append("")
    return "\n".join([*lines, *(f"- {_markdown(note)}" for note in [key_of(comparison, "bold", "~"), *comparison.notes]), ""])


def _markdown(text: str) -> str:
    """Return plain text as Markdown shows it, with no HTML, link, code or further column in it."""
    return re.sub(r"[\\|<`]|\](?=[(\[])", lambda odd: f"\\{odd[0]}", text)


def to_latex(comparison: Comparison) -> str:
    r"""Return a tabular for LaTeX with booktabs: methods by streams and metrics; what else is to be known is in comments above it.

    The best mean is bold, and what isn't shown to be worse is underlined.
    """
    streams, width = [*comparison.streams], len(comparison.metrics)
    extra = head_of(comparison)[1:-width]
    notes = [r"needs \usepackage{booktabs}", key_of(comparison, "bold", "underlined"), *comparison.notes]
    notes += [comparison.streams[streams[0]]] if len(streams) == 1 else []
    lines = [f"% {' '.join(note.split())}" for note in notes]
    lines += [rf"\begin{{tabular}}{{l{'l' * len(extra)}{'r' * width * len(streams)}}}", r"\toprule"]
    if len(streams) > 1:
        titles = [rf"\multicolumn{{{width}}}{{c}}{{{_latex(title)}}}" for title in comparison.streams.values()]
        starts = range(2 + len(extra), 2 + len(extra) + width * len(streams), width)
        rules = [rf"\cmidrule(lr){{{start}-{start + width - 1}}}" for start in starts]
        lines += [rf"{' & ' * (1 + len(extra))}{' & '.join(titles)} \\", " ".join(rules)]
    names = [_latex(name.replace("_", " ")) for name in head_of(comparison)]
    lines += [rf"{' & '.join(names[:-width] + names[-width:] * len(streams))} \\", r"\midrule"]
    for method in comparison.methods:
        row = [_latex(text) for text in (method, *options_of(comparison, streams, method))]
        for stream in streams:
            for name in comparison.metrics:
                cell = comparison.cells.get((stream, method, name))
                row.append("--" if cell is None else _latex_cell(cell, name in comparison.costs))
        lines.append(rf"{' & '.join(row)} \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


_ESCAPED = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
}


def _latex(text: str) -> str:
    """Return plain text as LaTeX shows it."""
    return re.sub(r"[\\~^↑↓&%$#_{}]", lambda odd: _ESCAPED.get(odd[0], rf"\{odd[0]}"), text)


def _latex_cell(cell: Cell, is_cost: bool) -> str:
    text = shown(cell, is_cost)
    if text == "-":
        return "--"
    number, _, prefix = re.sub("±", r"\\pm", text).partition("\N{NO-BREAK SPACE}")
    number = rf"\mathbf{{{number}}}" if cell.is_best else rf"\underline{{{number}}}" if cell.is_near_best else number
    return f"${number}${f'~{prefix}' if prefix else ''}"


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print a table for each stream, what is shown of the differences, and the ranks over the streams."""
    from rich.table import Table
    from rich.text import Text

    for stream, title in comparison.streams.items():
        table = Table(title=Text(title), title_justify="left")
        for place, name in enumerate(head_of(comparison)):
            right = place >= len(head_of(comparison)) - len(comparison.metrics)
            table.add_column(Text(name), justify="right" if right else "left", no_wrap=place > 0, overflow="fold")
        for method in comparison.methods_on(stream):
            row = [Text(method), *map(Text, options_of(comparison, [stream], method))]
            for name in comparison.metrics:
                cell = comparison.cells[stream, method, name]
                mark = "*" if cell.is_best else "~" if cell.is_near_best else " "
                row.append(Text(f"{shown(cell, name in comparison.costs)} {mark}", style="bold" if cell.is_best else ""))
            table.add_row(*row)
        console.print(table)
    for line in [key_of(comparison, "*", "~"), *comparison.notes, *difference_lines(comparison), *rank_lines(comparison)]:
        console.print(line, markup=False)


def difference_lines(comparison: Comparison) -> list[str]:
    """Return what is shown of the differences in sentences: one for each pair; of many pairs, one for each method."""
    lines = []
    for (stream, metric), group in groupby(comparison.differences, key=lambda item: (item.stream, item.metric)):
        tested = [item for item in group if not math.isnan(item.p)]
        if not tested:
            continue
        count = f"{len(tested)} pair{'s' * (len(tested) > 1)}"
        lines.append(f"\n{metric} on {stream}: mean differences, by paired t-tests with Holm's correction for {count}:")
        if len(tested) <= MOST_LINES:
            lines += [f"  {sentence(item)}" for item in tested]
            continue
        winners = dict.fromkeys(difference.winner for difference in tested if difference.winner)
        wins = {winner: [difference for difference in tested if difference.winner == winner] for winner in winners}
        for winner, over in wins.items():
            losers = [item.second if item.first == winner else item.first for item in over]
            lines.append(f"  {winner} beats {len(losers)}: {'; '.join(losers)}")
        neither = sum(not item.is_shown for item in tested)
        lines.append(f"  of the {count} {neither} are not shown to differ")
    return lines


def sentence(difference: Difference) -> str:
    """Return what a tested difference says: "A beats B" only where it is shown."""
    first, second = difference.first, difference.second
    mean, low, high = difference.mean, difference.low, difference.high
    if difference.winner == second:
        first, second, mean, low, high = second, first, -mean, -high, -low
    numbers = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}], {difference.pairs} pairs, p {_p(difference.adjusted)}"
    if not difference.is_shown:
        return f"{first} and {second} are not shown to differ: {numbers}"
    return f"{first} {'beats' if difference.winner else 'differs from'} {second}: {numbers}"


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"= {value:.4f}"


def _from_to(methods: Sequence[str]) -> str:
    """Return methods that are next to each other in rank; of many the first and the last."""
    return "; ".join(methods) if len(methods) <= 3 else f"{methods[0]} to {methods[-1]}"


def rank_lines(comparison: Comparison) -> list[str]:
    """Return the average ranks over the streams, best first, with what they say."""
    lines = []
    for item in comparison.rankings:
        average, statistic, p, difference = item.ranking
        lines.append(f"\nranks in {item.metric} over {len(item.streams)} streams ({'; '.join(item.streams)}):")
        order = sorted(range(len(average)), key=lambda number: average[number])
        lines += [f"  {average[number]:.2f}  {item.methods[number]}" for number in order]
        if not math.isnan(p):
            lines.append(f"  Friedman's test of whether they differ at all: chi2 = {statistic:.2f}, p {_p(p)}")
        groups = [_from_to([item.methods[number] for number in group]) for group in cliques(average, difference)]
        lines.append(
            f"  ranks that are {difference:.2f} apart differ (Nemenyi, 5 %); not told apart: {' | '.join(groups) or 'none'}"
        )
        if item.left_out:
            lines.append(f"  not ranked, for they lack a stream: {'; '.join(item.left_out)}")
    return lines


def shown(cell: Cell, is_cost: bool) -> str:
    """Return a mean with half its interval, as tables show it: "0.853 ± 0.012", "1.20 ± 0.01 G"; "-" where it is not defined.

    A cost that was the same in all runs has no interval.
    """
    mean, half = cell.mean.mean, cell.mean.half_width
    if not math.isfinite(mean):
        return "-"
    digits, power = (3 if not is_cost else 2 if abs(mean) < 10 else 1), 0
    if abs(mean) >= 1e4:
        digits, power = 2, min(5, int(math.log10(abs(mean)) // 3))
    scale = 1000.0**power
    interval = f" ± {half / scale:.{digits}f}" if math.isfinite(half) and not (is_cost and half == 0) else ""
    return f"{mean / scale:.{digits}f}{interval}" + f"\N{NO-BREAK SPACE}{'kMGTP'[power - 1]}" * (power > 0)


def head_of(comparison: Comparison) -> list[str]:
    """Return the names of the columns; an arrow says what is better."""
    arrows = {True: " ↑", False: " ↓", None: ""}
    options = ["tuned"] if any(comparison.tuned.values()) else []
    return ["method", *options, *(f"{name}{arrows[comparison.higher_is_better[name]]}" for name in comparison.metrics)]


def options_of(comparison: Comparison, streams: Sequence[StreamKey], method: str) -> list[str]:
    """Return how a method was tuned, if any one was: "12 trials", or "no"; what it was tuned on is in the notes."""
    if not any(comparison.tuned.values()):
        return []
    places = [(stream, method) for stream in streams if (stream, method) in comparison.tuned]
    return [" / ".join(dict.fromkeys(comparison.tuned[place].partition(" on ")[0] or "no" for place in places))]


def key_of(comparison: Comparison, best: str, near: str) -> str:
    """Return what the numbers and marks of a table mean."""
    cells = comparison.cells.values()
    texts = [f"mean over {comparison.runs}"]
    if any(math.isfinite(cell.mean.low) for cell in cells):
        texts = [f"mean ± half its 95 % interval (Student's t) over {comparison.runs}"]
    texts += [f"{best}: the best mean"] if any(cell.is_best for cell in cells) else []
    texts += (
        [f"{near}: not shown to be worse than it (paired t-test, Holm, 5 %)"] if any(cell.is_near_best for cell in cells) else []
    )
    return "; ".join(texts)
