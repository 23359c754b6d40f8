"""DGR (deep generative replay): a generator draws past inputs, the last network labels them, and both learn beside new samples.

Shin, Lee, Kim, Kim 2017, "Continual Learning with Deep Generative Replay" (NeurIPS). A scholar is a solver S and a generator G;
the one that the last task left labels and draws what the next one replays. Form implemented, with r what new samples weigh:

    solver      r CE(S(x), y) + (1 - r) CE(S(x'), y'),  x' drawn by the last G, y' the largest output of the last S for it
    generator   r L(x) + (1 - r) L(x')

`distill=True` is DGR+distill of van de Ven & Tolias 2018, "Generative replay with feedback connections as a general strategy for
continual learning" (arXiv 1809.10635): x' has all outputs of the last S as its target, in place of y', and its loss is

    T^2 times the cross-entropy of softmax(S'(x') / T) and softmax(S(x') / T), T = 2; classes S' did not know have a target of 0

The generator is theirs too, where the paper has a WGAN-GP: a VAE of fully connected layers, with a latent of 100 whose prior is a
unit normal; L is the binary cross-entropy (`reconstruction="mse"`: half of the squared error), the mean over inputs, + KL / inputs.
r is 1 / tasks so far, as in their code (github.com/GMvandeVen/continual-learning); the paper calls it the importance of the new
task, and lets it be chosen: `importance`. Replayed are as many samples as a batch has, drawn anew for each.

A paper's scholar learns its generator first and then its solver; here, as in the code, both learn in one step on the same x and
x', which changes nothing in either, since they share no weight. One optimizer has the weights of both.

On a task-incremental stream each x' is replayed for every past task, with the outputs of its own classes alone: the mean over them.
On others its label is among all classes that came in tasks that are over. What is generated isn't augmented, since what it is like
was. A task that comes again counts as a further one. The generator is fully connected for a convolutional solver too, where the
code's mirrors its layers. In the code the classes that came compete: `active_classes="seen"`.

Avalanche's GenerativeReplay learns the generator after the solver, from the second task on beside what it drew itself, and joins
x' to the batch, so that all samples weigh alike: r = 1/2. For that r, with the same x', the steps of the solver are the same
(`tests/test_generative_replay.py`).

Measured (class-IL Split MNIST, Mlp 400-400, one pass in batches of 32, active_classes="seen" as in van de Ven & Tolias, 3 seeds):
accuracy 0.527 ± 0.083, distilled 0.462 ± 0.042. The generator has 1,875 steps there. With 9,870 steps on batches of 128 one run
(seed 0) has 0.907; van de Ven & Tolias 2019, "Three scenarios for continual learning", have 0.908 ± 0.004 so (standard error of 20
runs), and distilled 0.918 ± 0.003, with which nothing was run here.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Adam

from clstream.models.vae import VAE
from clstream.strategy import OptimizerFactory
from clstream.strategy.generative_replay import GenerativeReplay, input_shape_of, unit
from clstream.stream import Samples


class DGR(GenerativeReplay):
    """Replay what a generator draws, labelled by the network as the last task left it.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits: the solver; it says its
            `input_shape`, and takes bytes and numbers from 0 to 1 alike, as those of clstream do.
        optimizer: makes the optimizer from the model's parameters; those of the generator join it.
        importance: r, what the loss of new samples weighs from the second task on. None: 1 / tasks so far.
        replay_batch: how many samples are generated for each batch. None: as many as it has.
        distill: whether generated samples have the last solver's softened outputs as targets, or its label.
        temperature: T, by which outputs are divided before the softmax of distillation.
        hidden: widths of the generator's hidden layers; its decoder has them in the other order.
        latent: width of the generator's latent.
        reconstruction: the generator's loss: "bce" for inputs from 0 to 1, "mse" for any.
        active_classes: whose outputs compete, "all", "seen" or "task": see `clstream.Strategy`.

    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(Adam, lr=1e-3),
        importance: float | None = None,
        replay_batch: int | None = None,
        distill: bool = False,
        temperature: float = 2.0,
        hidden: tuple[int, ...] = (400, 400),
        latent: int = 100,
        reconstruction: str = "bce",
        active_classes: str = "all",
    ) -> None:
        super().__init__(model, optimizer, importance, replay_batch, distill, temperature, active_classes)
        self.generator: VAE = VAE(input_shape_of(model, "DGR"), hidden, latent, reconstruction)
        self.optimizer.add_param_group({"params": list(self.generator.parameters())})

    @property
    def reconstruction(self) -> str:
        """The loss of decoded inputs."""
        return self.generator.latent.reconstruction

    def generate(self, n: int) -> Samples:
        """Return n samples of the last generator, with the last solver's outputs and the label that it gives among old classes."""
        assert self.teacher is not None
        assert isinstance(self.teacher_generator, VAE)
        x = self.teacher_generator.sample(n, self.random)
        before = self.teacher(x)
        return Samples(x, self.old_classes[before[:, self.old_classes].argmax(1)], {"before": before})

    def loss_of_new(self, x: Tensor, samples: Samples) -> Tensor:
        """Return the solver's cross-entropy + the generator's loss."""
        return self.loss_of_outputs(self.model(x), samples) + self.generator.loss(unit(x))

    def loss_of_generated(self, samples: Samples) -> Tensor:
        """Return the solver's loss, the mean over the heads of the tasks before, + the generator's."""
        outputs, before = self.model(samples.x), samples.extra["before"]
        losses = [self.labelled_loss(outputs, before, self.mask_of(labels, outputs)) for labels in self.past]
        return torch.stack(losses).mean() + self.generator.loss(samples.x)
