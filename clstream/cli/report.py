"""`clstream report`: an interactive page of what was run."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from clstream import __version__
from clstream.cli.command_parser import CommandParser
from clstream.cli.errors import Failure, UsageError, as_failure, printable


def report_command(arguments: list[str]) -> int:
    """`clstream report`: write one HTML page of a sweep, or of two and what changed between them."""
    parser = CommandParser(
        "report",
        description="Write one HTML page with all that runs measured: tables, interactive plots, links, configs. It needs no "
        "network. Of two sources it says what changed from the first to the second. Where the runs of the last source are tracked "
        "under one MLflow run, the page is put among its artifacts too.",
    )
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="a sweep's folder, a file of records, run folders, or mlflow:EXPERIMENT"
    )
    parser.add_argument("--out", default="report.html", help="the page; by default report.html")
    parser.add_argument(
        "--tracking_uri", "--tracking-uri", help="the store of mlflow:EXPERIMENT; by default MLFLOW_TRACKING_URI, else mlflow.db"
    )
    options = parser.parse_args(arguments)
    out = Path(options.out)
    if len(options.sources) > 2:
        raise UsageError(f"a report is of one source, or of two that it compares, not of {len(options.sources)}")
    if len(set(options.sources)) < len(options.sources):
        raise UsageError(f"{options.sources[0]} is given twice: a report of two sources says what changed between them")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UsageError(f"--out {out} is {'a folder' if out.is_dir() else 'in no folder that there is'}: name a file for the page")
    if find_spec("plotly") is None:
        raise Failure("clstream report needs Plotly: pip install 'clstream[report]'")
    from clstream.comparison.origins import read_source
    from clstream.comparison.report import report_of
    from clstream.files import write_atomically

    began = time.perf_counter()
    with as_failure(OSError, ValueError):
        sources = [read_source(place, options.tracking_uri) for place in options.sources]
        if len({source.name for source in sources}) < len(sources):
            sources = [replace(source, name=place) for source, place in zip(sources, options.sources, strict=True)]
        page = report_of(sources, out, __version__).encode(errors="replace")
        write_atomically(out, lambda file: file.write(page))
    runs = sum(len(source.records) for source in sources)
    print(f"{out}: {runs} run{'s' * (runs != 1)}, {len(page) / 1e6:.1f} MB, in {time.perf_counter() - began:.1f} s")
    _add_to_mlflow(sources[-1].parents, out, options.tracking_uri)
    return 0


def _add_to_mlflow(parents: set[tuple[str, str]], page: Path, store: str | None) -> None:
    """Put the page among the artifacts of the MLflow run above those of a sweep, and say so; what goes wrong is said, too.

    It goes to no other store than the user's own: files of runs name one too, but they may be anybody's.
    """
    if len(parents) != 1:
        if parents:
            print(f"the runs are tracked under {len(parents)} MLflow runs: the page is put among the artifacts of none")
        return
    from clstream.tracking.addresses import tracking_uri, without_password

    ((uri, run_id),) = parents
    if uri != without_password(tracking_uri(store)):
        print(printable(f"the runs are tracked in {uri}: with --tracking-uri {uri} the page is put among their artifacts"))
        return
    from clstream.tracking.mlflow_store import add_file

    try:
        add_file(tracking_uri(store), run_id, page)
    except OSError as error:
        print(f"clstream: the page is not in MLflow: {error}", file=sys.stderr)
    else:
        print(f"it is an artifact of the MLflow run {run_id} too, in {uri}")
