"""Settings: what config files and options set, in the order in which they were given. Later ones win.

Between two configs the order of options is free, so that a class may be named after its options. An option that names another
class than a setting before it did drops that one's options, and so does a config.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from clstream.cli.errors import UsageError, nearest
from clstream.cli.yaml_files import read_yaml

CHOICES = ("stream", "strategy", "model", "adapter")
"""The options that name a class or function, whose own options follow after a dot."""

TRAIN = "train"
"""The option of the training controls, which follow after a dot too; it names no class."""

MOST_SEEDS = 1000

Key = tuple[str, ...]


class Setting(NamedTuple):
    """One value for one option.

    Args:
        key: of the option, as ("strategy", "optimizer", "lr"); what a class is given, not `init_args`, lies between.
        value: the text of an option, or whatever a config holds.
        file: the config that it is from; "" for the command line.
        appends: whether the value is added to a list, as by --strategy.regularisers+=.

    """

    key: Key
    value: Any
    file: str = ""
    appends: bool = False

    @property
    def option(self) -> str:
        """Its option as it is typed."""
        return "--" + ".".join(self.key)

    @property
    def where(self) -> str:
        """The beginning of a sentence about it: its config, or nothing."""
        return f"{self.file}: " if self.file else ""


def read(
    arguments: list[str],
    options: Mapping[str, bool],
    owner_of: Callable[[str], str],
    configs: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[list[Setting]]:
    """Return the settings of a command's arguments: those of each config file, and those of the options between two of them.

    Args:
        arguments: as typed.
        options: the names of all options, and whether each takes a value.
        owner_of: says of another name what it is an option of, as "stream" or "strategy.optimizer", for the error.
        configs: what is in config files that were read before, by the name that `--config` gives.

    Raises:
        UsageError: for an unknown option, one without its value or given twice, and a config that can't be read.

    """
    parts: list[list[Setting]] = [[]]
    words = iter(_split(arguments, options, owner_of))
    for name, value in words:
        if name == "config":
            loaded = configs[value] if configs and value in configs else read_yaml(value, "config file")
            parts += [list(_of_config(value, loaded, options, owner_of)), []]
        else:
            appends = name.endswith("+")
            parts[-1].append(Setting(tuple(name.removesuffix("+").split(".")), value, "", appends))
    for part in parts:
        _check_once([setting for setting in part if not setting.file])
    return [part for part in parts if part]


def _split(arguments: list[str], options: Mapping[str, bool], owner_of: Callable[[str], str]) -> Iterator[tuple[str, str]]:
    """Yield the name and the value of each option; that of an option that takes none is "true"."""
    position = 0
    while position < len(arguments):
        word, equals, value = arguments[position].partition("=")
        position += 1
        if not word.startswith("-") or not word.strip("-"):
            loose = " ".join([word + equals + value, *takewhile(lambda other: not other.startswith("-"), arguments[position:])])
            if loose.endswith((".yaml", ".yml")):
                raise UsageError(f"{loose!r} belongs to no option: a config file is given as --config {loose}")
            raise UsageError(
                f"{loose!r} belongs to no option; several values are written with commas and no spaces, as 0,1,2 or [0,1,2]"
            )
        name = word.removeprefix("--").replace("-", "_")
        root, _, rest = name.partition(".")
        if not word.startswith("--") or root.removesuffix("+") not in options or (rest and root not in (*CHOICES, TRAIN)):
            owner = owner_of(name) if word.startswith("--") else ""
            near = f": did you mean --{owner}.{name}?" if owner else nearest(word, [f"--{option}" for option in options])
            raise UsageError(f"unknown option {word}{near}")
        if not options[root.removesuffix("+")]:
            if equals:
                raise UsageError(f"{word} takes no value")
            value = "true"
        elif not equals:
            if position == len(arguments) or arguments[position].startswith("--"):
                after = f"; {arguments[position]} is an option" if position < len(arguments) else ""
                raise UsageError(f"{word} needs {'the name of a ' + name if name in CHOICES else 'a value'}{after}")
            value = arguments[position]
            position += 1
        yield name, value


def _check_once(settings: list[Setting]) -> None:
    """Raise UsageError for an option that is typed twice; those of an item of a list may be, after each item."""
    lists = {setting.key for setting in settings if setting.appends}
    values: dict[Key, Any] = {}
    for setting in settings:
        if setting.appends or any(setting.key[: len(key)] == key for key in lists):
            continue
        if setting.key in values:
            raise UsageError(
                f"{setting.option} is given twice, as {values[setting.key]} and as {setting.value}: keep the right one"
            )
        values[setting.key] = setting.value
    if ("seed",) in values and ("seeds",) in values:
        raise UsageError("--seed and --seeds are both given: --seeds takes several, as 0,1,2")


def _of_config(
    file: str, loaded: Mapping[str, Any], options: Mapping[str, bool], owner_of: Callable[[str], str]
) -> Iterator[Setting]:
    """Yield the settings of a config file. Raises UsageError for keys that are no options, and for what names nothing."""
    taken = [option for option in options if option not in ("config", "print_config", "trust", "help")]
    if loaded.get("seeds") is not None and "seed" in loaded:
        raise UsageError(f"{file}: seed and seeds are both given: seeds takes several, as [0, 1, 2]")
    for name, value in loaded.items():
        if name == TRAIN or name.startswith(f"{TRAIN}."):
            yield from _of_training(name, value, file)
            continue
        if name == "trust":
            raise UsageError(f"{file}: a config can't say what to trust: give --trust on the command line")
        if name not in taken:
            kind, _, option = name.rpartition(".")
            owner = kind if kind in CHOICES else owner_of(name)
            near = f": write it below {owner} and init_args, or give --{owner}.{option}" if owner else nearest(name, taken)
            raise UsageError(f"{file}: there is no option {name!r}{near}")
        if value is None:
            raise UsageError(
                f"{file}: {name} is null: {f'name a {name}' if name in CHOICES else 'give a value'}, or leave the key out"
            )
        if not options[name] and not isinstance(value, bool):
            raise UsageError(f"{file}: {name} takes true or false, not {str(value)[:60]}")
        if name not in CHOICES or isinstance(value, str):
            yield Setting((name,), value, file)
        elif isinstance(value, dict):
            yield from _of_class((name,), value, file)
        else:
            raise UsageError(f"{file}: {name} takes a name, or class_path and init_args, not {str(value)[:60]}")


def _of_training(name: str, value: Any, file: str) -> Iterator[Setting]:
    """Yield the training controls that a config names, below `train` or each by itself."""
    given = {name.removeprefix(f"{TRAIN}."): value} if name != TRAIN else value
    if not isinstance(given, dict):
        raise UsageError(f"{file}: {TRAIN} takes training controls with their values, as clip: 1.0, not {str(value)[:60]}")
    for option, setting in given.items():
        if setting is None:
            raise UsageError(f"{file}: {TRAIN}.{option} is null: give a value, or leave the key out")
        yield Setting((TRAIN, str(option)), setting, file)


def _of_class(key: Key, given: dict[str, Any], file: str) -> Iterator[Setting]:
    """Yield the settings of a class that a config names with its arguments."""
    name = ".".join(key)
    if unknown := [str(other) for other in given if other not in ("class_path", "init_args")]:
        raise UsageError(
            f"{file}: {name} has no key {unknown[0]!r}: it takes class_path, the name, and init_args, with the options"
        )
    if "class_path" in given:
        if not isinstance(given["class_path"], str):
            raise UsageError(f"{file}: the class_path of {name} must be a name, not {str(given['class_path'])[:60]}")
        yield Setting(key, given["class_path"], file)
    arguments = given.get("init_args")
    if arguments is not None and not isinstance(arguments, dict):
        raise UsageError(f"{file}: the init_args of {name} must be options with their values, not {str(arguments)[:60]}")
    for option, value in (arguments or {}).items():
        if isinstance(value, dict) and ("class_path" in value or set(value) == {"init_args"}):
            yield from _of_class((*key, str(option)), value, file)
        else:
            yield Setting((*key, str(option)), value, file)


def parse_seeds(given: Any) -> list[int]:
    """Return the seeds that a value of --seeds stands for: 0-4,7 is 0, 1, 2, 3, 4 and 7.

    Raises UsageError for what are not distinct whole numbers from 0 up.
    """
    words = [str(word).strip() for word in given] if isinstance(given, list) else str(given).strip("[]() ").split(",")
    seeds: list[int] = []
    for word in words:
        match = re.fullmatch(r"(\d{1,19})(?:\s*-\s*(\d{1,19}))?", word.strip())
        if match is None:
            raise UsageError(f"--seeds takes whole numbers from 0 up, as 0,1,2 or 0-2, not {word.strip()!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UsageError(f"--seeds goes from the lower seed to the higher one: {last}-{first}, not {word.strip()}")
        if last - first >= MOST_SEEDS or len(seeds) >= MOST_SEEDS:
            raise UsageError(f"--seeds takes at most {MOST_SEEDS:,} seeds")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds names one seed twice: {given}")
    return seeds


def merge(parts: list[list[Setting]]) -> tuple[list[Setting], list[str]]:
    """Return what is left of settings where later ones win, and a sentence on each class whose options were dropped."""
    kept: list[Setting] = []
    notes: list[str] = []
    for part in parts:
        for setting in _classes_first(part):
            if setting.appends:
                kept.append(setting)
                continue
            before = [earlier for earlier in kept if earlier.key == setting.key]
            if before and _same_class(before[-1].value, setting.value):
                continue  # so that its options stay with it
            if before:
                dropped = [earlier for earlier in kept if _below(earlier.key, setting.key)]
                if dropped:
                    options = ", ".join(sorted(".".join(earlier.key[len(setting.key) :]) for earlier in dropped))
                    name = ".".join(setting.key)
                    notes.append(f"{name} is {setting.value}, so the options of {before[-1].value} are dropped: {options}")
                kept = [earlier for earlier in kept if earlier not in dropped]
            replaced = (("seed",), ("seeds",)) if setting.key in (("seed",), ("seeds",)) else (setting.key,)
            kept = [earlier for earlier in kept if earlier.key not in replaced]
            kept.append(setting)
    return kept, notes


def _classes_first(part: list[Setting]) -> list[Setting]:
    """Return settings with each class before its options, in whatever order they were typed."""
    keys = [setting.key for setting in part]
    first = [setting for setting in part if not setting.appends and any(_below(key, setting.key) for key in keys)]
    return [*sorted(first, key=lambda setting: len(setting.key)), *(setting for setting in part if setting not in first)]


def _below(key: Key, other: Key) -> bool:
    return len(key) > len(other) and key[: len(other)] == other


def _same_class(first: Any, second: Any) -> bool:
    """Return whether two values name the same class: SGD and torch.optim.SGD do."""
    if not (isinstance(first, str) and isinstance(second, str)):
        return False
    ours = [
        name if "." not in name or not name.startswith(("clstream.", "torch.")) else name.rpartition(".")[2]
        for name in (first, second)
    ]
    return first == second or (("." in first) != ("." in second) and ours[0] == ours[1])


def strings(value: Any) -> Iterator[str]:
    """Yield all texts in a value of a config, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, Collection):
        for item in value:
            yield from strings(item)


def trusted_in(settings: list[Setting]) -> list[str]:
    """Return the packages that the command line itself names, by --trust or in the value of an option."""
    from clstream.cli.lookup import top_modules  # it needs torch, and texts of help don't

    typed = [setting for setting in settings if not setting.file]
    whole = {name for setting in typed if setting.key == ("trust",) for name in split_names(setting.value)}
    if odd := [name for name in whole if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name) or name.startswith("jsonargparse")]:
        raise UsageError(f"--trust takes names of packages with commas between them, as my_package, not {odd[0][:60]!r}")
    return sorted(
        whole | {top for setting in typed for text in strings(setting.value) for top in top_modules(text)} - {"torch", "clstream"}
    )


def split_names(value: Any) -> list[str]:
    """Return the names in the value of an option that takes several: a list, or a text with commas."""
    return (
        [str(name) for name in value] if isinstance(value, list) else [name.strip() for name in str(value).strip("[]").split(",")]
    )


def as_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted options as a config has them, with class_path and init_args."""
    tree: dict[str, Any] = {}
    for option in sorted(settings, key=lambda option: option.count(".")):
        value, (kind, *parts) = settings[option], option.split(".")
        if kind not in CHOICES:
            tree[option] = value
            continue
        whole = value if isinstance(value, Mapping) and "class_path" in value else None
        place = tree.setdefault(kind, {})
        for part in parts:
            arguments = place.setdefault("init_args", {})
            if not isinstance(arguments.get(part), dict):
                arguments[part] = {}
            place = arguments[part]
        if whole is not None:
            place |= {"class_path": whole["class_path"], "init_args": dict(whole.get("init_args") or {})}
        elif isinstance(value, str) and (not parts or _has_options(settings, option)):
            place["class_path"] = value
        elif parts:
            _set(tree[kind], parts, value)
    return tree


def _has_options(settings: Mapping[str, Any], option: str) -> bool:
    return any(name.startswith(f"{option}.") for name in settings)


def _set(place: dict[str, Any], parts: Sequence[str], value: Any) -> None:
    for part in parts[:-1]:
        place = place["init_args"][part]
    place["init_args"][parts[-1]] = value
