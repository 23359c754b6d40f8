"""Models: modules whose first layer normalises raw input, and whose stages and head can be reached by name."""

from clstream.models.batch_norm_mlp import BatchNormMlp as BatchNormMlp
from clstream.models.classifier import Classifier as Classifier
from clstream.models.clip import Clip as Clip
from clstream.models.convnets import Conv4 as Conv4
from clstream.models.convnets import ConvNet as ConvNet
from clstream.models.convnets import LeNet as LeNet
from clstream.models.convnets import MnistLike as MnistLike
from clstream.models.convnets import VggSmall as VggSmall
from clstream.models.heads import GrowingHead as GrowingHead
from clstream.models.heads import grow as grow
from clstream.models.linear import Linear as Linear
from clstream.models.mlp import Mlp as Mlp
from clstream.models.pretrained import Pretrained as Pretrained
from clstream.models.resnet import ResNet18 as ResNet18
from clstream.models.resnet import SlimResNet18 as SlimResNet18
from clstream.models.timm import Timm as Timm
from clstream.models.vit import VitTiny as VitTiny

__all__ = [
    "BatchNormMlp",
    "Clip",
    "Conv4",
    "ConvNet",
    "LeNet",
    "Linear",
    "MnistLike",
    "Mlp",
    "Pretrained",
    "ResNet18",
    "SlimResNet18",
    "Timm",
    "VggSmall",
    "VitTiny",
]
