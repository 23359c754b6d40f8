"""`clstream compare`: methods against each other, from configs that are run, and from records of runs there were."""

from __future__ import annotations

import os
import stat
import time
from dataclasses import fields, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clstream.cli.command_parser import CommandParser
from clstream.cli.errors import UsageError, as_failure, printable
from clstream.cli.run import shown_help
from clstream.cli.tables import report_runs, title, titles, track_comparisons, wide_console

if TYPE_CHECKING:
    from argparse import Namespace

    from clstream.cli.experiment import Outcome
    from clstream.comparison import Comparison, Record

FILES = ("csv", "latex", "markdown")
"""Options that name a file that a table is written to."""


def compare_command(arguments: list[str]) -> int:
    """`clstream compare`: each config file is run with the same further options, and with records all is compared."""
    sources = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
    options, rest = compare_parser().parse_known_args(arguments[len(sources) :])
    if not sources:
        print(compare_parser().format_usage(), end="")
        return 2
    configs = [source for source in sources if not is_source(source)]
    if not configs:
        tracking_parser().parse_args(rest)
    options.tracking_uri = tracking_parser().parse_known_args(rest)[0].tracking_uri
    if configs and (shown := "".join([shown_help(["--config", file, *rest]) for file in configs])):  # before the first is run
        print(shown, end="")
        return 0
    check_outputs(options)
    records = [record for source in sources if is_source(source) for record in records_of(source, options)]
    if configs:
        outcomes = run_configs(configs, rest)
        several = sum(len(outcome.results) > 1 for outcome in outcomes) > 1
        if not (records or several or asked_more(options)):
            return 0
        records += records_of_outcomes(outcomes, configs)
    compare_records(records, options)
    return 0


def compare_parser() -> CommandParser:
    """Return the parser of the command's own options."""
    parser = CommandParser(
        "compare",
        usage="clstream compare SOURCE [SOURCE ...] [options] [options of clstream run, for all configs]",
        description="Compare methods: means over seeds with 95 % intervals, what is shown of their differences, and ranks over "
        "streams. A SOURCE is a config file, which is run, or the folder of a sweep, a file of records (.jsonl), a run folder, or "
        "an MLflow experiment, as mlflow:NAME, which are read.",
    )
    parser.add_argument("--metrics", help="by comma, as average_accuracy,forgetting,memory_bytes,training_seconds")
    parser.add_argument("--against", help="the method that all others are held against; by default all pairs are")
    parser.add_argument("--latex", metavar="FILE", help="write the table there, for LaTeX's booktabs")
    parser.add_argument("--csv", metavar="FILE", help="write all numbers there, and the differences beside it")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables there")
    parser.add_argument("--pictures", metavar="FOLDER", help="draw curves, matrices and costs there, as PDF and PNG")
    return parser


def tracking_parser() -> CommandParser:
    """Return the parser of what else there is if nothing is run."""
    parser = compare_parser()
    parser.add_argument("--tracking_uri", "--tracking-uri")
    return parser


def is_source(name: str) -> bool:
    """Return whether a source has records, or would have if it were there; else it is a config."""
    if name.endswith((".yaml", ".yml")):
        return False
    if name.startswith("mlflow:") or name.endswith(".jsonl"):
        return True
    try:
        return stat.S_ISDIR(os.stat(name).st_mode)
    except FileNotFoundError:
        return True
    except OSError:  # a name that can be no file's: it is refused as that of a config
        return False


def asked_more(options: Namespace) -> bool:
    """Return whether any of the command's own options is given."""
    return any(getattr(options, name) is not None for name in ("metrics", "against", "pictures", *FILES))


def check_outputs(options: Namespace) -> None:
    """Raise UsageError for a file that can't be written, before anything is run."""
    for name in (*FILES, "pictures"):
        if (place := getattr(options, name)) is None:
            continue
        folder = Path(place).absolute().parent
        if not place or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UsageError(f"--{name} {place} can't be written: the folder {folder} is missing or read-only")
        if Path(place).is_dir() != (name == "pictures") and Path(place).exists():
            raise UsageError(f"--{name} takes a {'folder' if name == 'pictures' else 'file'}, and {place} is none")


def records_of(source: str, options: Namespace) -> list[Record]:
    """Return the records of a source that is read; of MLflow the matrices only if they are drawn."""
    from clstream.comparison import read_records

    with as_failure(OSError, ValueError):
        records = read_records(source, options.tracking_uri, matrices=options.pictures is not None)
    return [
        replace(record, **{attribute.name: plain(getattr(record, attribute.name)) for attribute in fields(record)})
        for record in records
    ]


def plain(value: Any) -> Any:
    """Return a text from a file as it can be shown, in a line; so with names and texts in a dict; anything else as it is."""
    if isinstance(value, str):
        return printable(" ".join(value.split()))
    return {plain(name): plain(item) for name, item in value.items()} if isinstance(value, dict) else value


def run_configs(configs: list[str], rest: list[str]) -> list[Outcome]:
    """Run the configs, and report what came out."""
    from clstream.cli.experiment import run_experiment

    began = time.time()
    outcomes = [run_experiment(["--config", file, *rest], fingerprint=True) for file in configs]
    report_runs(outcomes, configs)
    track_comparisons(outcomes, configs, began)
    return outcomes


def records_of_outcomes(outcomes: list[Outcome], configs: list[str]) -> list[Record]:
    """Return the records of what was run; those of two configs with the same params are told apart by the names of these."""
    from clstream.comparison import record_of
    from clstream.sweep.identity import code_version

    records = []
    params = [{name: value for name, value in outcome.results[0].params.items() if name != "seed"} for outcome in outcomes]
    for number, outcome in enumerate(outcomes):
        stream = outcome.results[0].params["stream"]
        name = titles(outcomes, configs)[number] if params.count(params[number]) > 1 else title(outcome.results)
        label = name.replace(f" on {stream}", "", 1)
        known = {"label": label, "fingerprint": outcome.fingerprint, "tuned": outcome.tuned, "code": code_version()}
        records += [record_of(result, **known) for result in outcome.results]
    return records


def compare_records(records: list[Record], options: Namespace) -> None:
    """Print what records say of methods against each other, and write what was asked for."""
    from clstream.comparison import compare, print_comparison

    metrics = None if options.metrics is None else [name.strip() for name in options.metrics.split(",") if name.strip()]
    if metrics == []:
        raise UsageError("--metrics takes names by comma, as average_accuracy,forgetting")
    try:
        comparison = compare(records, metrics, options.against)
    except ValueError as error:
        raise UsageError(str(error)) from error
    console = wide_console()
    print_comparison(comparison, console)
    with as_failure(OSError, ValueError):
        written = write_tables(comparison, options)
        if options.pictures is not None:
            from clstream.comparison.pictures import draw

            written += draw(list(comparison.records), options.pictures)
    if written:
        console.print(f"\nwritten: {', '.join(map(str, written))}", markup=False)


def write_tables(comparison: Comparison, options: Namespace) -> list[Path]:
    """Write the tables that were asked for, and return their files."""
    from clstream.comparison import differences_of, numbers_of, to_csv, to_latex, to_markdown
    from clstream.files import write_atomically

    texts: dict[Path, str] = {}
    if options.latex is not None:
        texts[Path(options.latex)] = to_latex(comparison)
    if options.markdown is not None:
        texts[Path(options.markdown)] = to_markdown(comparison)
    if options.csv is not None:
        file = Path(options.csv)
        texts[file] = to_csv(numbers_of(comparison))
        texts[file.with_name(f"{file.stem}_differences{file.suffix}")] = to_csv(differences_of(comparison))
    for file, text in texts.items():
        content = text.encode("utf-8", "replace")
        write_atomically(file, lambda out, content=content: out.write(content))  # type: ignore[misc]  # the default is its type
    return list(texts)
