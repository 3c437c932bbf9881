"""What tasks share: networks from images to features."""

from k4p1.backbones.backbone import Backbone
from k4p1.backbones.build import application
from k4p1.backbones.build import from_model
from k4p1.backbones.build import inception_v3
from k4p1.backbones.build import mobilenet_v2
from k4p1.backbones.files import load
from k4p1.backbones.files import save
from k4p1.backbones.backbone_like import BackboneLike
from k4p1.backbones.backbone_like import as_backbone
from k4p1.backbones.networks import cifar_resnet
from k4p1.backbones.networks import resnet26
from k4p1.backbones.networks import resnet34
from k4p1.backbones.networks import vgg16_bn
from k4p1.backbones.networks import wide_resnet
from k4p1.backbones.series_adapters import with_series_adapters

__all__ = [
    "Backbone",
    "BackboneLike",
    "application",
    "as_backbone",
    "cifar_resnet",
    "from_model",
    "inception_v3",
    "load",
    "mobilenet_v2",
    "resnet26",
    "resnet34",
    "save",
    "vgg16_bn",
    "wide_resnet",
    "with_series_adapters",
]
