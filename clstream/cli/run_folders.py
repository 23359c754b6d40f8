"""Run folders: where the command line keeps its runs, so that one that was killed can be resumed.

runs/Replay-split_mnist-1a2b3c4d/     the first attempt at these very options; the second one ends in .2
config.yaml                       the options, as `clstream run --config` takes them
tracking.jsonl                    what was written to MLflow of several seeds together
seed_0/                           of each seed: checkpoints, tracking.jsonl, events.jsonl, and `finished` when it is

"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from clstream.cli.errors import UsageError
from clstream.files import write_atomically
from clstream.tracking.outbox import find_run

CONFIG = "config.yaml"


def folder_name(strategy: str, stream: str, config: str) -> str:
    """Return the folder name of a config: it says what is run, and ends in a hash of all options."""
    plain = re.sub(r"[^\w.-]+", "_", f"{strategy}-{stream}")
    return f"{plain}-{hashlib.sha256(config.encode()).hexdigest()[:8]}"


def find_attempts(runs: Path, name: str) -> list[Path]:
    """Return the folders of all attempts of that name, the newest last."""
    numbered = re.compile(re.escape(name) + r"(?:\.(\d+))?")
    attempts = [(int(match[1] or 1), path) for path in runs.glob(f"{name}*") if (match := numbered.fullmatch(path.name))]
    return [path for _, path in sorted(attempts)]


def create(runs: Path, name: str, config: str) -> Path:
    """Make the folder of a new attempt, with its config. Raises OSError if it can't be written."""
    number = len(find_attempts(runs, name))
    while True:
        number += 1
        folder = runs / (name if number == 1 else f"{name}.{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # another process was quicker
            continue
        except OSError as error:
            raise OSError(f"the run folder {folder} can't be made ({error.strerror}): name another place with --runs") from None
        write_atomically(folder / CONFIG, lambda out: out.write(config.encode()))
        return folder


def find(run: str, runs: Path) -> Path:
    """Return the folder of an attempt, by its path or that of one of its seeds, its name in `runs`, or the id of its MLflow run.

    Raises UsageError if there is none.
    """
    for folder in (Path(run), runs / run):
        for path in (folder, folder.parent):
            if (path / CONFIG).is_file():
                return path
    tracked = find_run(run, runs)
    if (tracked is not None and (tracked.parent / CONFIG).is_file()) or (tracked is not None and (tracked / CONFIG).is_file()):
        return find(str(tracked), runs)
    raise UsageError(f"there is no run {run!r}: give its folder below {runs}, or the id of its MLflow run, which was tracked here")
