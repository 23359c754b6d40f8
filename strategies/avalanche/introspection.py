"""What an Avalanche strategy does, read from its code: whether it can be played here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from clstream.avalanche.imports import import_avalanche

FREE = (
    "Naive", "Replay", "ER_ACE", "ER_AML", "DER", "MIR", "MER", "CoPE", "GSS_greedy", "GDumb", "SCR", "StreamingLDA", "Cumulative",
    "ReplayPlugin", "MIRPlugin", "GSS_greedyPlugin", "CoPEPlugin", "GDumbPlugin", "LRSchedulerPlugin", "EvaluationPlugin", "Clock",
    "PeriodicEval",
)  # fmt: skip
"""Strategies and plugins of Avalanche's whose work between experiences is about samples, whatever task they are of."""


def check_playable(strategy: Any, plugins: Sequence[Any]) -> None:
    """Refuse what is no supervised strategy of Avalanche's, or one whose loop can't be played batch by batch."""
    if isinstance(strategy, type) or not isinstance(strategy, supervised_templates()):
        what = f"the class {strategy.__name__}" if isinstance(strategy, type) else f"a {type(strategy).__name__}"
        raise TypeError(f"AvalancheStrategy takes an object of a supervised strategy of Avalanche, such as Naive(...), not {what}")
    name = type(strategy).__name__
    callbacks = import_avalanche("core").BasePlugin
    if not isinstance(plugins, (list, tuple)):
        raise TypeError(f"plugins must be a list of Avalanche's plugins, not a {type(plugins).__name__}")
    for plugin in plugins:
        if not isinstance(plugin, callbacks):
            raise TypeError(f"plugins must be plugins of Avalanche, not {plugin!r}")
    for loop in ("train", "_train_exp"):
        if any(loop in vars(cls) for cls in type(strategy).__mro__ if not _is_template(cls)):
            instead = ": Cumulative, or clstream's Joint, can be" if name == "JointTraining" else ""
            raise ValueError(f"{name} has a {loop} of its own, so it can't be played batch by batch{instead}")
    if name == "AR1":
        raise ValueError("AR1 counts the batches of its own loop, so it can't be played batch by batch")
    if strategy.eval_every >= 0:
        raise ValueError(
            f"{name} is to evaluate by itself (eval_every={strategy.eval_every}): leave that out, run(...) evaluates it"
        )
    stopping = import_avalanche("training.plugins").EarlyStoppingPlugin
    for plugin in (*plugins, *strategy.plugins):
        if isinstance(plugin, stopping) or getattr(plugin, "metric", None) == "val_loss":
            raise ValueError(
                f"{type(plugin).__name__} looks at what Avalanche's evaluation measured, which there is none of: leave it out"
            )


def supervised_templates() -> tuple[Any, ...]:
    """Return Avalanche's templates of supervised strategies: the plain one, and that of MER."""
    templates = import_avalanche("training.templates")
    return templates.SupervisedTemplate, templates.SupervisedMetaLearningTemplate


def _is_template(cls: type) -> bool:
    """Return whether a class is one of Avalanche's templates, which all strategies share."""
    return cls.__module__.startswith("avalanche.training.templates")


def _counts(plugin: object) -> bool:
    return type(plugin).__name__ in ("Clock", "PeriodicEval", "EvaluationPlugin")


def _nothing(strategy: object) -> None:
    """Stand for a callback that a plugin hasn't."""


def needs_boundaries(strategy: Any) -> bool:
    """Return whether one of a strategy's plugins, or itself, does something between experiences that is not about samples alone."""
    return any(_works_between(plugin, "") for plugin in strategy.plugins) or _works_between(strategy, "_")


def _works_between(worker: Any, prefix: str) -> bool:
    """Return whether a plugin or strategy handles the begin or the end of experiences, and is none of `FREE`."""
    names = [f"{prefix}{moment}" for moment in ("before_training_exp", "after_training_exp")]
    shared = ("avalanche.core", "avalanche.training.templates")  # what all have
    kinds = [cls for cls in type(worker).__mro__ if not cls.__module__.startswith(shared)]
    handling = [cls for cls in kinds if any(name in vars(cls) for name in names)]
    theirs = next((cls.__name__ for cls in kinds if cls.__module__.startswith("avalanche.")), "")
    return any(theirs not in FREE or not cls.__module__.startswith("avalanche.") for cls in handling)


def lists_classes(strategy: Any) -> bool:
    """Return whether a strategy reads which classes come in each experience, and takes every class to come once: their iCaRL."""
    icarl = import_avalanche("training.supervised.icarl")._ICaRLPlugin
    return any(isinstance(plugin, icarl) for plugin in strategy.plugins)


def is_multi_task(model: nn.Module) -> bool:
    """Return whether a model of theirs takes task labels."""
    multi_task: bool = import_avalanche("models.utils").is_multi_task_module(model)
    return multi_task


def loader_source(loader: Any) -> tuple[Any, Callable[..., Any]] | None:
    """Return what a loader draws rows from, and how they become a batch; None for one that says neither."""
    torch_loader = _torch_loader(loader)
    return None if torch_loader is None or torch_loader.batch_sampler is None else (torch_loader.dataset, torch_loader.collate_fn)


def draw_order(loader: Any) -> list[list[int]]:
    """Return the rows of each batch of one pass, drawn as the loader itself would draw them."""
    torch_loader = _torch_loader(loader)
    assert torch_loader is not None
    assert torch_loader.batch_sampler is not None
    torch.empty((), dtype=torch.int64).random_(generator=torch_loader.generator)  # torch's loaders draw a seed for workers first
    return [list(rows) for rows in torch_loader.batch_sampler]


def _torch_loader(loader: Any) -> DataLoader[Any] | None:
    """Return the loader of torch's that does the work."""
    if isinstance(loader, DataLoader):
        return loader if loader.num_workers == 0 else None
    multiple = import_avalanche("benchmarks.utils.data_loader").MultiDatasetDataLoader
    if isinstance(loader, multiple) and not loader.never_ending:
        torch_loader: DataLoader[Any] = loader._get_loader()
        return torch_loader if torch_loader.num_workers == 0 else None
    return None
