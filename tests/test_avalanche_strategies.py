"""Avalanche's strategies on our engine, against Avalanche's own loop on the same batches: the same weights, to the bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from avalanche_strategies import BUILT, Import, benchmark, builder, maker
from clstream.strategies.avalanche import AvalancheStrategy, strategy_class
from clstream.streams import blobs, from_avalanche, split_digits
from clstream.streams.data import digits
from torch import Tensor, nn
from torch.optim import SGD

from clstream import EpochStarted, Samples, Stream, Task, on, run
from clstream.cli import main
from clstream.evaluation import evaluate, evaluating
from clstream.models import Mlp
from clstream.seeds import isolated

pytestmark = pytest.mark.filterwarnings("ignore:No loggers", "ignore:Using a non-tuple sequence")


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Naive": ("Naive", {"momentum": 0.9}, {}),
    "EWC": ("EWC", {"ewc_lambda": 0.4}, {}),
    "EWC, online": ("EWC", {"ewc_lambda": 0.4, "mode": "online", "decay_factor": 0.5}, {}),
    "Replay": ("Replay", {"mem_size": 60}, {}),
    "SI": ("SynapticIntelligence", {"si_lambda": 100.0}, {}),
    "LwF": ("LwF", {"alpha": 1.0, "temperature": 2.0}, {}),
    "GEM": ("GEM", {"patterns_per_exp": 20}, {}),
    "A-GEM": ("AGEM", {"patterns_per_exp": 20, "sample_size": 20}, {}),
    "DER++": ("DER", {"mem_size": 60, "batch_size_mem": 10, "alpha": 0.5, "beta": 0.5}, {}),
    "ER-ACE": ("ER_ACE", {"mem_size": 60, "batch_size_mem": 10}, {}),
    "MIR": ("MIR", {"mem_size": 60, "subsample": 20, "batch_size_mem": 10}, {}),
    "GDumb": ("GDumb", {"mem_size": 60}, {}),
    "Cumulative": ("Cumulative", {}, {}),
    "growing head, Naive": ("Naive", {"net": "growing", "momentum": 0.9}, {}),
    "growing head, Replay": ("Replay", {"net": "growing", "mem_size": 60}, {}),
    "head of each task, EWC": ("EWC", {"net": "headed", "ewc_lambda": 0.4}, {"task_labels": True}),
    "head of each task, LwF": ("LwF", {"net": "headed", "alpha": 1.0, "temperature": 2.0}, {"task_labels": True}),
    "head of each task, classes from 0": (
        "Replay", {"net": "headed", "mem_size": 60}, {"task_labels": True, "class_ids_from_zero_in_each_exp": True}
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, *BUILT])
def test_it_learns_the_weights_that_avalanche_s_own_loop_learns(avalanche: Import, case: str) -> None:
    if case in BUILT:
        how: dict[str, Any] = {"task_labels": True} if case in ("PackNet", "PNN") else {}
        if case == "iCaRL":  # which goes by the order of the classes within an experience: here they ascend
            how = {"fixed_class_order": [*range(10)]}
        make = builder(avalanche, case)
    else:
        name, options, how = CASES[case]
        make = maker(avalanche, name, **options)
    given = benchmark(avalanche, **how)
    alone, ours = make(), make()
    with isolated(0, "run"):
        for experience in given.train_stream:
            alone.train(experience, shuffle=False)
    every = None if case == "PackNet" else 3  # theirs can answer for no old task between pruning and the end of one
    stream = from_avalanche(given, epochs=2, batch_size=10, shuffle=False)
    result = run(AvalancheStrategy(ours), stream, seed=0, evaluate_every=every)
    expected, actual = alone.model.state_dict(), ours.model.state_dict()
    assert expected.keys() == actual.keys()
    for key in expected:
        assert torch.equal(expected[key], actual[key]), key
    assert ours.clock.train_iterations == alone.clock.train_iterations > 0
    for task, experience in zip(from_avalanche(given).tasks, given.test_stream, strict=True):  # and answers alike
        told = "task_labels" in how
        labels = torch.full((len(task.test),), experience.task_label if told else 0)
        with torch.no_grad():
            scores = avalanche("models").avalanche_forward(alone.model.eval(), task.test.x, labels)
        if told:  # with the task given, its classes compete
            scores = scores.index_fill(
                1, torch.tensor([*{*range(scores.shape[1])} - {*task.classes}], dtype=torch.int64), -torch.inf
            )
        hits = (scores.argmax(1) == task.test.y).double().mean()
        row = result.task_accuracy if told else result.accuracy
        assert float(row[-1, task.id]) == pytest.approx(float(hits), abs=1e-12)


def test_a_shuffled_stream_of_one_experience_at_a_time_is_as_random_as_theirs(avalanche: Import) -> None:
    """The batches of replay are drawn by Avalanche, from the second experience on: with one first batch, all is the same."""
    given = benchmark(avalanche)
    make = maker(avalanche, "Replay", mem_size=60)
    alone, ours = make(), make()
    stream = from_avalanche(given, epochs=1, batch_size=1000)
    alone.train_mb_size, alone.train_epochs = 1000, 1
    with isolated(0, "run"):
        for experience in given.train_stream:
            alone.train(experience)
    run(AvalancheStrategy(ours), stream, seed=0)
    for theirs_now, ours_now in zip(alone.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.allclose(theirs_now, ours_now, atol=1e-6)  # the first batch has its samples in another order


TRAINING = ("training", "train_dataset_adaptation", "training_exp", "training_epoch", "training_iteration", "forward", "backward",
            "update")  # fmt: skip
EVALUATION = ("eval", "eval_dataset_adaptation", "eval_exp", "eval_iteration", "eval_forward")


def listener(avalanche: Import, heard: list[str]) -> Any:
    """A plugin that hears all 26 callbacks."""

    def hearing(name: str) -> Callable[..., None]:
        return lambda self, strategy, **given: heard.append(name)

    names = [f"{side}_{what}" for what in (*TRAINING, *EVALUATION) for side in ("before", "after")]
    assert len(names) == 26
    return type("Listener", (avalanche("training.plugins").SupervisedPlugin,), {name: hearing(name) for name in names})()


def test_plugins_hear_what_they_hear_in_avalanche_in_its_order(avalanche: Import) -> None:
    given, told, heard = benchmark(avalanche), list[str](), list[str]()
    alone = maker(avalanche, "Replay", mem_size=60, plugins=[listener(avalanche, told)])()
    for experience in given.train_stream:
        alone.train(experience, shuffle=False)
    strategy = AvalancheStrategy(maker(avalanche, "Replay", mem_size=60)(), plugins=[listener(avalanche, heard)])
    run(strategy, from_avalanche(given, epochs=2, batch_size=10, shuffle=False))
    assert heard[0] == "before_training"  # who has learned nothing yet is asked without its plugins
    assert [name for name in heard if "eval" not in name] == told
    told.clear()
    alone.eval(next(iter(given.test_stream)))
    told[:] = [name for name in told if name not in ("before_eval_dataset_adaptation", "after_eval_dataset_adaptation")]
    asked = [name for name in heard if "eval" in name]
    answer = asked[: asked.index("after_eval") + 1]
    assert sorted(answer) == sorted(set(answer)) and len(answer) == 10
    order = sorted(set(told), key=told.index)  # of each callback's first call: theirs has many batches
    last = order.index("after_eval_iteration") + 1
    assert [name for name in answer if "dataset" not in name][:last] == order[:last]
    assert answer[1:3] == ["before_eval_dataset_adaptation", "after_eval_dataset_adaptation"]


def test_batches_of_another_loader_are_spread_over_ours(avalanche: Import) -> None:
    """Cumulative training takes more steps in each session; each epoch has them all, and each of our batches its share."""
    taken: list[int] = []

    class Steps:
        @on(EpochStarted)
        def note(self, event: EpochStarted) -> None:
            taken.append(strategy.theirs.clock.train_iterations)

    stream = from_avalanche(benchmark(avalanche), epochs=2, batch_size=10)
    strategy = AvalancheStrategy(maker(avalanche, "Cumulative")())
    run(strategy, stream, Steps())
    sizes = torch.tensor([len(task.train) for task in stream.tasks]).cumsum(0)
    expected = [-(-int(size) // 10) for size in sizes for _ in range(2)]
    assert torch.tensor([*taken, strategy.theirs.clock.train_iterations]).diff().tolist() == expected


HIDDEN = {"boundaries": False, "batch_size": 10}


def test_a_plugin_of_ours_to_add_comes_first_and_their_evaluator_goes(
    avalanche: Import, capsys: pytest.CaptureFixture[str]
) -> None:
    plugins = avalanche("training.plugins")
    theirs = avalanche("training.supervised").Replay(
        model=(net := Mlp((1, 8, 8), 10, hidden=(20,))), optimizer=SGD(net.parameters(), 0.05), criterion=nn.CrossEntropyLoss(),
        mem_size=20,
    )  # fmt: skip
    lwf = plugins.LwFPlugin()
    strategy = AvalancheStrategy(theirs, plugins=[lwf])
    assert [type(plugin).__name__ for plugin in theirs.plugins] == ["LwFPlugin", "ReplayPlugin", "PeriodicEval", "Clock"]
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(strategy, blobs_of_digits())
    captured = capsys.readouterr()
    assert captured.out == "" and "Deprecat" not in captured.err
    assert lwf.lwf.expcount == 5


def blobs_of_digits() -> Stream:
    return split_digits(epochs=1)


def test_the_head_of_a_task_answers_for_it_and_none_grows_by_being_asked(avalanche: Import) -> None:
    given = benchmark(avalanche, task_labels=True)
    stream = from_avalanche(given, epochs=2, batch_size=10)
    theirs = maker(avalanche, "Naive", net="headed")()
    strategy = AvalancheStrategy(theirs)
    run(strategy, stream, max_sessions=2)
    assert sorted(theirs.model.heads.classifiers) == ["0", "1"]
    task = stream.tasks[1]
    with evaluating(strategy):
        scores = strategy.scores(task.test.x, task)
        theirs_say = theirs.model(task.test.x, torch.ones(len(task.test), dtype=torch.int64))
        assert torch.equal(scores[:, list(task.classes)], theirs_say[:, list(task.classes)])
        assert set(strategy.predict(task.test.x, task).tolist()) <= set(task.classes)
        assert set(strategy.predict(task.test.x).tolist()) <= set(task.classes) | set(stream.tasks[0].classes)
        zero = [label for label in range(10) if label not in {*task.classes, *stream.tasks[0].classes}]
        assert float(strategy.scores(task.test.x)[:, zero].max()) < -1e30  # of no head, though a narrower one says 0 for some
        assert float(strategy.scores(task.test.x, task)[:, list(stream.tasks[0].classes)].max()) < -1e30
        unknown = stream.tasks[4]
        assert float(strategy.scores(unknown.test.x, unknown).abs().max()) == 0
    assert sorted(theirs.model.heads.classifiers) == ["0", "1"]
    rows = evaluate(strategy, stream.to("cpu"))
    assert float(rows[1][1]) > 0.8  # the newest task, given at test


def test_a_head_that_grows_can_be_asked_for_classes_to_come(avalanche: Import) -> None:
    stream = from_avalanche(benchmark(avalanche), epochs=10, batch_size=10)
    strategy = AvalancheStrategy(maker(avalanche, "Naive", net="growing")())
    result = run(strategy, stream)
    assert float(result.accuracy.diagonal().min()) > 0.8
    with pytest.raises(RuntimeError, match="gets its outputs in a run"):
        AvalancheStrategy(maker(avalanche, "Naive", net="growing")()).scores(stream.tasks[0].test.x)


def test_the_stream_s_augmentation_is_learned(avalanche: Import) -> None:
    seen: list[Tensor] = []

    def dark(x: Tensor) -> Tensor:
        seen.append(x)
        return 0 * x

    train, test = digits()
    from clstream.streams import from_tensors

    stream = from_tensors(train.x, train.y, test.x, test.y, augment=dark, batch_size=100)
    for name in ("Naive", "Replay"):
        seen.clear()
        strategy = strategy_class(name)(Mlp((1, 8, 8), 10, hidden=(20,)))
        before = [weight.clone() for weight in strategy.model.parameters()]
        run(strategy, stream)
        assert torch.equal(before[0], next(iter(strategy.model.parameters())))  # no input, no slope for the first weights
        assert len(seen) >= 15


def test_a_plugin_can_stop_a_session(avalanche: Import) -> None:
    class Stops(avalanche("training.plugins").SupervisedPlugin):  # type: ignore[misc,name-defined]
        def after_training_iteration(self, strategy: Any, **given: Any) -> None:
            if strategy.clock.train_exp_iterations == 7:
                strategy.stop_training()

    def steps(play: Callable[[Any], None]) -> int:
        theirs = maker(avalanche, "Naive", plugins=[Stops()])()
        play(theirs)
        return int(theirs.clock.train_iterations)

    given = benchmark(avalanche)

    def alone(theirs: Any) -> None:
        for experience in given.train_stream:
            theirs.train(experience)

    ours = steps(lambda theirs: run(AvalancheStrategy(theirs), from_avalanche(given, epochs=2, batch_size=10)) and None)
    assert ours == steps(alone)


@pytest.mark.slow
def test_one_of_theirs_by_name_on_the_command_line(avalanche: Import, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["run", "--stream", "blobs", "--stream.train_per_class", "20", "--model.hidden", "[16]", "--track", "false"]
    ewc = ["--strategy", "avalanche:EWC", "--strategy.ewc_lambda", "0.4", "--strategy.optimizer.lr", "0.05"]
    assert main([*given, *ewc]) == 0
    assert "AvalancheEWC on blobs" in capsys.readouterr().out
    assert main([*given, *ewc, "--print_config"]) == 0
    text = capsys.readouterr().out
    assert "class_path: clstream.strategies.avalanche.EWC" in text and "ewc_lambda: 0.4" in text and "lr: 0.05" in text
    refresh = ["--strategy", "Refresh", "--strategy.base", "clstream.strategies.avalanche.Replay"]
    assert main([*given, *refresh, "--checkpoint_every", "0"]) == 0  # found by its path, also within another strategy
    capsys.readouterr()
    for wrong, sentence in (
        (["--strategy", "avalanche:EWCC"], "no strategy 'EWCC' of Avalanche's that can be had by name: did you mean EWC?"),
        (["--strategy", "avalanche:EWC"], "--strategy needs ewc_lambda: give --strategy.ewc_lambda"),
        (["--strategy", "avalanche:EWC", "--strategy.ewc_lamda", "1"], "EWC has no option 'ewc_lamda': did you mean ewc_lambda?"),
    ):
        assert main([*given, *wrong]) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_theirs_run_on_a_recurring_and_on_a_domain_stream(avalanche: Import) -> None:
    for stream in (blobs(tasks=3, schedule=[0, 1, 0, 2]), blobs(scenario="domain"), blobs(scenario="task")):
        strategy = strategy_class("Replay")(Mlp(stream.input_shape, stream.classes, hidden=(20,)), mem_size=50)
        assert run(strategy, stream).average_accuracy > 0.5
        assert strategy.theirs.clock.train_exp_counter == len(stream)


def test_heads_of_task_labels_that_are_no_numbers_of_tasks(avalanche: Import) -> None:
    """The head that answers is the one that was trained, of each question, and none of them where tasks are hidden."""
    y = torch.arange(4).repeat_interleave(20)
    x = torch.randn(80, 64, generator=torch.Generator().manual_seed(0)) + 4 * nn.functional.one_hot(y, 64)
    labels = torch.tensor([7, 3])[y // 2]
    whole = Samples(x, y, {"task_label": labels})
    tasks = [Task(task, (2 * task, 2 * task + 1), whole[y // 2 == task], whole[y // 2 == task]) for task in range(2)]

    def play(scenario: str, boundaries: bool) -> tuple[Any, Any]:
        torch.manual_seed(0)
        theirs = maker(avalanche, "Naive", net="headed")()
        strategy = AvalancheStrategy(theirs)
        return run(strategy, Stream("labelled", tasks, [0, 1], 10, 10, scenario, boundaries=boundaries)), strategy

    told, strategy = play("task", True)
    assert sorted(strategy.by_label) == [3, 7] and told.task_accuracy[-1].min() > 0.9
    for boundaries in (True, False):
        result, strategy = play("class", boundaries)
        assert sorted(strategy.by_label) == [0] and result.accuracy[0, 0] > 0.9


@pytest.mark.slow
def test_der_replays_as_many_as_the_streams_batch_holds(avalanche: Import) -> None:
    torch.manual_seed(0)
    strategy = strategy_class("DER")(Mlp((1, 8, 8), 10, hidden=(20,)))
    run(strategy, split_digits(tasks=5, epochs=1, batch_size=16))
    assert strategy.theirs.batch_size_mem == 16
    torch.manual_seed(0)
    der = avalanche("training.supervised").DER
    model = Mlp((1, 8, 8), 10, hidden=(20,))
    own = der(model=model, optimizer=SGD(model.parameters(), lr=0.1), batch_size_mem=7)
    run(AvalancheStrategy(own), split_digits(tasks=5, epochs=1, batch_size=16))
    assert own.batch_size_mem == 7
