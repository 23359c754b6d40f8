"""Bottleneck adapters: a narrow hidden layer, after a module or beside it.

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", after a module; Chen et al. 2022, "AdaptFormer: Adapting
Vision Transformers for Scalable Visual Recognition", beside a block's hidden layer. Forms implemented, of a module that gives m(x):

    after     m(x) + scale * up(relu(down(m(x))))
    beside    m(x) + scale * up(relu(down(x)))

`down` begins as torch draws a linear layer, `up` as 0: the network begins as it was. Deviations: Houlsby et al. begin near 0, and
train the layer norms too (`trained=["head.*", "*.norm*"]` does). AdaptFormer's takes what the hidden layer takes, after the layer
norm. On modules of convolutions both layers are convolutions of 1 x 1.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from clstream.adapters.adapter import AdapterLayer, ModuleAdapter
from clstream.params import check_choice, check_integer, check_positive

FORMS = ("beside", "after")


class Bottleneck(ModuleAdapter):
    """A narrow hidden layer after a module (Houlsby et al. 2019), or beside it (AdaptFormer, Chen et al. 2022).

    Args:
        width: of the hidden layer.
        form: "beside" (it takes what the module takes) or "after" (it takes what the module gives).
        scale: what it gives is multiplied by it.
        modules: patterns of module names, by default of the hidden layers of transformer blocks. How wide a module's input and
            output are is read off the first and the last linear layer or convolution in it.

    """

    takes = "modules of linear layers, or of convolutions"

    def __init__(self, width: int = 16, form: str = "beside", scale: float = 1.0, modules: str | list[str] = "*.mlp") -> None:
        super().__init__(modules)
        check_integer(1, width=width)
        check_choice(FORMS, form=form)
        check_positive(scale=scale)
        self.width, self.form, self.scale = width, form, scale

    def fits(self, module: nn.Module) -> bool:
        """Return whether there are linear layers in a module, or convolutions, and not both."""
        return len({isinstance(layer, nn.Linear) for layer in _layers(module)}) == 1

    def layer(self, name: str, host: nn.Module) -> Narrow:
        """Return the hidden layer for a host."""
        layers = _layers(host)
        first, last = layers[0], layers[-1]
        if isinstance(first, nn.Linear) and isinstance(last, nn.Linear):
            taken, given = first.in_features, last.out_features
        else:
            assert isinstance(first, nn.Conv2d)
            assert isinstance(last, nn.Conv2d)
            taken, given = first.in_channels, last.out_channels
        inputs = taken if self.form == "beside" else given
        if isinstance(first, nn.Linear):
            return Narrow(nn.Linear(inputs, self.width), nn.Linear(self.width, given), self.form, self.scale)
        return Narrow(nn.Conv2d(inputs, self.width, 1), nn.Conv2d(self.width, given, 1), self.form, self.scale)


class Narrow(AdapterLayer):
    """What Bottleneck puts on a module: `down`, ReLU, `up`."""

    def __init__(self, down: nn.Module, up: nn.Module, form: str, scale: float) -> None:
        super().__init__()
        self.down, self.up, self.form, self.scale = down, up, form, scale
        for weight in up.parameters():
            nn.init.zeros_(weight)

    def forward(self, taken: Tensor, given: Tensor) -> Tensor:
        """Return what the host gave, and what the hidden layer adds."""
        added: Tensor = self.up(F.relu(self.down(taken if self.form == "beside" else given)))
        return given + self.scale * added


def _layers(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
