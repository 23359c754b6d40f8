"""Evaluation of many small tasks: chunks, and the answers with and without the task given, against each task asked by itself."""

import pytest
import torch
from clstream.strategies import Finetune
from clstream.streams import from_tensors
from torch import Tensor, nn

from clstream import Samples, Stream, Task
from clstream.evaluation import CHUNK, Questions, evaluate
from clstream.evaluation.questions import IMAGES_ON_CPU
from clstream.models import Mlp
from clstream.stream import Subset


def many(kind: str, tasks: int = 300, boundaries: bool = True) -> Stream:
    """Return tasks of 1 to 20 test samples of 2 classes each, one that fills more than a chunk; as rows of one source, or not."""
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 21, (tasks,), generator=draw)
    sizes[7] = CHUNK + 9
    y = torch.cat([2 * task + torch.arange(size) % 2 for task, size in enumerate(sizes.tolist())])
    source = Samples(torch.randn(len(y), 6, generator=draw), y)
    built = []
    for task, rows in enumerate(torch.arange(len(y)).split(sizes.tolist())):
        part = Subset(source, rows, torch.neg if kind == "transformed" else None)
        own = part[:] if kind == "apart" or (kind == "both" and task % 2) else part
        built.append(Task(task, (2 * task + 1, 2 * task), own, own))
    return Stream("many", built, boundaries=boundaries)


@pytest.mark.parametrize("boundaries", [True, False])
@pytest.mark.parametrize("kind", ["pooled", "apart", "both", "transformed"])
def test_each_sample_is_asked_once_and_answered_as_by_itself(kind: str, boundaries: bool) -> None:
    stream = many(kind, boundaries=boundaries)
    strategy = Finetune(Mlp(6, stream.classes, hidden=(16,)))
    questions = Questions(strategy, stream)
    asked = list(questions)
    assert 1 < len(asked) < 10 and all(len(chunk.x) for chunk in asked)
    for task in stream.tasks:
        x = torch.cat([chunk.x[chunk.number == task.id] for chunk in asked])
        assert torch.equal(x.sort(0).values, task.test[:].x.sort(0).values)
    row, task_row = evaluate(strategy, stream)
    assert all(torch.equal(*pair) for pair in zip(evaluate(strategy, stream, questions), (row, task_row), strict=True))  # again
    for task in stream.tasks:
        scores = strategy.scores(task.test[:].x)
        inside = scores[:, 2 * task.id : 2 * task.id + 2].argmax(1) + 2 * task.id
        for measured, answer in ((row, scores.argmax(1)), (task_row, inside)):
            assert measured[task.id] == (answer == task.test.y).double().mean()


@pytest.mark.parametrize("boundaries", [True, False])
def test_fewer_images_are_answered_together_on_a_cpu(boundaries: bool) -> None:
    """Where they are large, or go through convolutions; else as many as of other samples."""

    def sizes(side: int, model: nn.Module) -> list[int]:
        x, y = torch.zeros(700, 1, side, side), torch.arange(700) % 4
        stream = from_tensors(x, y, x, y, tasks=2, boundaries=boundaries)
        return [len(chunk.x) for chunk in Questions(Finetune(model), stream)]

    convolves = nn.Sequential(nn.Conv2d(1, 4, 4), nn.Flatten())
    for few in (sizes(4, convolves), sizes(65, Mlp((1, 65, 65), 4, hidden=()))):
        assert sum(few) == 700 and max(few) <= IMAGES_ON_CPU and len(few) == 4
    assert sizes(4, Mlp((1, 4, 4), 4)) == [700]


def test_hidden_chunks_that_no_task_has_a_share_of_are_left_out() -> None:
    y = torch.arange(CHUNK).repeat_interleave(3)
    stream = Stream("thin", [Task(task, (task,), *[Samples(torch.zeros(3, 2), y[3 * task : 3 * task + 3])] * 2) for task in
                             range(CHUNK)], boundaries=False)  # fmt: skip
    asked = list(Questions(Finetune(Mlp(2, CHUNK, hidden=(2,))), stream))
    assert sum(len(chunk.x) for chunk in asked) == len(y) and all(len(chunk.x) for chunk in asked)


@pytest.mark.parametrize(
    ("scores", "label"),
    [
        ([0.0, 5.0, 1.0, 2.0, 0.0], 3),
        ([0.0, 5.0, 2.0, 2.0, 0.0], 2),  # the first of those that are equal
        ([9.0, 5.0, -torch.inf, -torch.inf, 0.0], 0),  # none of the task's competes, as under `active_classes="seen"`
        ([9.0, 5.0, -torch.inf, -3.0, 0.0], 3),
    ],
)
def test_with_the_task_given_its_best_class_is_the_answer(scores: list[float], label: int) -> None:
    part = Samples(torch.zeros(1, 2), torch.tensor([2]))
    stream = Stream("five", [Task(0, (0, 1, 4), *[Samples(part.x, part.y - 2)] * 2), Task(1, (3, 2), part, part)])
    questions = Questions(Finetune(Mlp(2, 5, hidden=(2,))), stream)
    answer: Tensor = questions.best_of_task(torch.tensor([scores]), torch.tensor([1]))
    assert answer.tolist() == [label]
