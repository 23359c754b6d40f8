"""The documentation: its snippets run, its commands parse, its links lead somewhere, and what it names is there."""

from __future__ import annotations

import contextlib
import io
import pkgutil
import re
import shlex
import shutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from conftest import HAS_AVALANCHE

from clstream.cli import main
from clstream.cli.anchors import load_anchor
from clstream.cli.compare import compare_parser, tracking_parser
from clstream.cli.episodes import episodes_parser
from clstream.cli.episodes import options_of_run as options_of_episodes
from clstream.cli.parser import as_yaml, parse_run, run_parser
from clstream.cli.pretrain import options_of_run, pretrain_parser
from clstream.cli.profile import options_of_run as options_of_profile
from clstream.cli.profile import profile_parser
from clstream.cli.searched import parse_search
from clstream.cli.sweep import sweep_parser
from clstream.cli.sweep_plan import plan_of
from clstream.cli.tune import split_tune
from clstream.cli.watch import options_of_run as options_of_watch
from clstream.cli.watch import watch_parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("README.md")])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# ([\w./-]+\.(?:py|yaml))\n")
OURS = ("strategies/", "streams/", "clstream/")
FOLDERS = ("clstream", "strategies", "streams", "experiments")
BESIDE_RUN = {"prove-resume": ("--kills", "--kill_seed", "--out")}
"""The options, each with a value, of commands that take those of `clstream run` too."""
READERS_FILES = {"my_file.py": "from clstream import Strategy\n\n\nclass MyStrategy(Strategy): ...\n"}


class Block(NamedTuple):
    """A fenced block: its language, text, and the line of the page that its first line is on."""

    language: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The file that its first line names, if it names one."""
        named = FILE.match(self.text)
        return named[1] if named else None


def blocks(page: Path, *languages: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [Block(match[1], match[2], text.count("\n", 0, match.start(2)) + 1) for match in FENCE.finditer(text)]
    return [block for block in found if block.language in languages]


QUICK = {"README.md", "events.md", "quickstart.md", "write-a-strategy.md"}
"""The pages whose snippets `make test` runs too; `make test-all` runs those of all."""


def having(*languages: str, slow: bool = False) -> list:
    """Return the pages with blocks in some languages; if it is `slow` to use them, `make test` leaves out all but `QUICK`."""
    return [
        pytest.param(page, id=str(page.relative_to(ROOT)), marks=[pytest.mark.slow] * (slow and page.name not in QUICK))
        for page in PAGES
        if blocks(page, *languages)
    ]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with the files that the pages tell their readers to make, and the project's experiments."""
    made = {name: [text] for name, text in READERS_FILES.items()}
    for page in PAGES:
        for block in blocks(page, "python", "yaml"):
            if block.file and not block.file.startswith(OURS):
                made.setdefault(block.file, []).append(block.text)
    for name, texts in made.items():
        (tmp_path / name).write_text("\n\n".join(texts), encoding="utf-8")
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in made:
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield tmp_path
    for name in made:
        sys.modules.pop(name.removesuffix(".py"), None)


def failing_line(error: BaseException, page: Path) -> int | None:
    """Return the line of the page where an error was raised, or from which it was called."""
    if isinstance(error, SyntaxError) and error.filename == str(page):
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(page)]
    return lines[-1] if lines else None


@pytest.mark.parametrize("page", having("python", slow=True))
def test_snippets_run(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if any("import_avalanche(" in block.text for block in blocks(page, "python")):
        request.getfixturevalue("avalanche")  # left out where it is not installed
    if any("mlflow" in block.text for block in blocks(page, "python")):
        shutil.copy(request.getfixturevalue("migrated"), folder / "mlflow.db")
    module = ModuleType("snippets")
    monkeypatch.setitem(sys.modules, "snippets", module)  # dataclasses look their module up
    for block in blocks(page, "python"):
        try:
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), vars(module))
        except Exception as error:  # noqa: BLE001  # whatever it is, it is named with its line
            where = failing_line(error, page) or block.line
            pytest.fail(f"{page.relative_to(ROOT)}:{where}: {type(error).__name__}: {error}", pytrace=False)


@pytest.mark.parametrize("page", having("python"))
def test_excerpts_are_as_in_the_source(page: Path) -> None:
    for block in blocks(page, "python"):
        if block.file and block.file.startswith(OURS):
            source = iter((ROOT / block.file).read_text(encoding="utf-8").splitlines())
            for number, line in enumerate(block.text.splitlines()[1:], block.line + 1):
                assert not line.strip() or line in source, f"{page.relative_to(ROOT)}:{number}: not in {block.file}: {line}"


def commands(page: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the lines of the shell blocks of a page, by number, as words."""
    for block in blocks(page, "sh"):
        text = block.text.replace("\\\n", "  ")
        for number, line in enumerate(text.splitlines(), block.line):
            words = shlex.split(line, comments=True)
            if words:
                yield number, words


@pytest.mark.parametrize("page", having("sh"))
def test_commands_parse(page: Path, folder: Path) -> None:
    for number, words in commands(page):
        if not HAS_AVALANCHE and any(word.startswith("avalanche:") for word in words):
            continue
        where = f"{page.relative_to(ROOT)}:{number}: {shlex.join(words)}"
        try:
            check_command(words)
        except Exception as error:  # noqa: BLE001
            pytest.fail(f"{where}: {type(error).__name__}: {error}", pytrace=False)


def check_command(words: list[str]) -> None:
    """Refuse a command that the program would refuse, without running it."""
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in targets, f"the Makefile has no target {words[1]!r}"
    if words[0] != "clstream":
        return
    command, arguments = words[1], words[2:]
    output = None
    if ">" in arguments:
        cut = arguments.index(">")
        arguments, output = arguments[:cut], arguments[cut + 1]
    if command == "run":
        text = as_yaml(*parse_run(arguments))
        if output is not None:
            Path(output).write_text(text, encoding="utf-8")
    elif command == "compare":
        first = next((index for index, word in enumerate(arguments) if word.startswith("-")), len(arguments))
        assert arguments[:first], "nothing to compare"
        _, rest = compare_parser().parse_known_args(arguments[first:])
        for file in arguments[:first]:
            if file.startswith(("mlflow:", "sweeps/", "runs")) or file.endswith(".jsonl"):  # records, of what was run before
                tracking_parser().parse_args(rest)
            else:
                assert Path(file).is_file(), f"there is no {file}"
                parse_run(["--config", file, *rest])
    elif command == "sweep":
        own, rest = sweep_parser().parse_known_args(arguments)
        if Path(own.grid).is_file():  # a reader's own is shown beside
            plan_of(own.grid, rest)
    elif command == "pretrain":
        parse_run(options_of_run(*pretrain_parser().parse_known_args(arguments)))
    elif command == "profile":
        parse_run(options_of_profile(profile_parser().parse_known_args(arguments)[1]))
    elif command == "episodes":
        parse_run(options_of_episodes(episodes_parser().parse_known_args(arguments)[1]))
    elif command == "watch":
        own, rest = watch_parser().parse_known_args(arguments)
        parse_run(options_of_watch(own.folder, rest))
    elif command == "tune":
        parse_search(split_tune(arguments)[1])
    elif command == "show":
        parse_run(
            [
                "--stream",
                *[
                    word
                    for place, word in enumerate(arguments)
                    if {"--out", "--by"}.isdisjoint(arguments[max(0, place - 1) : place + 1])
                ],
            ]
        )
    else:
        known = help_of(command)
        if command in BESIDE_RUN:
            own = [position for position, word in enumerate(arguments) if word in BESIDE_RUN[command]]
            rest = [word for position, word in enumerate(arguments) if {position, position - 1}.isdisjoint(own)]
            parse_run(options_of_episodes(rest[1:]) if rest[0] == "episodes" else rest)
            arguments = [arguments[position] for position in own]
        options = [word.partition("=")[0] for word in arguments if word.startswith("--")]
        assert all(re.search(rf"{option}\b", known) for option in options), f"{command} knows only {known}"
        if command == "verify" and arguments and not arguments[0].startswith("-"):
            load_anchor(arguments[0])


def help_of(command: str) -> str:
    """Return what `clstream COMMAND --help` prints."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([command, "--help"])
        except SystemExit as stop:
            status = stop.code
    assert status == 0, err.getvalue()
    return out.getvalue()


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES if page.parent.name == "docs"])
def test_lines_fit(page: Path) -> None:
    long = [number for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 120]
    assert not long, f"{page.relative_to(ROOT)}: lines {long} are longer than 120"


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.relative_to(ROOT)}: there is no {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", FENCE.sub("", file.read_text(encoding="utf-8")), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, f"{page.relative_to(ROOT)}: {name or page.name} has no section {anchor}"


def test_the_readme_leads_to_every_page_of_the_docs() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [page.name for page in ROOT.glob("docs/*.md") if f"](docs/{page.name})" not in readme]


def test_the_quickstart_names_every_option_of_run() -> None:
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    options = {option for action in run_parser()._actions for option in action.option_strings if option.startswith("--")}
    plain = {option for option in options if "." not in option and "+" not in option and option != "--help"}
    assert {option for option in plain if not re.search(rf"{option}\b", page)} == set()


SOURCE = (file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
TEXTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *SOURCE])
"""What names modules and files of ours: all pages, and the source with its docstrings and comments."""


def is_there(name: str) -> bool:
    """Return whether a dotted name can be imported: a module, or what is in one."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_names_of_ours_can_be_imported() -> None:
    named = {
        (name, f"{file.relative_to(ROOT)} names {name}")
        for file in TEXTS
        for name in re.findall(r"\bclstream(?:\.[A-Za-z_]\w*)+", file.read_text(encoding="utf-8"))
    }
    there = {name: is_there(name) for name in {name for name, _ in named}}
    assert len(there) > 100
    assert not [sentence for name, sentence in sorted(named) if not there[name]]


def test_files_of_ours_are_there() -> None:
    beginning = "|".join(re.escape(folder) for folder in (*FOLDERS, "tests", "docs", ".ci"))
    for file in TEXTS:
        for path in re.findall(rf"`((?:{beginning})/[\w/.-]*)", file.read_text(encoding="utf-8")):
            assert (ROOT / path).exists(), f"{file.relative_to(ROOT)} names {path}"
