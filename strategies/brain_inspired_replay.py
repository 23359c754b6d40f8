"""BIR (brain-inspired replay): one network that classifies and generates, of a chosen class, in a part of its decoder.

van de Ven, Siegelmann, Tolias 2020, "Brain-inspired replay for continual learning with artificial neural networks" (Nature
Communications 11:4069), and github.com/GMvandeVen/brain-inspired-replay. Generative replay (see `DGR`) with these components:

    replay through feedback   the generator is the classifier itself, with a decoder that leads from its features back to the input:
                              h = f(x), outputs C h, latent z ~ N(mu(h), sigma(h)), x^ = decoder(z)
    conditional replay        the prior of z is a mixture with a normal for each class, whose mean and variance are learned; what is
                              replayed is drawn of a class, each old one alike
    gating by context         each class has a random share `gated` of the units of the decoder's hidden layers off, for good
    distillation              what is replayed has the softened outputs of the last network as its target, T = 2
    internal replay           what is replayed are features of a frozen part of the network: `streams.features`, see below

A step minimises, with r = 1 / tasks so far and primes for what was replayed; no term has a weight of its own:

    r (L_C + L_R + L_V) + (1 - r) (L_D' + L_R' + L_V')

    L_C  cross-entropy of y              L_D  T^2 times the cross-entropy to the last network's softmax(C' h' / T)
    L_R  binary cross-entropy, mean over inputs ("mse": half of the squared error)
    L_V  (log q(z | x) - log sum over classes of p_c N(z; mean_c, variance_c)) / inputs, for the z that was drawn

p, with which classes are mixed, is the label of a new sample, and for a replayed one the last network's softened answer, over old
classes; gates are mixed by p in the same way. The class that a sample was drawn of is not its target.

With `conditional=False` the prior is a unit normal, and the divergence exact; with `gated=0` there are no gates; with
`distill=False` the target is the last network's label, and with all three it is replay through feedback alone (van de Ven &
Tolias 2018).

Internal replay: the paper's network for natural images has convolutional layers that are trained before and frozen, and replays
what they give. A stream of such features (`clstream.streams.features`, `--features`) is that; take `reconstruction="mse"`.

Deviations: gates are by class; those by task, which the code has for permuted MNIST, are left out. The code divides L_V of internal
replay by the number of pixels, here by that of features. On a task-incremental stream each sample is drawn of one past task, of all
alike, where the code draws for each a batch of its own; what competes is the same. The encoder is `model.features` of any network,
and the decoder fully connected layers; the code mirrors convolutions without internal replay. What is generated isn't augmented
again. A task that comes again counts as a further one.

Measured (class-IL Split MNIST, Mlp 400-400, one pass in batches of 32, active_classes="seen", 3 seeds): accuracy 0.703 ± 0.028;
`DGR` has 0.527 ± 0.083 so. The paper's 10,000 steps on batches of 128 were not run.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Adam

from clstream.bus import on
from clstream.events import RunContinued
from clstream.models.heads import grow_state
from clstream.models.vae import RECONSTRUCTIONS, Latent
from clstream.params import check_bool, check_choice, check_integer, check_integers, check_share
from clstream.strategy import OptimizerFactory
from clstream.strategy.generative_replay import GenerativeReplay, sizes_of, unit
from clstream.stream import Samples


class BIR(GenerativeReplay):
    """Replay what the network itself generates, by feedback connections, of each old class.

    Args:
        model: has `features`, (n, *input_shape) raw inputs to (n, features), and a linear `head`; it says its `input_shape`, and
            takes bytes and numbers from 0 to 1 alike, as the models of clstream do.
        optimizer: makes the optimizer from the model's parameters; those of latent, prior and decoder join it.
        importance: r, what the loss of new samples weighs from the second task on. None: 1 / tasks so far.
        replay_batch: how many samples are generated for each batch. None: as many as it has.
        distill: whether generated samples have the last network's softened outputs as targets, or its label.
        temperature: T, by which outputs are divided before the softmax of distillation.
        conditional: whether each class has a normal of its own in the prior, or all one unit normal.
        gated: the share of the units of each hidden layer of the decoder that is off for a class, from 0 up to below 1.
        decoder: widths of the decoder's hidden layers, from the latent on.
        latent: width of the latent.
        reconstruction: the loss of decoded inputs: "bce" for inputs from 0 to 1, "mse" for any.
        active_classes: whose outputs compete, "all", "seen" or "task": see `clstream.Strategy`.

    """

    generator: Latent

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(Adam, lr=1e-3),
        importance: float | None = None,
        replay_batch: int | None = None,
        distill: bool = True,
        temperature: float = 2.0,
        conditional: bool = True,
        gated: float = 0.8,
        decoder: tuple[int, ...] = (400, 400),
        latent: int = 100,
        reconstruction: str = "bce",
        active_classes: str = "all",
    ) -> None:
        super().__init__(model, optimizer, importance, replay_batch, distill, temperature, active_classes)
        check_bool(conditional=conditional)
        check_share(gated=gated)
        check_integers(1, decoder=decoder)
        check_integer(1, latent=latent)
        check_choice(RECONSTRUCTIONS, reconstruction=reconstruction)
        features, classes, input_shape = sizes_of(model, "BIR")
        self.generator = Latent(features, latent, decoder, input_shape, reconstruction, classes, gated, conditional)
        self.optimizer.add_param_group({"params": list(self.generator.parameters())})

    @property
    def reconstruction(self) -> str:
        """The loss of decoded inputs."""
        return self.generator.reconstruction

    @on(RunContinued)
    def widen(self, event: RunContinued) -> None:
        """Give new classes a normal and gates."""
        classes = sizes_of(self.model, "BIR")[1]
        grow_state(self.optimizer, self.generator.widen(classes))
        if isinstance(self.teacher_generator, Latent):
            self.teacher_generator.widen(classes)  # of classes that it will never draw

    def generate(self, n: int) -> Samples:
        """Return n samples that the last network generates, its outputs for them, and which head they are of: `extra["head"]`.

        They are of each head alike, and within one of its classes at random.
        """
        assert self.teacher is not None
        assert isinstance(self.teacher_generator, Latent)
        device = self.old_classes.device
        head = torch.arange(n, device=device) % len(self.past)
        classes = nn.utils.rnn.pad_sequence(self.past, batch_first=True)
        counts = torch.tensor([len(labels) for labels in self.past], device=device)
        places = (torch.rand(n, generator=self.random).to(device) * counts[head]).long()
        labels = classes[head, places]
        x = self.teacher_generator.sample(n, self.random, labels)
        return Samples(x, labels, {"before": self.teacher(x), "head": head})

    def loss_of_new(self, x: Tensor, samples: Samples) -> Tensor:
        """Return L_C + L_R + L_V."""
        features, outputs = self.features_and_outputs(x)
        labels = self.known_classes
        shares = (samples.y[:, None] == labels).to(features)
        return self.loss_of_outputs(outputs, samples) + self.generator.loss(unit(x), features, labels, shares)

    def loss_of_generated(self, samples: Samples) -> Tensor:
        """Return L_D + L_R + L_V of generated samples."""
        features, outputs = self.features_and_outputs(samples.x)
        before = samples.extra["before"]
        old = torch.stack([self.mask_of(labels, outputs) for labels in self.past])[samples.extra["head"]]
        shares = self.targets(before, old)[:, self.old_classes]
        return self.labelled_loss(outputs, before, old) + self.generator.loss(samples.x, features, self.old_classes, shares)

    def features_and_outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (n, features) and (n, classes) outputs for inputs."""
        features: Tensor = self.model.features(x)  # type: ignore[operator]  # the constructor has asked for it
        outputs: Tensor = self.model.head(features)  # type: ignore[operator]
        return features, outputs
