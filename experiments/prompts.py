"""What prompts do on a transformer that was pre-trained here: `python experiments/prompts.py RESULTS [--seeds 0,1,2]`.

Omniglot: 106 characters in ten tasks, on the small vision transformer of `experiments/pretrained_methods.py`, which was trained on
136 others, with the learning rates that were chosen there. Two controls: the nearest class mean by cosine (SimpleCIL), and a
linear probe, which is what the same head learns on the same transformer without prompts. What is finished is in the file RESULTS,
a line a run, and not run again; the last thing printed is the table:

within its task, then   accuracy with the task given, right after each task, and after the last: what was learned, and is kept
accuracy                after the last task, without the task given
moved                   1 - cosine between the features of a task's test images right after it and after the last task
own prompts             DualPrompt: the share of test images of all tasks that the key of their own task is nearest to, and the
                        accuracy if all of them were given the prompts of their own task, without the task given to the head
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from clstream.experiments.pretrained_features import interval
from clstream.experiments.pretrained_methods import Setting
from clstream.strategies import L2P, NCM, CODAPrompt, DualPrompt, LinearProbe
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Adam

from clstream import Stream, TaskEnded, on, run
from clstream.eval_mode import evaluating
from clstream.seeds import isolated
from clstream.strategy.prompting import Prompting

METHODS: dict[str, tuple[Callable[..., Any], float]] = {
    "NCM": (lambda model, _: NCM(model, distance="cosine"), 0.0),
    "LinearProbe": (partial(LinearProbe, active_classes="task"), 0.003),
    "L2P": (L2P, 0.03),
    "DualPrompt": (DualPrompt, 0.03),
    "CODAPrompt": (CODAPrompt, 0.03),
}
"""Each with the learning rate of Adam; means of classes have none."""

SHOWN = ("within_then", "within_now", "accuracy", "moved", "own_chosen", "own_given")


@torch.no_grad()
def features_of(strategy: Prompting, x: Tensor, own: int | None = None) -> Tensor:
    """Return (n, width) features with prompts; `own` is the number of the task whose prompts DualPrompt takes."""
    with evaluating(strategy):
        vit = strategy.vit
        tokens = vit.embed(x)
        query = vit.features(vit.run(tokens))
        if own is not None and isinstance(strategy, DualPrompt):
            query = strategy.all_prompts()[1][own].expand_as(query)  # nearest to its own key
        return strategy.prompted(vit, tokens, query, learning=False)[0]


class AfterTasks:
    """An observer that keeps the features of each task's test images right after it."""

    def __init__(self, strategy: Prompting) -> None:
        self.strategy, self.features = strategy, list[Tensor]()

    @on(TaskEnded)
    def keep(self, event: TaskEnded) -> None:
        """Keep them."""
        self.features.append(features_of(self.strategy, event.task.test[:].x))


def prompts_measured(strategy: Prompting, stream: Stream, after: AfterTasks) -> dict[str, float]:
    """Return how far features moved, and which prompts of DualPrompt are chosen."""
    samples = [task.test[:] for task in stream.tasks]
    now = [features_of(strategy, part.x) for part in samples]
    moved = [1 - F.cosine_similarity(*pair).mean() for pair in zip(after.features, now, strict=True)]
    measured = {"moved": float(torch.stack(moved).mean())}
    if isinstance(strategy, DualPrompt):
        keys = F.normalize(strategy.all_prompts()[1], dim=1)
        head = strategy.vit.model.head
        chosen, given = [], []
        for number, part in enumerate(samples):
            with evaluating(strategy), torch.no_grad():
                nearest = (F.normalize(strategy.vit.model.features(part.x), dim=1) @ keys.T).argmax(1)
                answers = head(features_of(strategy, part.x, number)).argmax(1)
            chosen.append((nearest == number).float().mean())
            given.append((answers == part.y).float().mean())
        measured |= {"own_chosen": float(torch.stack(chosen).mean()), "own_given": float(torch.stack(given).mean())}
    return measured


def play(setting: Setting, method: str, seed: int) -> dict[str, Any]:
    """Run a method; return what a line of the results has."""
    make, rate = METHODS[method]
    stream = setting.stream(seed)
    with isolated(seed, "model"):
        strategy = make(setting.model(stream), partial(Adam, lr=rate))
    after = [AfterTasks(strategy)] if isinstance(strategy, Prompting) else []
    result = run(strategy, stream, *after, seed=seed)
    row = {
        "method": method, "seed": seed, "rate": rate, "epochs": stream.epochs,
        "within_then": float(result.task_accuracy.diagonal().mean()), "within_now": float(result.task_accuracy[-1].mean()),
        "accuracy": result.average_accuracy, "seconds": result.seconds,
    }  # fmt: skip
    return row | (prompts_measured(strategy, stream, after[0]) if after else {})


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the results, a row for each method."""
    lines = [
        "| method | within its task, then | now | accuracy | features moved | own prompts chosen | accuracy with own prompts |",
        "|---|" + "---|" * len(SHOWN),
    ]
    for method in METHODS:
        if own := [row for row in rows if row["method"] == method]:
            cells = [interval([row[name] for row in own]) if name in own[0] else "" for name in SHOWN]
            lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--weights", type=Path, default=Path("omniglot-vit.pt"), help="of the transformer; written if not there")
    parser.add_argument("--data-root", help="the data folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting = Setting("omniglot", options.data_root, options.weights)
    rows = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    for seed in map(int, options.seeds.split(",")):
        for method in options.methods.split(","):
            if (method, seed) not in {(row["method"], row["seed"]) for row in rows}:
                rows.append(play(setting, method, seed))
                with options.results.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
