"""SimCLR: the network learns, without labels, that two views of an image are the same image.

Chen, Kornblith, Norouzi, Hinton 2020, "A Simple Framework for Contrastive Learning of Visual Representations" (ICML). Form
implemented, for the two views of each image of a batch, h the features of a view and z = W2 ReLU(W1 h + b1) + b2:

    NT-Xent of z (see `clstream.losses.nt_xent`)  +  the loss of the targets' kind on head(stop(h))

The network learns from the first term alone. The projection is thrown away: `clstream pretrain --objective simclr` keeps the
network. The answer is that of the model's head, which does learn from labels, behind a stop of the gradient: the linear classifier
that the authors' code trains beside the network (`lineareval_while_pretraining`). So accuracy tells what the features are worth.

It is there to pre-train. As a continual learner it has nothing against forgetting: the head forgets as that of a linear probe.

Deviations: any optimizer of torch's (paper: LARS); no batch norm in the projection (the authors' code has it; the paper has none in
its formula); those of the views are in `ContrastiveViews`. The stream's own augmentation is left out. The other samples of a batch
are what is told apart, so a batch should be large (paper: 4096); a batch of one sample has no contrast.

Measured, own numbers (`experiments/pretrained_features.py`: ConvNet, 136 characters of Omniglot, 40 epochs, batches of 128,
temperature 0.2, crops from 0.4 of the image on, no jitter, no blur; 3 seeds): a linear probe on held-out drawings 0.676 ± 0.006
(random weights 0.360 ± 0.076, supervised 0.643 ± 0.097); SLDA on the features of 106 other characters, in ten tasks, 0.749 ± 0.050
(0.473 ± 0.055, 0.667 ± 0.078). Nothing published is for this.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.optim import Adam

from clstream.augmentations import ContrastiveViews
from clstream.losses import nt_xent
from clstream.params import check_integer, check_positive
from clstream.strategy import OptimizerFactory, Strategy
from clstream.stream import Samples


class SimCLR(Strategy):
    """Learn features from two views of each image, and a linear head on them.

    Args:
        model: has `features`, (n, channels, height, width) raw images to (n, features), and a `head`, a module from these to the
            outputs.
        optimizer: makes the optimizer from the model's parameters; those of the projection join it.
        temperature: of the contrastive loss.
        projection: width of the projection's output; its hidden layer is as wide as the features.
        smallest, flip, jitter, grayscale, blur: see `ContrastiveViews`.
        active_classes: whose outputs compete, "all", "seen" or "task": see `clstream.Strategy`.

    """

    rehearsal_free = True
    needs_images = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(Adam, lr=0.001),
        temperature: float = 0.5,
        projection: int = 128,
        smallest: float = 0.08,
        flip: bool | None = None,
        jitter: float = 0.5,
        grayscale: float = 0.2,
        blur: float = 0.5,
        active_classes: str = "all",
    ) -> None:
        super().__init__(model, optimizer, active_classes)
        check_positive(temperature=temperature)
        check_integer(1, projection=projection)
        width = getattr(getattr(model, "head", None), "in_features", None)
        if not callable(getattr(model, "features", None)) or not isinstance(width, int):
            raise TypeError(
                f"SimCLR needs a model with a method `features` and a linear `head`, as those of clstream, which "
                f"{type(model).__name__} hasn't"
            )
        self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, projection))
        self.optimizer.add_param_group({"params": list(self.projection.parameters())})
        self.temperature = temperature
        self.views = ContrastiveViews(smallest, flip, jitter, grayscale=grayscale, blur=blur)

    def loss(self, samples: Samples) -> Tensor:
        """Return the contrastive loss of two views of each image, and the head's loss on both."""
        both = samples + samples
        features: Tensor = self.model.features(self.views(both.x))  # type: ignore[operator]  # the constructor has asked for it
        outputs: Tensor = self.model.head(features.detach())  # type: ignore[operator]  # as above
        return nt_xent(self.projection(features), self.temperature) + self.loss_of_outputs(outputs, both)
