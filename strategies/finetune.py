"""Fine-tuning: learn each batch and do nothing against forgetting. The lower bound that every method is held against.

Measured (class-IL Split MNIST, 5 tasks, 1 epoch, batch 10, SGD 0.1, Mlp 100-100): see the anchor `finetune-split-mnist`.
"""

from __future__ import annotations

from clstream.strategy import Strategy


class Finetune(Strategy):
    """Learn each batch and nothing else.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits.
        optimizer: makes the optimizer from the model's parameters.

    """
