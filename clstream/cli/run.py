"""`clstream run` and `resume`."""

from __future__ import annotations

from pathlib import Path

from clstream.cli.command_parser import CommandParser
from clstream.cli.run_folders import CONFIG, find
from clstream.cli.tables import report_runs


def run_command(arguments: list[str]) -> int:
    """`clstream run`."""
    from clstream.cli.experiment import run_experiment

    if shown := shown_help(arguments):
        print(shown, end="")
        return 0
    report_runs([run_experiment(arguments)])
    return 0


def shown_help(arguments: list[str]) -> str:
    """Return what is only to be shown: help, or the options as YAML; nothing if there is a run to be made."""
    from clstream.cli.experiment import print_notes
    from clstream.cli.lookup import PLACES
    from clstream.cli.option_parser import option_help
    from clstream.cli.parser import as_yaml, parse_run, run_parser

    if "-h" in arguments or "--help" in arguments:
        return str(run_parser().format_help()) + "\n"
    for option, name in zip(arguments, [*arguments[1:], ""], strict=True):
        if option.startswith("--") and option.endswith(".help") and option[2:-5] in PLACES:
            return option_help(option[2:-5], name) + "\n"
    parser, options = parse_run(arguments)
    if options.print_config:
        print_notes(parser)
    return as_yaml(parser, options) if options.print_config else ""


def continue_command(arguments: list[str]) -> int:
    """`clstream continue`: go on from the end of a run, with more sessions, tasks or classes."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(CONTINUE)
        return 0 if arguments else 2
    from clstream.cli.continuing import continuing_arguments
    from clstream.cli.experiment import run_experiment

    options, configs = continuing_arguments(arguments[0], arguments[1:])
    report_runs([run_experiment(options, configs=configs)])
    return 0


CONTINUE = """\
usage: clstream continue RUN [options]

Go on from where a run ended, or was stopped: with the same strategy, model and seeds, on more sessions, tasks or classes.

  RUN             its folder, as runs/NAME, or the id of its MLflow run
  --stream NAME   what comes next, with its options: a stream that begins with what was learned, of which the rest comes,
                  or one of new tasks, which come after those that were learned; without it, the stream of the run

All other options are those of `clstream run`, and as they were unless they are given. --max_sessions counts the sessions to come.
It gets a run folder and an MLflow run of its own. See docs/continue.md."""


def resume_command(arguments: list[str]) -> int:
    """`clstream resume`: go on with a run from its newest checkpoint."""
    parser = CommandParser(
        "resume",
        description="Go on with a run from its newest checkpoint; it ends as it would have without the break.",
    )
    parser.add_argument("run", help="its folder, as runs/NAME, or the id of its MLflow run")
    parser.add_argument("--runs", default="runs", help="folder of the run folders")
    parser.add_argument("--data_root", "--data-root", help="folder with the data sets, if it lies elsewhere now")
    parser.add_argument("--tracking_uri", "--tracking-uri", help="the tracking server, if it has another address now")
    parser.add_argument("--trust", help="packages of yours that its config may name, beside the files of this folder")
    parser.add_argument(
        "--accept_changed_code", "--accept-changed-code", action="store_true",
        help="go on though source code of your own has changed since; the log and the tags of the run say so",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    from clstream.cli.experiment import run_experiment

    folder = find(options.run, Path(options.runs))
    moved = [f"--{name}={value}" for name in ("data_root", "tracking_uri", "trust") if (value := getattr(options, name))]
    moved += ["--accept_changed_code"] if options.accept_changed_code else []
    report_runs([run_experiment(["--config", str(folder / CONFIG), *moved], folder)])
    return 0
