"""`clstream doctor`: what is installed, what data is there, and whether runs can be tracked, on one screen."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from clstream import __version__
from clstream.cli.command_parser import CommandParser
from clstream.cli.errors import printable
from clstream.cli.tables import wide_console

LEAST_DISK = 2**30
"""Bytes that must be free: checkpoints and MLflow's files are written all the time."""


OF_DEVELOPERS = ("test", "dev")
"""Extras that are for work on clstream itself."""


class Sign(NamedTuple):
    """What was looked at, and how it is.

    Args:
        topic: what it is about.
        text: how it is.
        wrong: whether something is to be done, or runs fail.

    """

    topic: str
    text: str
    wrong: bool = False


def doctor_command(arguments: list[str]) -> int:
    """`clstream doctor`: print what runs need, and return 0 if it is all there, 1 if not."""
    parser = CommandParser(
        "doctor",
        description="Say what is installed, what data is there, and whether runs can be tracked. Nothing is run or downloaded. "
        "The exit status is 1 if something that runs need is wrong; what may be absent is no fault.",
    )
    parser.add_argument("--data_root", "--data-root", help="folder with the data sets")
    parser.add_argument("--tracking_uri", "--tracking-uri", help="the MLflow store or server")
    parser.add_argument("--runs", default="runs", help="folder of the run folders")
    options = parser.parse_args(arguments)
    console, wrong = wide_console(), 0
    console.print(f"clstream {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    before = ""
    for sign in signs(options.data_root, options.tracking_uri, Path(options.runs)):
        topic, before = "" if sign.topic == before else sign.topic, sign.topic
        console.print(printable(f"  {'!!' if sign.wrong else 'ok':<4}{topic:<10}{sign.text}"), markup=False)
        wrong += sign.wrong
    console.print(f"{wrong} thing{'s' * (wrong > 1)} to mend, marked !!" if wrong else "all that runs need is there")
    return int(wrong > 0)


def signs(data_root: str | None, tracking_uri: str | None, runs: Path) -> Iterator[Sign]:
    """Yield what was looked at, one after the other."""
    yield from packages()
    yield from devices()
    yield from data(data_root)
    yield store(tracking_uri)
    yield from disk(runs)


def packages() -> Iterator[Sign]:
    """Yield what clstream needs, and its extras, as its own metadata says it."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in metadata.requires("clstream") or ()]
    except metadata.PackageNotFoundError:
        yield Sign("packages", "clstream is not installed, only found: pip install -e . in its folder", True)
        return
    plain = [requirement for requirement in wanted if "extra" not in str(requirement.marker or "")]
    shown = ", ".join(f"{requirement.name} {_version(requirement.name) or 'absent'}" for requirement in plain)
    bad = [str(requirement).partition(";")[0] for requirement in plain if not _fits(requirement)]
    yield Sign("packages", shown)
    if bad:
        yield Sign("packages", f"clstream needs {', '.join(bad)}: pip install {' '.join(repr(name) for name in bad)}", True)
    here, absent = list[str](), list[str]()
    extras = re.findall(r"""extra == ["'](\w+)""", " ".join(str(requirement.marker) for requirement in wanted))
    for extra in dict.fromkeys(extra for extra in extras if extra not in OF_DEVELOPERS):
        own = [
            requirement
            for requirement in wanted
            if requirement.marker is not None
            and not requirement.marker.evaluate({"extra": ""})
            and requirement.marker.evaluate({"extra": extra})
        ]
        (here if all(map(_fits, own)) else absent).append(extra)
    missing = f"; not {', '.join(absent)}: pip install 'clstream[{','.join(absent)}]' for those that you want" if absent else ""
    yield Sign("extras", f"{', '.join(here) or 'none'}{missing}")


def _version(name: str) -> str:
    """Return the version of a package that is installed, "" if it isn't."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _fits(requirement: object) -> bool:
    """Return whether a package that is required is installed, in a version that will do."""
    from packaging.requirements import Requirement

    assert isinstance(requirement, Requirement)
    version = _version(requirement.name)
    return bool(version) and requirement.specifier.contains(version, prereleases=True)


def devices() -> Iterator[Sign]:
    """Yield the devices that torch has."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shown = [f"cpu ({cores} core{'s' * (cores > 1)}, {torch.get_num_threads()} threads)"]
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(number)
        shown.append(f"cuda:{number} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)")
    shown += ["mps"] * torch.backends.mps.is_available()
    yield Sign("devices", ", ".join(shown))


def data(root: str | None) -> Iterator[Sign]:
    """Yield the data sets that are there, and whether they are whole."""
    module = importlib.import_module("clstream.streams.data")
    folder = module.data_root(root)
    said = {name: module.look(name, root) for name in module.PLACES}
    whole = [name for name, wrong in said.items() if wrong == ""]
    absent = [name for name, wrong in said.items() if wrong is None]
    from_environment = "" if root else ", from CLSTREAM_DATA" if os.environ.get("CLSTREAM_DATA") else ", the cache folder"
    rest = f"; not there, so downloaded where they are asked for: {', '.join(absent)}" if absent else ""
    yield Sign("data", f"{folder}{from_environment}: {', '.join(whole) or 'none'}{' whole' * bool(whole)}{rest}")
    for name, wrong in said.items():
        if wrong:
            yield Sign("data", f"{name}: {wrong}", True)


def store(uri: str | None) -> Sign:
    """Return whether the place where runs are tracked can be written."""
    from clstream.tracking.addresses import check_answers, tracking_uri, without_password
    from clstream.tracking.mlflow_schema import check_schema

    where = tracking_uri(uri)
    shown = without_password(where)
    try:
        check_answers(where)
        check_schema(where, shown)
    except Exception as error:  # noqa: BLE001  # drivers of databases have errors of their own
        return Sign("store", f"{shown}: {' '.join(str(error).split())[:300]}", True)
    if where.startswith(("http://", "https://")):
        return Sign("store", f"{shown} answers")
    file = Path(where.removeprefix("sqlite:///"))
    if where.startswith("sqlite:///") or ":" not in where:
        place = file if file.exists() else _nearest(file)
        if not os.access(place, os.W_OK) or not os.access(_nearest(file.parent), os.W_OK):
            return Sign("store", f"{shown} can't be written: choose another --tracking-uri, or mend its permissions", True)
        return Sign("store", f"{shown}{'' if file.exists() else ', not there yet: the first run makes it'}")
    return Sign("store", f"{shown} answers")


def disk(runs: Path) -> Iterator[Sign]:
    """Yield how much is free where run folders are."""
    place = _nearest(runs.absolute())
    free = shutil.disk_usage(place).free
    text = f"{free / 2**30:.1f} GiB free for {runs}"
    if not os.access(place, os.W_OK):
        yield Sign("disk", f"{text}, and {place} can't be written: name another folder with --runs", True)
    else:
        yield Sign("disk", text + (", less than 1 GiB: runs may fail to write" if free < LEAST_DISK else ""), free < LEAST_DISK)


def _nearest(path: Path) -> Path:
    """Return a path, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())
