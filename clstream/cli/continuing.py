"""`clstream continue`: what the command line makes of a run that continues another one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from clstream.checkpoint import newest
from clstream.checkpoint.store import files
from clstream.cli.build import build_stream, seeds_of
from clstream.cli.errors import Failure, UsageError, as_failure
from clstream.cli.parser import parse_run
from clstream.cli.run_folders import CONFIG, find
from clstream.cli.yaml_files import read_yaml
from clstream.params import reason_of
from clstream.stream import History, Stream

KEPT = "before"
"""The folder in a run folder with what the run needs of those that it continues."""

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
class Part:
    """One run of those that came one after another: its config, and how it ended."""

    config: Path
    history: History
    begun: int
    outputs: int

    @classmethod
    def of(cls, config: Path, end: Mapping[str, Any]) -> Part:
        """Return a run by the values of `Part.end`. Raises ValueError for what are none."""
        try:
            begun, outputs = int(end["begun"]), int(end["outputs"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{config.with_suffix('.json')} doesn't say how that run ended") from error
        return cls(config, History.from_dict(end["history"]), begun, outputs)

    @property
    def end(self) -> dict[str, Any]:
        """How it ended, as JSON has it."""
        return {"history": self.history.to_dict(), "begun": self.begun, "outputs": self.outputs}


@dataclass(frozen=True, slots=True)
class Before:
    """The run that one on the command line continues.

    Args:
        folder: with the checkpoints of its seeds: its own, or what the run that goes on has kept of it.
        stream: what is learned: that of the options, after those that were learned where these can be built again.
        outputs: for how many the model was built.
        parts: the runs that were learned, the first one first; () if their checkpoints don't say what they learned.

    """

    folder: Path
    stream: Stream
    outputs: int
    parts: tuple[Part, ...] = ()

    def of_seed(self, seed: int) -> Path:
        """Return the folder with the checkpoints of a seed. Raises Failure if there is none."""
        folder = self.folder / f"seed_{seed}"
        with as_failure(ValueError):
            if newest(folder) is None:
                raise Failure(f"the run {self.folder} has no checkpoint of seed {seed} to go on from")
        return folder

    def keep(self, folder: Path, seeds: Sequence[int]) -> None:
        """Keep in a run folder what the run in it needs of those before, so that they may be removed.

        That is their configs and what they learned, and the last checkpoint of each seed, which takes no space as long as it is
        there in both places. Raises OSError.
        """
        kept = folder / f"{KEPT}.writing"
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        for number, part in enumerate(self.parts):
            shutil.copyfile(part.config, kept / f"{number:03d}.yaml")
            (kept / f"{number:03d}.json").write_text(json.dumps(part.end), encoding="utf-8")
        for seed in seeds:
            own = kept / f"seed_{seed}"
            own.mkdir()
            for file in files(self.folder / f"seed_{seed}")[:1]:
                try:
                    os.link(file, own / file.name)
                except OSError:  # another file system, or one without links
                    shutil.copyfile(file, own / file.name)
        kept.rename(folder / KEPT)


def run_before(options: Namespace, stream: Stream, own: Path | None = None) -> Before | None:
    """Return what the options continue, if they continue a run; `own` is the folder of an earlier attempt at them.

    Raises UsageError or Failure for what can't be continued.
    """
    if options.continues is None:
        return None
    seeds = seeds_of(options)
    if options.together or (options.workers or 1) > 1:
        raise UsageError("a run that continues another one takes its seeds one after the other: leave --together and --workers out")
    kept = own is not None and (own / KEPT).is_dir()
    folder = own / KEPT if own is not None and kept else find(options.continues, Path(options.runs))
    with as_failure(ValueError):
        state = newest(folder / f"seed_{seeds[0]}")
        if state is None:
            raise Failure(f"the run {folder} has no checkpoint of seed {seeds[0]} to go on from")
        if "history" not in state:
            return Before(folder, stream, stream.outputs)
        parts = list(_parts_in(folder if kept else folder / KEPT))
        if not kept:
            history, (finished, *within) = History.from_dict(state["history"]), state["position"]
            outputs = state.get("continued", {"outputs": history.outputs})["outputs"]
            parts.append(Part(folder / CONFIG, history, finished + any(within), outputs))
    past, last = _stream_of(parts, stream, options), parts[-1]
    return Before(folder, stream if past is None else past, last.outputs, tuple(parts))


def _parts_in(folder: Path) -> Iterator[Part]:
    """Yield the runs that a folder has kept, the first one first. Raises ValueError for what can't be read."""
    for config in sorted(folder.glob("[0-9]*.yaml")):
        try:
            yield Part.of(config, json.loads(config.with_suffix(".json").read_text(encoding="utf-8")))
        except (OSError, RecursionError) as error:
            raise ValueError(f"{config.with_suffix('.json')} can't be read: {reason_of(error)}") from None


def _stream_of(parts: Sequence[Part], stream: Stream, options: Namespace) -> Stream | None:
    """Return a stream after those of the runs before it; None if it begins with them, or they can't be built any more."""
    if parts[-1].history.begins(stream, parts[-1].begun):
        return None
    past: Stream | None = None
    try:
        for part, before in zip(parts, (None, *parts), strict=False):
            again = ["--config", str(part.config), *([f"--data_root={options.data_root}"] if options.data_root else [])]
            again += [f"--trust={','.join(options.trust)}"] if options.trust else []
            parser, old = parse_run(again)
            its_own = build_stream(parser, old)
            joins = before is not None and past is not None and not before.history.begins(its_own, before.begun)
            past = past.followed_by(its_own) if joins and past is not None else its_own
        assert past is not None
        whole = past.followed_by(stream)
    except (ValueError, TypeError, OSError, ImportError, UsageError, Failure):
        return None
    last = parts[-1]
    return whole if last.history.begins(whole, last.begun) and last.history.visits[last.begun :] == () else None
