"""`clstream continue`: what the command line makes of a run that continues another one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from clstream.checkpoint import newest
from clstream.cli.build import build_stream, seeds_of
from clstream.cli.errors import Failure, UsageError, as_failure
from clstream.cli.option_parser import Parser
from clstream.cli.parser import parse_run
from clstream.cli.run_folders import CONFIG, find
from clstream.cli.yaml_files import read_yaml
from clstream.stream import History, Stream

_OF_THE_RUN = ("max_sessions", "resume", "continues")
"""Options of a run that one which continues it doesn't take over."""


def continuing_arguments(run: str, arguments: list[str]) -> tuple[list[str], dict[str, Mapping[str, Any]]]:
    """Return the options of `clstream run` for `clstream continue RUN`, and the config of the run. Raises UsageError."""
    runs = next((value for option, value in pairwise(arguments) if option == "--runs"), "runs")
    folder = find(run, Path(runs))
    config = str(folder / CONFIG)
    kept = {name: value for name, value in read_yaml(config, "config file").items() if name not in _OF_THE_RUN}
    return ["--config", config, *arguments, "--continues", str(folder)], {config: kept}


@dataclass(frozen=True, slots=True)
class Before:
    """The run that one on the command line continues.

    Args:
        folder: of it.
        stream: what is learned: that of the options, after the one that was learned where that can be built again.
        outputs: for how many the model was built.

    """

    folder: Path
    stream: Stream
    outputs: int

    def of_seed(self, seed: int) -> Path:
        """Return the folder with the checkpoints of a seed. Raises Failure if there is none."""
        folder = self.folder / f"seed_{seed}"
        with as_failure(ValueError):
            if newest(folder) is None:
                raise Failure(f"the run {self.folder} has no checkpoint of seed {seed} to go on from")
        return folder


def run_before(options: Namespace, stream: Stream) -> Before | None:
    """Return what the options continue, if they continue a run. Raises UsageError or Failure for what can't be continued."""
    if options.continues is None:
        return None
    seeds = seeds_of(options)
    if options.together or (options.workers or 1) > 1:
        raise UsageError("a run that continues another one takes its seeds one after the other: leave --together and --workers out")
    folder = find(options.continues, Path(options.runs))
    with as_failure(ValueError):
        state = newest(folder / f"seed_{seeds[0]}")
    if state is None:
        raise Failure(f"the run {folder} has no checkpoint of seed {seeds[0]} to go on from")
    if "history" not in state:
        return Before(folder, stream, stream.outputs)
    history, (finished, *within) = History.from_dict(state["history"]), state["position"]
    outputs = state.get("continued", {"outputs": history.outputs})["outputs"]
    begun = finished + any(within)
    if not history.begins(stream, begun) and (past := _stream_of(folder, options)) is not None:
        try:
            whole = past.followed_by(stream)
        except ValueError:
            return Before(folder, stream, outputs)
        if history.begins(whole, begun) and history.visits[begun:] == ():
            return Before(folder, whole, outputs)
    return Before(folder, stream, outputs)


def _stream_of(folder: Path, options: Namespace) -> Stream | None:
    """Return the stream of a run, with what came before where it continued another one; None if it can't be built any more."""
    again = ["--config", str(folder / CONFIG), *([f"--data_root={options.data_root}"] if options.data_root else [])]
    again += [f"--trust={','.join(options.trust)}"] if options.trust else []
    parser: Parser
    try:
        parser, old = parse_run(again)
        stream = build_stream(parser, old)
        before = run_before(old, stream)
    except (ValueError, TypeError, OSError, ImportError, UsageError, Failure):
        return None
    return stream if before is None else before.stream
