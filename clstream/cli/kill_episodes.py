"""Kill test of episodes: once run through, and once killed by SIGKILL and resumed again and again; their outcomes are compared."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from clstream.cli.episodes import episodes_command
from clstream.cli.errors import Failure
from clstream.episodes.outcomes import EpisodeOutcome
from clstream.episodes.record import FILE, read_record

POLL = 0.002
"""Seconds between two looks at how many episodes are over."""


def kill_episodes(
    arguments: list[str], kills: int, folder: Path, seed: int, report: Callable[[str], None]
) -> tuple[int, int, str | None]:
    """Run what the options of `clstream episodes` say, once through and once with kills, and compare.

    Args:
        arguments: the options, without --out and --resume.
        kills: how often the second run is killed.
        folder: an empty one for both runs.
        seed: of the moments of the kills.
        report: is given a line on each step.

    Returns the number of kills, that of episodes, and the first difference; None if there is none but in seconds.
    Raises Failure if a run fails by itself.
    """
    whole, killed = folder / "whole", folder / "killed"
    report("once through")
    _run(arguments, whole)
    expected = read_record(whole / FILE)
    count, draw, done = len(expected[1]), random.Random(seed), 0
    for number in range(kills):
        over = _over(killed)
        until = over + 1 + draw.randrange(max(1, (count - over) // (kills - number + 1)))
        process = _start(arguments, killed)
        try:
            while process.poll() is None and _over(killed) < until:
                time.sleep(POLL)
            time.sleep(draw.uniform(0, 0.05))
        finally:
            process.kill()
            process.wait()
        if process.returncode >= 0:
            report("it ended before it was killed")
            break
        done += 1
        report(f"kill {number + 1:3}  {_over(killed)} of {count} episodes were over")
    _run(arguments, killed)
    return done, count, _difference(expected, read_record(killed / FILE))


def _start(arguments: list[str], out: Path) -> subprocess.Popen[bytes]:
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "clstream.cli", "episodes", *arguments, "--out", str(out), "--resume"]
    with (out.parent / f"{out.name}.txt").open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def _run(arguments: list[str], out: Path) -> None:
    if episodes_command([*arguments, "--out", str(out), "--resume"]) != 0:
        raise Failure("the run failed by itself")


def _over(out: Path) -> int:
    """Return how many episodes are over."""
    return max(0, (out / FILE).read_bytes().count(b"\n") - 1) if (out / FILE).exists() else 0


def _difference(
    expected: tuple[dict[str, object], list[EpisodeOutcome]], ended: tuple[dict[str, object], list[EpisodeOutcome]]
) -> str | None:
    """Return the first thing that differs between two records, but for seconds."""
    if expected[0] != ended[0]:
        return "what was run"
    if len(expected[1]) != len(ended[1]):
        return f"there are {len(expected[1])} episodes and {len(ended[1])}"
    for whole, own in zip(expected[1], ended[1], strict=True):
        for name in EpisodeOutcome.__slots__:
            values = getattr(whole, name), getattr(own, name)
            if name != "seconds" and repr(values[0]) != repr(values[1]):
                return f"{name} of episode {whole.index}: {values[0]} and {values[1]}"
    return None
