"""Reports: one HTML page of all that records say, with interactive plots; it asks no network, and holds no text that runs."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from html import escape
from pathlib import Path

from clstream.comparison.changes import Change, changes_between
from clstream.comparison.comparisons import Comparison, compare, value_of
from clstream.comparison.labels import stream_key, tell_apart
from clstream.comparison.methods import panels_of, rank_methods
from clstream.comparison.origins import Source, link_to
from clstream.comparison.plots import Plot, changes_plot, plots_of, ranks_of
from clstream.comparison.statistics import Mean
from clstream.comparison.tables import difference_lines, head_of, key_of, options_of, rank_lines, shown

COLUMNS = ("average", "forgetting", "memory_bytes", "flops", "seconds")
"""The metrics and costs that the tables have, where they are known."""

MOST_OPEN = 50
"""Runs that are listed without a click."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 0 auto; padding: 1rem 1.5rem 4rem; }
h1, h2, h3 { line-height: 1.2; } h2 { border-bottom: 2px solid #0072B2; padding-bottom: .2rem; margin-top: 2.5rem; }
nav a { margin-right: 1.2rem; } .wide { overflow-x: auto; } .note { color: #555; } .bad { color: #b03000; }
table { border-collapse: collapse; font-size: 14px; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left; }
td.number, th.number { text-align: right; white-space: nowrap; } th { cursor: pointer; background: #f4f6f8; }
pre { background: #f4f6f8; padding: .7rem; overflow-x: auto; font-size: 13px; } details { margin: .4rem 0; }
"""

SCRIPT = """
const figures = JSON.parse(document.getElementById('figures').textContent);
async function draw() {
  for (const place of document.querySelectorAll('[data-figure]')) {
    const figure = figures[Number(place.dataset.figure)];
    await Plotly.newPlot(place, figure.data, figure.layout, {responsive: true, displaylogo: false, showSendToCloud: false});
    place.dataset.drawn = 'yes';
    await new Promise(go => setTimeout(go));
  }
}
const value = row => place => {
  const text = row.cells[place].textContent, number = parseFloat(row.cells[place].dataset.value ?? text);
  return isNaN(number) ? text : number;
};
document.addEventListener('click', event => {
  const head = event.target.closest('th');
  if (!head) return;
  const place = head.cellIndex, body = head.closest('table').tBodies[0];
  const up = head.dataset.up = head.dataset.up === 'yes' ? 'no' : 'yes';
  const order = (a, b) => typeof a === 'number' && typeof b === 'number' ? a - b : String(a).localeCompare(String(b));
  const rows = [...body.rows].sort((a, b) => (up === 'yes' ? 1 : -1) * order(value(a)(place), value(b)(place)));
  body.append(...rows);
});
draw();
"""


class Html(str):
    """Text that is HTML; any other text is escaped where it is put into a page."""

    __slots__ = ()


@dataclass
class Page:
    """A page that is being written: its parts, and the figures that the places in them draw."""

    parts: list[str] = field(default_factory=list)
    figures: list[Plot] = field(default_factory=list)

    def add(self, *parts: str) -> None:
        """Add parts of HTML."""
        self.parts += parts

    def element(self, tag: str, text: str, **attributes: str) -> None:
        """Add an element with a text, which is escaped."""
        self.add(_element(tag, text, **attributes))

    def lines(self, texts: Iterable[str]) -> None:
        """Add texts as a list."""
        items = "".join(_element("li", text) for text in texts)
        self.add(f"<ul class=note>{items}</ul>" if items else "")

    def table(self, head: Sequence[str], rows: Iterable[Sequence[object]], numbers: Iterable[int] = ()) -> None:
        """Add a table; the columns `numbers` are set to the right, and those with nothing in them are left out.

        A cell may be text, or a text and the number to sort it by.
        """
        right, body = {*numbers}, [[item if isinstance(item, tuple) else (item, None) for item in row] for row in rows]
        columns = [place for place in range(len(head)) if any(row[place][0] != "" for row in body)]
        cells = "".join(_element("th", head[place], **_side(place in right)) for place in columns)
        lines = []
        for row in body:
            line = ""
            for place in columns:
                text, key = row[place]
                sorted_by = {} if key is None else {"data-value": repr(key)}
                line += _element("td", text if isinstance(text, Html) else str(text), **_side(place in right), **sorted_by)
            lines.append(f"<tr>{line}</tr>")
        self.add(f"<div class=wide><table><thead><tr>{cells}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>")

    def plot(self, title: str, plot: Plot) -> None:
        """Add a plot under its title."""
        self.element("h4", title)
        self.add(f'<div data-figure="{len(self.figures)}" style="min-height: {int(plot["layout"]["height"])}px"></div>')
        self.figures.append(plot)


def _side(is_number: bool) -> dict[str, str]:
    return {"class": "number"} if is_number else {}


def _element(tag: str, text: str, **attributes: str) -> str:
    named = "".join(f' {name}="{escape(value)}"' for name, value in attributes.items())
    return f"<{tag}{named}>{text if isinstance(text, Html) else escape(text)}</{tag}>"


def report_of(sources: Sequence[Source], file: Path, version: str) -> str:
    """Return the page of one source, or of two: then it says what changed from the first to the second.

    Args:
        sources: what it is of.
        file: where it will be, for the links to run folders.
        version: of clstream, which the page says made it.

    Raises:
        ValueError: if in one of the sources no run ended well, or two runs that should be the same have other numbers.

    """
    from plotly.offline import get_plotlyjs

    page = Page()
    title = f"Report: {' and '.join(source.name for source in sources)}"
    page.element("h1", title)
    total = sum(len(source.records) for source in sources)
    summary = f"{total} run{'s' * (total != 1)}; made by clstream {version} on {datetime.now():%Y-%m-%d at %H:%M}."
    page.element("p", summary, **{"class": "note"})
    names = ["What changed"] * (len(sources) == 2) + [source.name for source in sources]
    links = "".join(_element("a", name, href=f"#part-{place}") for place, name in enumerate(names))
    page.add(f"<nav>{links}</nav>" if len(names) > 1 else "")
    if len(sources) == 2:
        page.element("h2", "What changed", id="part-0")
        _add_changes(page, changes_between(sources[0].records, sources[1].records), (sources[0].name, sources[1].name))
    for place, source in enumerate(sources, len(sources) - 1):
        page.element("h2", source.name, id=f"part-{place}")
        _add_source(page, source, file)
    data = json.dumps(page.figures, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    scripts = [get_plotlyjs(), SCRIPT]
    allowed = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts)
    policy = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'"
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">{_element("title", title)}'
    body = "\n".join(page.parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head><body>{body}\n'
        "<noscript><p>The plots need JavaScript; the tables don't.</p></noscript>"
        f'<script type="application/json" id="figures">{data}</script>'
        f"{''.join(f'<script>{text}</script>' for text in scripts)}</body></html>\n"
    )


def _add_source(page: Page, source: Source, file: Path) -> None:
    source = replace(source, records=tell_apart(source.records))
    measured = {name for record in source.records if not record.error for name in (*record.metrics, *record.cost)}
    comparison = compare(source.records, [name for name in COLUMNS if name in measured | {"average", "seconds"}])
    panels = panels_of(comparison.records)
    plots = {(panel.stream, panel.scenario, panel.measure): panel for panel in panels}
    for stream, title in comparison.streams.items():
        page.element("h3", title)
        _add_table(page, comparison, stream)
        if stream in plots:
            for name, plot in plots_of(plots[stream]).items():
                page.plot(name, plot)
    page.lines(comparison.notes)
    if differences := difference_lines(comparison):
        page.add("<details><summary>Which differences are shown</summary>")
        page.element("pre", "\n".join(differences).strip())
        page.add("</details>")
    if (ranks := rank_methods(panels)) is not None:
        page.plot("Average ranks over the streams, with critical differences", ranks_of(*ranks))
        page.element("pre", "\n".join(rank_lines(comparison)).strip())
    _add_runs(page, source, file)
    _add_configs(page, source)
    _add_environment(page, source)


def _add_table(page: Page, comparison: Comparison, stream: tuple[str, str, str]) -> None:
    head, rows = head_of(comparison), []
    for method in comparison.methods_on(stream):
        row: list[object] = [method, *options_of(comparison, [stream], method)]
        for name in comparison.metrics:
            cell = comparison.cells[stream, method, name]
            text = escape(shown(cell, name in comparison.costs))
            mark = Html(f"<b>{text}</b>" if cell.is_best else f"<u>{text}</u>" if cell.is_near_best else text)
            row.append((mark, cell.mean.mean if math.isfinite(cell.mean.mean) else None))
        rows.append(row)
    page.table(head, rows, range(len(head) - len(comparison.metrics), len(head)))
    page.element("p", f"{key_of(comparison, 'bold', 'underlined')}; a click on a column's name sorts by it", **{"class": "note"})


def _add_changes(page: Page, changes: Sequence[Change], names: tuple[str, str]) -> None:
    rows = []
    for change in changes:
        test = change.difference
        interval = "" if test is None or math.isnan(test.low) else f" [{test.low:+.3f}, {test.high:+.3f}]"
        p = "" if math.isnan(change.p) else f"{change.p:.4f}"
        codes = " → ".join(dict.fromkeys(code for code in (change.code_before, change.code_after) if code))
        rows.append(
            [
                change.stream, change.method, change.verdict, _mean_text(change.before), _mean_text(change.after),
                "" if test is None else (f"{test.mean:+.3f}{interval}", test.mean), p, "; ".join(change.options), codes,
            ]
        )  # fmt: skip
    head = ["stream", "method", "what became of it", names[0], names[1], "difference", "p (Holm)", "options that differ", "code"]
    page.table(head, rows, (3, 4, 5, 6))
    note = (
        "The mean of the main measure ± half its 95 % interval; differences are paired by stream, order of classes and seed, with "
        "a bootstrap interval and a t-test corrected by Holm."
    )
    page.element("p", note, **{"class": "note"})
    page.plot("Before and after", changes_plot(changes, names))


def _mean_text(mean: Mean | None) -> str:
    return "" if mean is None else f"{mean.mean:.3f}" + (f" ± {mean.half_width:.3f}" if math.isfinite(mean.half_width) else "")


def _add_runs(page: Page, source: Source, file: Path) -> None:
    page.element("h3", "Runs")
    rows = []
    for record, origin in zip(source.records, source.origins, strict=True):
        value, forgetting = value_of(record, "average"), value_of(record, "forgetting")
        folder = "" if origin.folder is None else Html(_element("a", origin.folder.name, href=link_to(origin.folder, file)))
        tracked = Html(_element("a", origin.run_id[:8], href=origin.address)) if origin.address else origin.run_id[:8]
        failure = Html(_element("span", record.error, **{"class": "bad"})) if record.error else ""
        numbers = [(f"{number:.3f}" if math.isfinite(number) else "-") for number in (value, forgetting)]
        seconds = f"{record.seconds:.1f}" if math.isfinite(record.seconds) else "-"
        rows.append(
            [record.label, record.stream, record.seed, *numbers, seconds, record.tuned, record.code, folder, tracked, failure]
        )
    head = ["method", "stream", "seed", "average", "forgetting", "seconds", "options", "code", "folder", "MLflow run", "error"]
    page.add(f"<details{' open' * (len(rows) <= MOST_OPEN)}>{_element('summary', f'{len(rows)} runs')}")
    page.table(head, rows, (2, 3, 4, 5))
    page.add("</details>")
    stores = sorted({origin.uri for origin in source.origins if origin.run_id and not origin.address})
    page.lines(f"The MLflow runs are in {uri}: clstream ui --tracking_uri {uri} shows them" for uri in stores)


def _add_configs(page: Page, source: Source) -> None:
    page.element("h3", "Configs")
    configs = {"The grid of the sweep": source.grid} if source.grid else {}
    for record, origin in zip(source.records, source.origins, strict=True):
        params = "\n".join(f"{name}: {value}" for name, value in record.params.items())
        configs.setdefault(f"{record.label} on {stream_key(record)[0]}, seed {record.seed}", origin.config or params)
    first: dict[str, str] = {}
    for name, text in configs.items():  # the seeds of a method share a config
        first.setdefault(name.rpartition(", seed ")[0] or name, text)
    for name, text in first.items():
        page.add(f"<details>{_element('summary', name)}{_element('pre', text)}</details>")


def _add_environment(page: Page, source: Source) -> None:
    page.element("h3", "Environment")
    rows = []
    codes: dict[str, dict[str, int]] = {}
    for record, origin in zip(source.records, source.origins, strict=True):
        for name, value in ({"code": record.code, "data": record.fingerprint} | origin.versions).items():
            if value and name != "data_fingerprint":
                codes.setdefault(name, {})[value] = codes.get(name, {}).get(value, 0) + 1
    for name, values in codes.items():
        rows += [[name, value, f"{count} run{'s' * (count > 1)}"] for value, count in values.items()]
    rows.append(["this page", f"Python {platform.python_version()} on {platform.platform()}", "made here"])
    page.table(["what", "version", "of"], rows)
