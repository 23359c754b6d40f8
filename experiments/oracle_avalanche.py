"""DER++, A-GEM, EWC, SI, LwF against Avalanche's: `python experiments/oracle_avalanche.py [--seeds 0,1,2,3,4] [--methods EWC,SI]`.

Both learn Split MNIST (class-IL, 5 tasks, one epoch, batch 10, SGD without momentum) with the same net, which starts from the same
weights for each seed. The order of the batches and the draws are each library's own, so the runs are compared as samples: mean and
standard deviation of the final average accuracy (class-IL, and with the task given) and of forgetting, and the difference of the
means with its standard error and p-value (Welch). It needs avalanche-lib 0.6.0: pip install 'clstream[avalanche]'.

Avalanche 0.6.0, read, differs from the papers and from clstream in this. Its DER (DER++ with beta > 0):

- fills its memory when a task is over: as many samples of each class seen, drawn uniformly; a task is learned with no replay of its
  own samples. Paper, clstream: a reservoir over the stream, which takes in each batch when it was learned.
- keeps the outputs of the model at the end of the task, in evaluation mode. Paper: those at the step that learned the sample.
- takes both replay terms on one draw (paper: two), in one forward pass with the batch, in shuffled passes over the memory (paper:
  independent draws). It doesn't replay before the memory holds a replay batch.

So a third strategy is measured: clstream's DERpp with `draws=1` and a class-balanced memory that is filled as Avalanche fills it.
That one must agree with Avalanche within seed noise; DERpp proper may differ, by what the memory does.

Its AGEM takes the reference gradient on sample_size // (past tasks) samples of each past task, in shuffled passes; clstream draws
from all of them together. The rest is the same: a task leaves a uniform sample, and only a gradient that points against the
reference is projected.

The others are made to do the same by options of clstream's:

- EWC's importance is the mean over batches of the squared gradient of a batch's mean loss, without the batch size as a factor
  (fisher="empirical", fisher_batch=BATCH, and a BATCH-th of the strength). It goes over the samples as they lie in the benchmark,
  class by class, so the gradients of a batch agree, and it is about twice as large as over shuffled ones. It is measured as it is,
  and with shuffled samples.
- SI follows the gradient of the loss with its own penalty, cuts importance off at 0.001, and halves the penalty
  (gradient="objective", most=0.001, half of the strength). On the CPU it does nothing at all: the weights that it notes before a
  step are views of the weights, so no step moves them. It is measured as it is, and with copies in their place.
- LwF distils by a divergence over the classes seen so far, without T^2: the same gradient as the cross-entropy.
- All learn the cross-entropy over all ten outputs, from the start (form="softmax_all", "softmax_all_kd").
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from clstream.strategies import AGEM, EWC, SI, DERpp, Finetune, LwF
from clstream.streams import from_tensors, split_mnist
from torch import Tensor, nn

from clstream import BatchLearned, Strategy, Stream, TaskEnded, metrics, on, run
from clstream.memory import ClassBalanced
from clstream.models import Mlp
from clstream.strategy import allowed

LR, BATCH, CAPACITY, ALPHA, BETA, PER_TASK, SAMPLE = 0.03, 10, 500, 1.0, 0.5, 250, 60
EWC_LAMBDA, SI_LAMBDA, SI_EPSILON, LWF_ALPHA, TEMPERATURE = 100.0, 2000.0, 0.1, 2.0, 2.0


class Measured(NamedTuple):
    """What one run gave."""

    accuracy: float
    task_accuracy: float
    forgetting: float
    seconds: float


class FilledAfterwards(DERpp):
    """DER++ whose memory is filled as Avalanche's: class by class when a task is over, with the outputs that it then has."""

    def __init__(self, model: nn.Module, optimizer: Callable[..., Any], capacity: int, alpha: float, beta: float) -> None:
        super().__init__(model, optimizer, capacity, None, alpha, beta, draws=1)
        self.memory = ClassBalanced(capacity)  # type: ignore[assignment]

    @on(BatchLearned)
    def remember(self, event: BatchLearned) -> None:
        """Keep nothing yet."""

    @on(TaskEnded)
    @torch.no_grad()
    def fill(self, event: TaskEnded) -> None:
        """Offer the whole task, with the outputs of the model as it is now."""
        samples = event.task.train[:]
        self.memory.add(type(samples)(samples.x, samples.y, {"logits": self.outputs(samples)}))


class _Targets(torch.utils.data.TensorDataset):
    """A TensorDataset with the `targets` that Avalanche asks for."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__(x, y)
        self.targets = y.tolist()


def with_copies(strategy: Any) -> Any:
    """Have Avalanche's SI note copies of the weights, as it does where the weights are not on the CPU; for all that come after."""
    from avalanche.training.plugins import SynapticIntelligencePlugin as Plugin

    noted = Plugin.extract_weights

    def extract_weights(model: nn.Module, target: dict[str, Any], excluded: set[str]) -> None:
        noted(model, target, excluded)
        for each in target.values():
            each.data = each.data.clone()

    Plugin.extract_weights = staticmethod(extract_weights)
    return strategy


def with_shuffled(strategy: Any) -> Any:
    """Have Avalanche's EWC take its importance over shuffled samples."""
    plugin = next(each for each in strategy.plugins if hasattr(each, "compute_importances"))
    own = plugin.compute_importances

    def compute_importances(model: nn.Module, criterion: Any, optimizer: Any, dataset: Any, *rest: Any, **named: Any) -> Any:
        return own(model, criterion, optimizer, dataset.subset(torch.randperm(len(dataset)).tolist()), *rest, **named)

    plugin.compute_importances = compute_importances
    return strategy


def data(per_task: int | None) -> tuple[Stream, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return Split MNIST in floats from 0 to 1 as a stream and as tensors; of each task `per_task` training samples, if given."""
    tasks = split_mnist().tasks
    train, test = [task.train[:per_task] for task in tasks], [task.test[:] for task in tasks]
    x, x_test = (torch.cat([part.x for part in parts]).flatten(1) / 255 for parts in (train, test))
    y, y_test = (torch.cat([part.y for part in parts]) for parts in (train, test))
    return from_tensors(x, y, x_test, y_test, "split_mnist", batch_size=BATCH), (x, y, x_test, y_test)


def ours(make: Callable[[nn.Module], Strategy], net: nn.Module, stream: Stream, seed: int) -> Measured:
    """Run a strategy of clstream."""
    begin = time.perf_counter()
    result = run(make(net), stream, seed=seed)
    task_accuracy = metrics.average_accuracy(result.task_accuracy, result.taught)
    return Measured(result.average_accuracy, task_accuracy, result.forgetting, time.perf_counter() - begin)


def theirs(make: Callable[[nn.Module], Any], net: nn.Module, stream: Stream, benchmark: Any, seed: int) -> Measured:
    """Run a strategy of Avalanche; the answers of its model are judged here, after each task."""
    from avalanche.training.determinism.rng_manager import RNGManager

    RNGManager.set_random_seeds(seed)  # Avalanche draws from the global generators of Python, numpy and torch
    begin = time.perf_counter()
    strategy = make(net)
    tests = [(task, task.test[:]) for task in stream.tasks]
    rows, task_rows = [], []
    for experience in benchmark.train_stream:
        strategy.train(experience)
        strategy.model.eval()
        row, task_row = [], []
        with torch.inference_mode():
            for task, samples in tests:
                scores = strategy.model(samples.x)
                inside = scores.masked_fill(~allowed(task, scores), float("-inf"))
                row.append(float((scores.argmax(1) == samples.y).double().mean()))
                task_row.append(float((inside.argmax(1) == samples.y).double().mean()))
        rows.append(row)
        task_rows.append(task_row)
    accuracy, task_accuracy = torch.tensor(rows), torch.tensor(task_rows)
    seconds = time.perf_counter() - begin
    return Measured(
        metrics.average_accuracy(accuracy), metrics.average_accuracy(task_accuracy), metrics.forgetting(accuracy), seconds
    )


def welch(a: list[float], b: list[float]) -> str:
    """Return the difference of two means with its standard error, and Welch's p-value, in words."""
    from scipy.stats import ttest_ind

    error = (statistics.variance(a) / len(a) + statistics.variance(b) / len(b)) ** 0.5
    test = ttest_ind(a, b, equal_var=False)
    return f"{statistics.mean(a) - statistics.mean(b):+.4f} ± {error:.4f} (p {float(test.pvalue):.3f})"


def report(name: str, runs: list[Measured], reference: list[Measured] | None) -> None:
    """Print mean and standard deviation of each measure and, against a reference, the differences."""
    print(f"{name}, {statistics.mean(each.seconds for each in runs):.1f} s a run")
    for measure in ("accuracy", "task_accuracy", "forgetting"):
        values = [float(getattr(each, measure)) for each in runs]
        line = f"  {measure:14} {statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
        if reference is not None:
            line += f"   less Avalanche's {welch(values, [float(getattr(each, measure)) for each in reference])}"
        print(line + "   each " + " ".join(f"{value:.4f}" for value in values), flush=True)


def main() -> int:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", help="folder with MNIST, in torchvision's layout")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="at least two")
    parser.add_argument("--per-task", type=int, help="training samples of each task; all of them unless given")
    parser.add_argument("--methods", default="DER++,A-GEM,EWC,SI,LwF,Fine-tuning", help="those whose names begin so")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    try:
        from avalanche.benchmarks import nc_benchmark
        from avalanche.benchmarks.utils import as_classification_dataset
        from avalanche.training import supervised
        from avalanche.training.plugins import EvaluationPlugin
    except ImportError:
        print("avalanche-lib is not installed here: pip install 'clstream[avalanche]' to compare with it")
        return 0
    if options.data_root:
        os.environ["CLSTREAM_DATA"] = options.data_root
    torch.set_num_threads(options.threads)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    stream, (x, y, x_test, y_test) = data(options.per_task)
    train, test = (as_classification_dataset(_Targets(*pair)) for pair in ((x, y), (x_test, y_test)))
    benchmark = nc_benchmark(train, test, 5, task_labels=False, shuffle=False)
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, {len(x):,} training samples, seeds {options.seeds}")

    def their(kind: Any, net: nn.Module, **given: Any) -> Any:
        return kind(
            model=net, optimizer=torch.optim.SGD(net.parameters(), LR), criterion=nn.CrossEntropyLoss(), train_mb_size=BATCH,
            train_epochs=1, eval_mb_size=2048, evaluator=EvaluationPlugin(), **given,
        )  # fmt: skip

    sgd = partial(torch.optim.SGD, lr=LR)
    derpp: dict[str, Any] = {"alpha": ALPHA, "beta": BETA}
    their_der = partial(their, supervised.DER, mem_size=CAPACITY, batch_size_mem=BATCH, **derpp)
    their_agem = partial(their, supervised.AGEM, patterns_per_exp=PER_TASK, sample_size=SAMPLE)
    their_ewc = partial(their, supervised.EWC, ewc_lambda=EWC_LAMBDA)
    their_si = partial(their, supervised.SynapticIntelligence, si_lambda=SI_LAMBDA, eps=SI_EPSILON)

    def our_ewc(net: nn.Module) -> Strategy:
        return EWC(net, sgd, EWC_LAMBDA / BATCH, fisher="empirical", fisher_batch=BATCH, form="softmax_all")

    def our_si(net: nn.Module) -> Strategy:
        return SI(net, sgd, SI_LAMBDA / 2, damping=SI_EPSILON, gradient="objective", most=0.001, form="softmax_all")

    groups: list[tuple[str, Callable[..., Any], dict[str, Callable[..., Any]]]] = [
        ("DER++", their_der, {
            "clstream DERpp": lambda net: DERpp(net, sgd, CAPACITY, BATCH, **derpp),
            "clstream DERpp, one draw, memory filled as Avalanche's": lambda net: FilledAfterwards(net, sgd, CAPACITY, **derpp),
        }),
        ("A-GEM", their_agem, {"clstream AGEM": lambda net: AGEM(net, sgd, PER_TASK, SAMPLE)}),
        ("EWC", their_ewc, {"clstream EWC": our_ewc}),
        ("EWC, shuffled", lambda net: with_shuffled(their_ewc(net)), {
            "clstream EWC": our_ewc,
            "clstream EWC, one sample at a time": lambda net: EWC(
                net, sgd, EWC_LAMBDA / BATCH, fisher="empirical", form="softmax_all"
            ),
        }),
        ("SI", their_si, {"clstream SI": our_si}),
        ("SI, with copies", lambda net: with_copies(their_si(net)), {
            "clstream SI": our_si,
            "clstream SI, gradient of the loss": lambda net: SI(
                net, sgd, SI_LAMBDA / 2, damping=SI_EPSILON, most=0.001, form="softmax_all"
            ),
        }),
        ("LwF", partial(their, supervised.LwF, alpha=LWF_ALPHA, temperature=TEMPERATURE), {
            "clstream LwF": lambda net: LwF(net, sgd, "softmax_all_kd", LWF_ALPHA, temperature=TEMPERATURE),
        }),
        ("Fine-tuning", partial(their, supervised.Naive), {"clstream Finetune": lambda net: Finetune(net, sgd)}),
    ]  # fmt: skip
    wanted = tuple(options.methods.split(","))
    for name, reference, makers in groups:
        if not name.startswith(wanted):
            continue
        runs: dict[str, list[Measured]] = {each: [] for each in ("Avalanche", *makers)}
        for seed in seeds:
            torch.manual_seed(seed)
            net = Mlp(784, 10, (100, 100), init="xavier")
            runs["Avalanche"].append(theirs(reference, copy.deepcopy(net), stream, benchmark, seed))
            for each, make in makers.items():
                runs[each].append(ours(make, copy.deepcopy(net), stream, seed))
        print(f"\n{name}")
        report("Avalanche", runs["Avalanche"], None)
        for each in makers:
            report(each, runs[each], runs["Avalanche"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
