"""Configs and anchors are read as data: bounded, each key once, and one sentence for what is none."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from clstream.cli import main
from clstream.cli.errors import UsageError
from clstream.cli.yaml_files import DEEPEST, LARGEST, dump_yaml, load_yaml, read_yaml

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

NO_CONFIGS: list[tuple[str, bytes, str]] = [
    ("twice", b"seed: 1\nstream: blobs\nseed: 2\n", "can't be read: 'seed' is given twice, in line 1 and in line 3"),
    ("twice, nested", b"stream:\n  class_path: blobs\n  init_args:\n    tasks: 2\n    seed: 0\n    tasks: 5\n",
     "'tasks' is given twice, in line 4 and in line 6"),
    ("twice, in a line", b"stream: {class_path: blobs, class_path: split_mnist}\n", "'class_path' is given twice, in line 1"),
    ("twice, hexadecimal", b"stream: {init_args: {1: 2, 0x1: 3}}\n", "one key is given twice, in two spellings"),
    ("twice, a truth", b"stream: {init_args: {true: 2, True: 3}}\n", "one key is given twice, in two spellings"),
    ("twice, nothing", b"stream:\n  ~: 2\n  null: 3\n", "one key is given twice, in two spellings"),
    ("twice, quoted", b"seed: 1\n'seed': 2\n", "'seed' is given twice, in line 1 and in line 2"),
    ("laughs", LAUGHS.encode(), "anchors and aliases (& and *) are not taken: write it out in line 1"),
    ("itself", b"stream: &a\n  class_path: *a\n", "anchors and aliases (& and *) are not taken: write it out in line 1"),
    ("merged", b"stream: {class_path: blobs, init_args: {<<: {tasks: 2}}}\n", "blobs has no option '<<'"),
    ("deep", b"stream: " + b"[" * 5000 + b"]" * 5000, f"it is nested deeper than {DEEPEST} levels in line 1"),
    ("deep in lines", b"".join(b" " * n + b"a:\n" for n in range(500)), f"nested deeper than {DEEPEST} levels"),
    ("large", b"# " + b"x" * LARGEST, "is larger than 1,048,576 bytes"),
    ("digits", b"seed: " + b"9" * 10000, "can't be read: it holds a number of thousands of digits"),
    ("digits, hexadecimal", b"seed: 0x" + b"f" * 10000, "can't be read: it holds a number of thousands of digits"),
    ("digits of a name", b"stream: {class_path: 0x" + b"f" * 10000 + b"}", "it holds a number of thousands of digits"),
    ("code", b"seed: !!python/object/apply:os.system ['touch ran']\n", "tags are not taken"),
    ("binary tag", b"seed: !!binary aGVsbG8=\n", "tags are not taken"),
    ("latin-1", "experiment: Übung\n".encode("latin-1"), "is not text in UTF-8 (byte 13): save it as such"),
    ("utf-16", "seed: 1\n".encode("utf-16"), "is not text in UTF-8 (byte 1)"),
    ("binary", bytes(range(256)), "is not text in UTF-8"),
    ("nul", b"seed: 1\x00\n", "can't be read: it holds what no text does"),
    ("empty", b"", "is empty"),
    ("comments", b"# nothing\n", "is empty"),
    ("list", b"- stream: blobs\n", "holds a list: it takes keys with values"),
    ("text", b"blobs\n", "holds only 'blobs': it takes keys with values"),
    ("two documents", b"seed: 1\n---\nseed: 2\n", "can't be read: but found another document in line 2"),
    ("odd key", b"? [1, 2]\n: 3\n", "a key must be a word or a number in line 1"),
    ("number as key", b"1: 2\n", "has the key 1, which is no word"),
    ("broken", b"stream: [blobs\nseed: 1\n", "can't be read: expected ',' or ']', but got ':' in line 2"),
    ("null", b"stream: null\n", "stream is null: name a stream, or leave the key out"),
    ("null strategy", b"strategy:\n", "strategy is null: name a strategy"),
    ("number", b"model: 3\n", "model takes a name, or class_path and init_args, not 3"),
    ("list of streams", b"stream: [blobs]\n", "stream takes a name, or class_path and init_args, not ['blobs']"),
    ("no class", b"stream: {tasks: 2}\n", "stream has no key 'tasks': it takes class_path, the name, and init_args"),
    ("odd class", b"stream: {class_path: [blobs]}\n", "the class_path of stream must be a name, not ['blobs']"),
    ("odd options", b"stream: {class_path: blobs, init_args: [1]}\n", "the init_args of stream must be options with their values"),
    ("unknown", b"sed: 1\n", "there is no option 'sed': did you mean seed?"),
    ("unknown, nested", b"strategy: {class_path: Replay, init_args: {capacty: 3}}\n",
     "Replay has no option 'capacty': did you mean capacity?"),
    ("dashes", b"evaluate-every: 3\n", "there is no option 'evaluate-every': did you mean evaluate_every?"),
    ("null seed", b"seed: null\n", "seed is null: give a value, or leave the key out"),
    ("a flag", b"tune: 3\n", "tune takes true or false, not 3"),
    ("both", b"seed: 1\nseeds: [1, 2]\n", "seed and seeds are both given"),
    ("a stream's", b"epochs: 3\n", "there is no option 'epochs': write it below stream and init_args, or give --stream.epochs"),
    ("dotted", b"stream.epochs: 3\n", "no option 'stream.epochs': write it below stream and init_args, or give --stream.epochs"),
    ("config in config", b"config: other.yaml\n", "there is no option 'config'"),
    ("no run", b"print_config: true\n", "there is no option 'print_config'"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "sentence"), [case[1:] for case in NO_CONFIGS], ids=[case[0] for case in NO_CONFIGS])
def test_what_is_no_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: bytes, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_bytes(content)
    start = time.process_time()
    assert main(["run", "--config", "c.yaml"]) == 2
    assert time.process_time() - start < 10
    text = capsys.readouterr().err
    assert text.startswith("clstream: error: ") and text.count("\n") == 1 and sentence in text and "c.yaml" in text
    assert len(text) < 400 and not Path("ran").exists()


@pytest.mark.parametrize("content", [case[1] for case in NO_CONFIGS[:19]], ids=[case[0] for case in NO_CONFIGS[:19]])
def test_anchors_go_the_same_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_bytes(content)
    assert main(["verify", "a.yaml"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("clstream: error: the anchor") and text.count("\n") == 1 and len(text) < 400


def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.yaml")
    Path("folder.yaml").mkdir()
    for name, sentence in (
        ("folder.yaml", "is a folder: give a YAML file"),
        ("pipe.yaml", "is no regular file"),
        ("/dev/zero", "is no regular file"),
        ("missing.yaml", "there is no config file missing.yaml"),
        ("x" * 300, "can't be read: File name too long"),
    ):
        for command in (["run", "--config", name], ["compare", name], ["show", "--config", name]):
            assert main(command) == 2
            assert sentence in capsys.readouterr().err
    assert main(["verify", "folder.yaml"]) == 2
    assert "the anchor file folder.yaml is a folder" in capsys.readouterr().err


def test_numbers_are_those_of_the_command_line() -> None:
    text = "[1e-3, 010, 1_000, 0x10, -5, 1:30, 2020-01-02, .5, 1., 1e5, -.inf, .nan, '7', true, null, ~, 1.5E+3]"
    values = load_yaml(text)
    assert math.isnan(values.pop(11))
    assert values == [0.001, "010", 1000, 16, -5, "1:30", "2020-01-02", 0.5, 1.0, 1e5, -math.inf, "7", True, None, None, 1500.0]


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc_- .:&*!'1e", max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(PLAIN, st.booleans())
@settings(max_examples=100, deadline=None)
def test_what_is_written_is_read(value: object, flow: bool) -> None:
    assert load_yaml(dump_yaml(value, flow=flow)) == value


def test_a_list_that_is_in_two_places_is_written_twice() -> None:
    shared = [1, 2]
    assert load_yaml(dump_yaml({"a": shared, "b": shared})) == {"a": [1, 2], "b": [1, 2]}
    assert "&" in yaml.safe_dump({"a": shared, "b": shared})  # PyYAML's own way, which the loader refuses


def test_bytes_of_utf8_with_a_mark_are_read(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes("\ufeffexperiment: Übung\n".encode())
    assert read_yaml(tmp_path / "c.yaml", "config file") == {"experiment": "Übung"}
    with pytest.raises(UsageError, match=r"the thing .* is a folder"):
        read_yaml(tmp_path, "thing")
