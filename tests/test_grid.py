"""Grids: which combinations the section `sweep` of a file stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from clstream.cli.settings import parse_seeds
from clstream.sweep.grid import GridError, Known, combinations, read_grid

OPTIONS = {
    "Replay": ["optimizer", "capacity"], "EWC": ["optimizer", "strength"], "MAS": ["optimizer", "strength"],
    "Finetune": ["optimizer"], "digits": ["epochs"], "mnist": ["epochs", "root"], "Mlp": ["hidden"], "Cnn": ["width"],
}  # fmt: skip
CONFIGS = {
    "ewc.yaml": {"strategy": {"class_path": "EWC", "init_args": {"strength": 7}}},
    "ewc-mnist.yaml": {"strategy": "EWC", "stream": "mnist"},
    "replay-mnist.yaml": {"strategy": "Replay", "stream": "mnist"},
    "ewc-digits.yaml": {"strategy": "EWC", "stream": "digits"},
    "stronger.yaml": {"strategy": "EWC", "stream": "digits", "max_sessions": 2},
}
KNOWN = Known(
    ["max_sessions", "device", "config", "experiment"], lambda _, name: OPTIONS[name], lambda file: CONFIGS[file], parse_seeds
)
DEFAULTS = {"strategy": "Replay", "stream": "digits", "model": "Mlp"}


def expanded(section: Mapping[str, Any], **base: Any) -> list[tuple[str, dict[str, Any], tuple[int, ...]]]:
    grid = read_grid({**base, "sweep": section}, KNOWN)
    return [(item.label, item.settings, item.seeds) for item in combinations(grid, KNOWN, DEFAULTS)]


def test_lists_and_ranges_are_multiplied_and_the_last_varies_first() -> None:
    expected = [
        ("Replay, capacity 200", {"strategy": "Replay", "strategy.capacity": 200}, (0, 1, 2)),
        ("Replay, capacity 500", {"strategy": "Replay", "strategy.capacity": 500}, (0, 1, 2)),
    ]
    assert expanded({"strategy": ["Replay"], "strategy.capacity": [200, 500], "seed": "0-2"}) == expected
    assert [settings["max_sessions"] for _, settings, _ in expanded({"max_sessions": "2-4"})] == [2, 3, 4]
    assert expanded({"strategy": ["Finetune"], "seed": [3, 1]})[0][2] == (3, 1)


def test_options_vary_only_where_there_are_any() -> None:
    section = {"strategy": ["Replay", "EWC", "Finetune"], "strategy.capacity": [1, 2], "strategy.strength": [0.1, 1.0, 10.0]}
    assert [label for label, *_ in expanded(section)] == [
        "Replay, capacity 1", "Replay, capacity 2", "EWC, strength 0.1", "EWC, strength 1.0", "EWC, strength 10.0", "Finetune"
    ]  # fmt: skip


def test_an_option_that_begins_with_a_name_is_of_that_one_and_goes_before_that_of_all() -> None:
    section = {"strategy": ["EWC", "MAS"], "strategy.strength": [1, 2], "EWC.strength": [100]}
    section |= {"mnist.epochs": 1, "stream": ["digits", "mnist"]}
    names = ("strategy", "stream", "strategy.strength", "stream.epochs")
    assert [tuple(settings.get(name) for name in names) for _, settings, _ in expanded(section)] == [
        ("EWC", "digits", 100, None), ("EWC", "mnist", 100, 1), ("MAS", "digits", 1, None), ("MAS", "digits", 2, None),
        ("MAS", "mnist", 1, 1), ("MAS", "mnist", 2, 1),
    ]  # fmt: skip


def test_named_combinations_set_several_options_at_once() -> None:
    section = {
        "method": {"weak": {"strategy": "EWC", "strategy.strength": 1}, "plain": {"strategy": "Finetune"}},
        "length": {"short": {"stream.epochs": 1}, "long": {"stream.epochs": 9, "max_sessions": 4}},
    }
    assert [label for label, *_ in expanded(section)] == ["weak, short", "weak, long", "plain, short", "plain, long"]
    section["length"] = {"short": {"stream.epochs": 1}, "long": {"stream.epochs": 9}}  # of the stream alone
    grid = read_grid({"sweep": section}, KNOWN)
    assert [(item.method, item.stream) for item in combinations(grid, KNOWN, DEFAULTS)] == [
        ("weak", "short"), ("weak", "long"), ("plain", "short"), ("plain", "long")
    ]  # fmt: skip
    section["length"] = {"short": {"stream.epochs": 1}, "long": {"stream.epochs": 9, "max_sessions": 4}}
    assert expanded(section)[1][1] == {"strategy": "EWC", "strategy.strength": 1, "stream.epochs": 9, "max_sessions": 4}


def names(section: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(item.method, item.stream) for item in combinations(read_grid({"sweep": section}, KNOWN), KNOWN, DEFAULTS)]


def test_what_is_of_the_stream_alone_tells_streams_apart_and_no_methods() -> None:
    assert names({"stream.epochs": [1, 10], "strategy.capacity": [1, 2]}) == [
        ("Replay, capacity 1", "epochs 1"), ("Replay, capacity 2", "epochs 1"),
        ("Replay, capacity 1", "epochs 10"), ("Replay, capacity 2", "epochs 10"),
    ]  # fmt: skip
    length = {"short": {"stream.epochs": 1}, "long": {"stream.epochs": 9}}
    assert names({"length": length}) == [("Replay", "short"), ("Replay", "long")]
    both = {"length": {"short": {"stream.epochs": 1, "max_sessions": 2}, "long": {"stream.epochs": 9, "max_sessions": 4}}}
    assert names(both) == [("Replay, short", ""), ("Replay, long", "")]
    place = {"one": {"stream": "digits", "stream.epochs": 1}, "two": {"stream": "mnist", "stream.epochs": 2}}
    assert names({"place": place}) == [("Replay", ""), ("Replay", "")]  # their own names do
    assert names({"stream": ["digits", "mnist"]}) == [("Replay", ""), ("Replay", "")]


def test_a_named_combination_may_begin_with_a_config_and_options_are_of_its_strategy() -> None:
    section = {
        "method": {"tuned": {"config": "ewc.yaml"}, "plain": {"strategy": "Finetune"}},
        "EWC.strength": [1, 2],
        "strategy.capacity": 3,
    }
    with pytest.raises(GridError, match=r"no strategy of the grid \(EWC, Finetune\) has the option 'capacity'"):
        expanded(section)
    del section["strategy.capacity"]
    assert [label for label, *_ in expanded(section)] == ["tuned, strength 1", "tuned, strength 2", "plain"]


def test_configs_are_told_apart_by_their_strategies_if_they_can_be() -> None:
    configs = ["ewc-mnist.yaml", "replay-mnist.yaml", "ewc-digits.yaml"]
    assert [label for label, *_ in expanded({"config": configs})] == ["EWC", "Replay", "EWC"]
    assert [label for label, *_ in expanded({"config": [*configs[2:], "stronger.yaml"]})] == [
        "EWC, config ewc-digits.yaml", "EWC, config stronger.yaml"
    ]  # fmt: skip


def test_options_of_the_optimizer_are_the_strategy_s() -> None:
    with pytest.raises(GridError, match=r"there is no option 'optimizer.lr': did you mean strategy.optimizer.lr\?"):
        expanded({"strategy": ["EWC"], "optimizer.lr": [0.1, 0.2]})


def test_values_that_are_lists_or_classes_with_options_stay_whole() -> None:
    replay = {"class_path": "Replay", "init_args": {"capacity": 3}}
    assert [settings for _, settings, _ in expanded({"model.hidden": [[10, 10], [20]], "strategy": [replay]})] == [
        {"strategy": replay, "model.hidden": [10, 10]}, {"strategy": replay, "model.hidden": [20]}
    ]  # fmt: skip


def test_two_of_one_class_are_told_apart_by_their_options() -> None:
    streams = [{"class_path": "mnist", "init_args": {"epochs": epochs}} for epochs in (1, 2)]
    grid = read_grid({"sweep": {"strategy.capacity": [3, 4], "stream": [*streams, "digits"]}}, KNOWN)
    assert [(item.method, item.stream) for item in combinations(grid, KNOWN, DEFAULTS)] == [
        (f"Replay, capacity {capacity}", stream) for stream in ("epochs 1", "epochs 2", "") for capacity in (3, 4)
    ]


def test_the_base_has_what_all_share_and_its_seeds() -> None:
    assert expanded({"strategy": ["EWC"]}, seeds=[0, 5], stream="mnist") == [("EWC", {"strategy": "EWC"}, (0, 5))]
    assert expanded({"strategy": ["EWC"]}, seed=4)[0][2] == (4,)
    assert expanded({"EWC.strength": [1, 2]}, strategy="EWC")[1][0] == "EWC, strength 2"


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        (None, "it has no section `sweep:`"),
        ({}, "it has no section `sweep:`"),
        ([1], "it has no section `sweep:`"),
        ({"strategy": []}, "strategy has no values"),
        ({"strategy": ["EWC", None]}, "strategy has an empty value"),
        ({"strategy": ["EWC", "EWC"]}, "strategy has the value EWC twice"),
        ({"strategi": ["EWC"]}, "there is no option 'strategi': did you mean strategy?"),
        ({"Repay.capacity": [1], "strategy": ["Replay"]}, "there is no option 'Repay.capacity'"),
        ({"device.index": [1]}, "device has no options of its own"),
        ({"strategy.capacite": [1]}, "no strategy of the grid (Replay) has the option 'capacite': did you mean capacity?"),
        ({"max_sessions": "9-2"}, "max_sessions goes from 9 to 2"),
        ({"seeds": [1]}, "the seeds are called seed"),
        ({"method": {}}, "method has no combinations"),
        ({"method": {"a": 3}}, "method is no option, so it has combinations by name"),
        ({"method": {"a": {"strateg": "EWC"}}}, "method, a: there is no option 'strateg': did you mean strategy?"),
        ({"method": {"a": {"seed": 3}}}, "seeds are a key of the section itself"),
        ({"a": {"x": {"device": "cpu"}}, "b": {"y": {"device": "cuda"}}}, "device is set by both a and b"),
        ({"max_sessions": "1-90000", "strategy.capacity": "1-9"}, "it stands for more than 100,000 runs"),
    ],
)
def test_grids_that_can_not_be_are_refused_in_a_sentence(section: Any, sentence: str) -> None:
    with pytest.raises(GridError) as error:
        expanded(section)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_seeds_are_given_once() -> None:
    with pytest.raises(GridError, match="seeds are given twice"):
        read_grid({"seeds": [1], "sweep": {"seed": 3}}, KNOWN)
