"""Avalanche's benchmarks as streams, against what Avalanche itself delivers from the same benchmarks."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avalanche_benchmarks import NORMAL, Import, images
from clstream.experiments.parity.measuring import Labelled
from clstream.streams import from_avalanche, with_test
from clstream.streams.data import digits
from torch import Tensor
from torchvision import transforms as tv

from clstream import Strategy, run
from clstream.checks import check_stream
from clstream.cli import main
from clstream.evaluation import evaluate
from clstream.models import Mlp
from clstream.stream import Stream

pytestmark = pytest.mark.filterwarnings("ignore:stream generator", "ignore:No loggers")


def pair() -> tuple[Labelled, Labelled]:
    train, test = digits()
    return Labelled(train.x, train.y), Labelled(test.x, test.y)


def classic(avalanche: Import, **options: Any) -> Any:
    return avalanche("benchmarks").nc_benchmark(*pair(), 5, seed=3, **options)


def incremental(avalanche: Import) -> Any:
    wrap = avalanche("benchmarks.utils").as_classification_dataset
    train, test = pair()
    return avalanche("benchmarks").class_incremental_benchmark(
        {"train": wrap(train), "test": wrap(test)}, num_experiences=5, class_order=[4, 1, 0, 9, 3, 2, 8, 7, 6, 5]
    )


def online(avalanche: Import, told: bool) -> Any:
    benchmarks = avalanche("benchmarks")
    benchmark = classic(avalanche, task_labels=False)
    stream = benchmarks.split_online_stream(benchmark.train_stream, 50, access_task_boundaries=told, seed=0)
    return benchmarks.CLScenario([stream, benchmark.test_stream])


def blurred(avalanche: Import) -> Any:
    benchmarks = avalanche("benchmarks")
    benchmark = classic(avalanche, task_labels=False)
    stream = benchmarks.split_continuous_linear_decay_stream(benchmark.train_stream, 50, 8, 0.5, True)
    return benchmarks.CLScenario([stream, benchmark.test_stream])


BENCHMARKS: dict[str, Callable[[Import], Any]] = {
    "classic": lambda a: classic(a, task_labels=False),
    "classic, task labels": lambda a: classic(a, task_labels=True),
    "classic, task labels, classes from 0": lambda a: classic(a, task_labels=True, class_ids_from_zero_in_each_exp=True),
    "classic, classes from 0": lambda a: classic(a, task_labels=False, class_ids_from_zero_in_each_exp=True),
    "new instances": lambda a: a("benchmarks").ni_benchmark(*pair(), 4, seed=1, balance_experiences=True),
    "class-incremental": incremental,
    "task-incremental": lambda a: a("benchmarks").task_incremental_benchmark(incremental(a), reset_task_labels=True),
    "validation": lambda a: a("benchmarks").benchmark_with_validation_stream(incremental(a), 0.2),
    "online": lambda a: online(a, told=True),
    "online, hidden": lambda a: online(a, told=False),
    "online, mixed": blurred,
}
SCENARIOS = {
    "classic, task labels": "task", "classic, task labels, classes from 0": "task", "task-incremental": "task",
    "classic, classes from 0": "domain", "new instances": "domain",
}  # fmt: skip


@pytest.fixture(scope="module", params=BENCHMARKS)
def both(request: pytest.FixtureRequest, avalanche: Import) -> tuple[str, Any, Stream]:
    torch.manual_seed(0)
    benchmark = BENCHMARKS[request.param](avalanche)
    return request.param, benchmark, from_avalanche(benchmark, shuffle=False)


def joined(dataset: Any) -> tuple[Tensor, list[int], list[int]]:
    items = [dataset[index] for index in range(len(dataset))]
    return torch.stack([item[0] for item in items]), [int(item[1]) for item in items], [int(item[-1]) for item in items]


def test_each_experience_is_a_session(both: tuple[str, Any, Stream]) -> None:
    _, benchmark, stream = both
    train = next(stream for name, stream in benchmark.streams.items() if name.startswith("train"))
    sessions = iter(stream)
    for experience in train:
        x, y, _ = joined(experience.dataset.train())
        samples = next(sessions).samples[:]
        assert torch.equal(samples.x, x) and samples.y.tolist() == y
    assert next(sessions, None) is None


def test_each_test_experience_is_a_task(both: tuple[str, Any, Stream]) -> None:
    name, benchmark, stream = both
    for task in stream.tasks:
        experience = list(benchmark.streams["test"])[0 if name == "new instances" else task.id]
        x, y, _ = joined(experience.dataset.eval())
        assert torch.equal(task.test.x, x) and task.test.y.tolist() == y
    assert len(stream.tasks) == (4 if name == "new instances" else 5)


def test_scenario_order_and_boundaries_are_kept(both: tuple[str, Any, Stream]) -> None:
    name, benchmark, stream = both
    assert stream.scenario == SCENARIOS.get(name, "class")
    assert stream.boundaries == (name not in ("online, hidden", "online, mixed"))
    if name in ("class-incremental", "task-incremental"):
        assert [set(task.classes) for task in stream.tasks] == [{4, 1}, {0, 9}, {3, 2}, {8, 7}, {6, 5}]
    if name == "validation":
        for task, experience in zip(stream.tasks, benchmark.streams["valid"], strict=True):
            assert task.validation is not None
            assert torch.equal(task.validation.x, joined(experience.dataset.eval())[0])
    else:
        assert all(task.validation is None for task in stream.tasks)


def test_it_is_a_good_stream(both: tuple[str, Any, Stream]) -> None:
    for check in check_stream(both[2]):
        check()


def test_it_is_played_without_avalanche_s_data(avalanche: Import) -> None:
    benchmark = classic(avalanche, task_labels=True)
    result = run(Strategy(Mlp((1, 8, 8), 10, hidden=(50,))), from_avalanche(benchmark, epochs=3, batch_size=10))
    assert result.average_accuracy > 0.8


def test_task_labels_that_are_not_the_number_of_the_task_are_kept(avalanche: Import) -> None:
    wrap = avalanche("benchmarks.utils")._make_taskaware_classification_dataset
    train, test = digits()
    rows = [(train.y == label).nonzero().flatten() for label in range(3)]
    parts = [wrap(Labelled(train.x[taken], train.y[taken]), task_labels=7 * (number % 2)) for number, taken in enumerate(rows)]
    asked = [wrap(Labelled(test.x[test.y == label], test.y[test.y == label]), task_labels=7 * (label % 2)) for label in range(3)]
    stream = from_avalanche(avalanche("benchmarks").benchmark_from_datasets(train=parts, test=asked))
    assert [set(task.train[:].extra["task_label"].tolist()) for task in stream.tasks] == [{0}, {7}, {0}]
    assert [set(task.test[:].extra["task_label"].tolist()) for task in stream.tasks] == [{0}, {7}, {0}]


def test_one_test_experience_for_all_and_another_test_stream(avalanche: Import) -> None:
    wrap = avalanche("benchmarks.utils").as_classification_dataset
    train, test = digits()
    halves = [train.y < 5, train.y >= 5]
    benchmark = avalanche("benchmarks").benchmark_from_datasets(
        train=[wrap(Labelled(train.x[half], train.y[half])) for half in halves],
        test=[wrap(Labelled(test.x, test.y))],
        dark=[wrap(Labelled(0 * train.x[half][:5], train.y[half][:5])) for half in halves],
    )
    stream = from_avalanche(benchmark)
    assert [task.classes for task in stream.tasks] == [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]
    assert torch.equal(stream.tasks[1].test.x, test.x[test.y >= 5])
    assert any("with_test(stream, benchmark, 'dark')" in note for note in stream.notes)
    dark = with_test(stream, benchmark, "dark")
    assert float(dark.tasks[1].test.x.abs().max()) == 0 and dark.tasks[1].train is stream.tasks[1].train
    assert evaluate(Strategy(Mlp((1, 8, 8), 10, hidden=(5,))), dark)[0].shape == (2,)
    with pytest.raises(ValueError, match="no stream 'drak' to test on: did you mean 'dark'"):
        with_test(stream, benchmark, "drak")
    with pytest.raises(ValueError, match="no stream 'tset' to test on: did you mean 'test'"):
        from_avalanche(benchmark, test="tset")


def test_the_caller_s_generators_stay_as_they_were(avalanche: Import) -> None:
    benchmark = images(avalanche, tv.Compose([tv.RandomCrop(6, padding=1), *NORMAL]))
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    from_avalanche(benchmark)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


@pytest.mark.slow
def test_avalanche_is_imported_in_silence(avalanche: Import) -> None:
    script = "from clstream.avalanche.imports import import_avalanche as load; load('training.supervised'); load('benchmarks')"
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_what_is_no_benchmark_is_refused(avalanche: Import) -> None:
    benchmark = classic(avalanche, task_labels=False)
    with pytest.raises(TypeError, match="takes a benchmark of Avalanche"):
        from_avalanche(benchmark.train_stream)
    with pytest.raises(ValueError, match="epochs must be a whole number"):
        from_avalanche(benchmark, epochs=0)
    with pytest.raises(ValueError, match="not 'tarin': name it"):
        from_avalanche(benchmark, train="tarin")
    crops = images(avalanche, tv.Compose([tv.RandomHorizontalFlip(), *NORMAL]))
    with pytest.raises(ValueError, match="has random transforms already"):
        from_avalanche(crops, augment=torch.neg)


def test_an_online_stream_of_some_experiences_goes_with_their_own_tests(avalanche: Import) -> None:
    """The experiences 1 and 0 of a benchmark, in this order: each is tested on its own test experience, not on the next one."""
    benchmarks, given = avalanche("benchmarks"), classic(avalanche, task_labels=False)
    two = [given.train_stream[1], given.train_stream[0]]
    stream = from_avalanche(
        benchmarks.CLScenario([benchmarks.split_online_stream(two, 50, seed=0), given.test_stream[:2]]), train="train_online"
    )
    assert [stream.task_of(number) for number in (0, len(stream) - 1)] == [1, 0]
    for task, experience in zip(stream.tasks, given.test_stream[:2], strict=True):
        assert set(task.classes) == set(experience.classes_in_this_experience)
    with pytest.raises(ValueError, match="nothing to train on belongs to test experience 2"):
        from_avalanche(benchmarks.CLScenario([benchmarks.split_online_stream(two, 50, seed=0), given.test_stream]))


@pytest.mark.parametrize(("target", "what"), [(torch.tensor([0.0, 1.0]), "a row of numbers"), (torch.tensor(1.5), "1.5")])
def test_other_targets_than_labels_are_refused(target: Tensor, what: str, avalanche: Import) -> None:
    class Others(torch.utils.data.Dataset[Any]):
        targets = (0, 0, 1, 1)

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return torch.zeros(3), target

    dataset = avalanche("benchmarks.utils").as_classification_dataset(Others())
    benchmark = avalanche("benchmarks").benchmark_from_datasets(train=[dataset], test=[dataset])
    with pytest.raises(TypeError, match=f"are read for labels, one whole number each, not {what}: from_dataset"):
        from_avalanche(benchmark, progress=False)


def test_experiences_that_cannot_be_told_apart_are_refused(avalanche: Import) -> None:
    wrap = avalanche("benchmarks.utils").as_classification_dataset
    train, test = digits()
    thirds = [wrap(Labelled(train.x[part::3], train.y[part::3])) for part in range(3)]
    asked = [wrap(Labelled(test.x[part::2], test.y[part::2])) for part in range(2)]
    with pytest.raises(ValueError, match="which of 3 training experiences belongs to which of 2 to test on"):
        from_avalanche(avalanche("benchmarks").benchmark_from_datasets(train=thirds, test=asked))


def write_mnist(folder: Path) -> None:
    """Write 200 + 100 images of noise in MNIST's format."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for kind, n in (("train", 200), ("t10k", 100)):
        for what, sizes, type_ in (("images", (n, 28, 28), 3), ("labels", (n,), 1)):
            body = draw.integers(0, 256, sizes).astype(np.uint8) if what == "images" else (np.arange(n) % 10).astype(np.uint8)
            head = bytes([0, 0, 8, type_]) + b"".join(int(size).to_bytes(4, "big") for size in sizes)
            (raw / f"{kind}-{what}-idx{type_}-ubyte").write_bytes(head + body.tobytes())


def test_a_classic_benchmark_on_the_command_line(
    avalanche: Import, store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mnist(tmp_path)
    options = ("--stream.n_experiences", "5", "--stream.seed", "4", "--stream.epochs", "2", "--data_root", str(tmp_path))
    assert main(["show", "avalanche:SplitMNIST", *options]) == 0
    card = capsys.readouterr().out
    assert "SplitMNIST: class-incremental" in card and "5, 2 epochs each" in card
    given = avalanche("benchmarks").SplitMNIST(5, seed=4, dataset_root=tmp_path)
    for number, experience in enumerate(given.train_stream):
        classes = ", ".join(map(str, sorted(experience.classes_in_this_experience)))
        assert f"task {number}       classes {classes};" in card
    run_it = ["run", "--stream", "avalanche:SplitMNIST", *options, "--strategy", "Finetune", "--track", "false"]
    assert main([*run_it, "--checkpoint_every", "0"]) == 0
    assert "Finetune on SplitMNIST" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (
            ["--stream", "avalanche:SplitMNITS"],
            2,
            "no stream 'SplitMNITS' of Avalanche's that can be had by name: did you mean Spl",
        ),
        (["--stream", "avalanche:SplitMNIST", "--stream.n_experience", "5"], 2, "has no option 'n_experience': did you mean n_exp"),
        (["--stream", "avalanche:SplitMNIST"], 2, "--stream needs n_experiences: give --stream.n_experiences"),
        (
            ["--stream", "avalanche:SplitMNIST", "--stream.n_experiences", "5", "--data_root", "absent"],
            1,
            "could not be downloaded",
        ),
    ],
)
def test_what_is_asked_wrongly(
    avalanche: Import, store: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str],
    status: int, sentence: str,
) -> None:  # fmt: skip
    def no_network(*_: object, **__: object) -> None:
        raise OSError("there is no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    assert main(["run", *arguments, "--track", "false"]) == status
    captured = capsys.readouterr()
    assert sentence in " ".join(captured.err.split())


def with_labels(avalanche: Import, train: list[int], test: list[int], order: list[int] | None = None) -> Any:
    """Return a benchmark of two tasks of two classes with these task labels, and a stream `dark` that is `test` again."""
    wrap = avalanche("benchmarks.utils")._make_taskaware_classification_dataset
    benchmarks = avalanche("benchmarks")
    y = torch.arange(4).repeat_interleave(20)
    x = torch.randn(80, 6, generator=torch.Generator().manual_seed(0)) + 4 * torch.nn.functional.one_hot(y, 6)

    def stream(name: str, labels: list[int], order: list[int]) -> Any:
        parts = [
            wrap(Labelled(x[y // 2 == task], y[y // 2 == task]), task_labels=label)
            for task, label in zip(order, labels, strict=True)
        ]
        return benchmarks.benchmark_from_datasets(**{name: parts}).streams[name]

    asked = order or [0, 1]
    return benchmarks.CLScenario([stream("train", train, [0, 1]), stream("test", test, asked), stream("dark", test, asked)])


def test_task_labels_that_are_no_numbers_of_tasks(avalanche: Import) -> None:
    benchmark = with_labels(avalanche, [7, 3], [7, 3])
    stream = from_avalanche(benchmark, epochs=10, batch_size=10)
    assert stream.scenario == "task" and stream.tasks[0].train[:1].extra["task_label"].tolist() == [7]
    other = with_test(stream, benchmark, "dark")
    assert [task.test[:1].extra["task_label"].tolist() for task in other.tasks] == [[7], [3]]
    hidden = from_avalanche(benchmark, boundaries=False, scenario="class")
    assert all(not session.samples.extra for session in hidden)  # they would tell of tasks


def test_experiences_that_do_not_belong_together_are_refused(avalanche: Import) -> None:
    with pytest.raises(ValueError, match="test experience 0 has none of the classes of training experience 0"):
        from_avalanche(with_labels(avalanche, [0, 0], [0, 0], [1, 0]))
    with pytest.raises(ValueError, match="the test samples of task 0 have other task labels than its training samples"):
        from_avalanche(with_labels(avalanche, [7, 3], [3, 7]))
    good = with_labels(avalanche, [0, 0], [0, 0])
    with pytest.raises(ValueError, match="there is no stream 'vaild' to validate on"):
        from_avalanche(good, validation="vaild")
    with pytest.raises(TypeError, match="augment must be a function of a batch of inputs, not 3"):
        from_avalanche(good, augment=3)
