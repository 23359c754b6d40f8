"""Anchors: what `clstream verify` says of them; bounds of one side, assumed spreads, what each run draws anew."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from clstream.streams import split_digits

from clstream.cli import main
from clstream.cli.anchors import Anchor, anchor_names, load_anchor
from clstream.cli.errors import UsageError
from clstream.cli.parser import parse_run

SMALL: dict[str, Any] = {
    "about": "a small one", "config": {"strategy": "Finetune", "model": {"class_path": "Mlp", "init_args": {"hidden": [20]}}},
    "seeds": [0, 1], "metric": "average_accuracy", "expected": 0.2, "spread": 0.02, "runs": 10, "source": "here", "kind": "own",
    "minutes": 0.1,
}  # fmt: skip


def written(folder: Path, **changes: Any) -> str:
    """Write an anchor, and return its file."""
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(SMALL | changes))
    return str(file)


@pytest.mark.slow
def test_verify_says_inside_or_outside(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", written(tmp_path)]) == 0
    assert "INSIDE" in capsys.readouterr().out
    assert main(["verify", written(tmp_path, expected=0.9)]) == 1
    assert "OUTSIDE" in capsys.readouterr().out


@pytest.mark.slow
def test_anchors_can_all_be_read_and_parsed() -> None:
    assert {"er-split-mnist", "finetune-split-mnist", "joint-split-mnist", "replay-split-fashion-mnist"} <= set(anchor_names())
    for name in anchor_names():
        anchor = load_anchor(name)
        drawn = [word for option in anchor.seeded for word in (f"--{option}", "7")]  # each is an option of its stream
        parse_run(["--config", str(anchor.config_file()), *drawn])
        for figure in anchor:
            low, high = figure.interval(len(anchor.seeds))
            assert low < figure.expected < high and len(anchor.seeds) >= 3


def test_prediction_interval_of_an_anchor() -> None:
    """For 10 runs of spread 0.017, 5 more: 0.869 ± 2.2622 * 0.017 * sqrt(1/5 + 1/10) = 0.869 ± 0.02106."""
    low, high = load_anchor("er-split-mnist").interval(5)
    assert isinstance(load_anchor("er-split-mnist"), Anchor)
    assert (low, high) == (pytest.approx(0.84794, abs=1e-5), pytest.approx(0.89006, abs=1e-5))


def test_a_bound_from_below_is_met_by_anything_above(tmp_path: Path) -> None:
    """One run, spread 0.01: a mean of four more is above 0.97 - 1.64485 * 0.01 * sqrt(1/4 + 1) = 0.95161 with 95 %."""
    anchor = load_anchor(written(tmp_path, expected=0.97, spread=0.01, runs=1, spread_assumed=True, bound="below"))
    low, high = anchor.interval(4)
    assert low == pytest.approx(0.95161, abs=1e-5) and high == math.inf
    assert [anchor.verdict(mean, 4)[0] for mean in (0.95, 0.952, 1.0)] == [False, True, True]
    assert "above 0.9516" in anchor.verdict(0.95, 4)[1]
    both = load_anchor(written(tmp_path, expected=0.97, spread=0.01, runs=1, spread_assumed=True))
    assert not both.verdict(1.0, 4)[0]


@pytest.mark.slow
def test_an_assumed_spread_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "spread assumed" not in load_anchor(written(tmp_path)).expectation()
    assumed = load_anchor(written(tmp_path, spread_assumed=True, bound="below")).expectation()
    assert "at least 0.2 ± 0.02, spread assumed" in assumed
    with pytest.raises(UsageError, match="of one run, which has no spread"):
        load_anchor(written(tmp_path, runs=1))
    assert main(["verify"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    for name in anchor_names():
        assert ("spread assumed" in lines[name]) == load_anchor(name).spread_assumed
        assert load_anchor(name).spread_assumed or load_anchor(name).runs > 1
    assert all("at least" in lines[name] for name in ("si-split-mnist-task-il", "lwf-split-mnist"))


@pytest.mark.parametrize("bound", ["above", "Below", None])
def test_other_bounds_are_refused(tmp_path: Path, bound: object) -> None:
    with pytest.raises(UsageError, match=r"the anchor .*: bound must be one of both, below"):
        load_anchor(written(tmp_path, bound=bound))


@pytest.mark.slow
def test_what_is_outside_of_an_unknown_protocol_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, expected=0.9, unknown="which rate they had", seeds=[0])
    assert main(["verify", file]) == 0
    text = capsys.readouterr().out
    assert "PROTOCOL UNKNOWN, which rate they had: outside the interval" in text and "OUTSIDE" not in text
    assert Anchor(**{"name": "small", **SMALL, "unknown": "which rate"}).verdict(0.2, 2)[1].startswith("INSIDE")


@pytest.mark.slow
def test_what_is_seeded_is_drawn_anew_for_each_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", written(tmp_path, seeded=["stream.class_order"], spread=0.2)]) == 0
    said = capsys.readouterr()
    assert "over seeds 0, 1" in said.out
    cards = [str(split_digits(epochs=10, batch_size=10, class_order=seed)).strip() for seed in (0, 1)]
    assert cards[0] != cards[1]
    for card in cards:
        assert card in said.err
