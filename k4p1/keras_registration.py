"""Lets Keras read files that hold layers of k4p1, whichever of the two is imported first; imports neither itself."""

import importlib
import importlib.util
import sys

LAYERS = {
    "CentralWindow": "k4p1.backbones.residual",
    "CentreTap": "k4p1.patches.kinds.parallel_adapter",
    "ChannelPadding": "k4p1.backbones.residual",
    "FilterCombination": "k4p1.patches.kinds.dan",
    "FreeWeights": "k4p1.patches.kinds.packnet",
    "HalvingPadding": "k4p1.backbones.halving_padding",
    "InputScaling": "k4p1.backbones.input_scaling",
    "LowRank": "k4p1.patches.kinds.lora",
    "Mixing": "k4p1.patches.tailored.layers",
    "OutputScaleBias": "k4p1.patches.kinds.scale_bias",
    "PatchedBatchNormalization": "k4p1.patches.patched_batch_normalization",
    "PatchedConvolution": "k4p1.patches.patched_convolution",
    "PatchedNormalization": "k4p1.patches.patched_normalization",
    "PrivateKernel": "k4p1.patches.kinds.depthwise",
    "ProxyConvolution": "k4p1.patches.tailored.layers",
    "ProxyPooling": "k4p1.patches.tailored.layers",
    "SeriesBranch": "k4p1.patches.kinds.series_adapter",
    "SharedSeriesAdapter": "k4p1.backbones.series_adapters",
    "WeightMask": "k4p1.patches.kinds.mask",
}
"""The classes that register themselves with Keras when their modules are imported, and these modules."""


def register() -> None:
    """Offers the layers to Keras: now, if it is there, or as soon as it is imported."""
    if "keras" in sys.modules:
        _offer()
    else:
        sys.meta_path.insert(0, _WhenKerasIsImported())


def _offer() -> None:
    known = importlib.import_module("keras.saving").get_custom_objects()
    for name, module in LAYERS.items():
        known.setdefault(f"k4p1>{name}", _standing_in(name, module))


def _standing_in(name: str, module: str) -> type:
    """What Keras finds until the module of the class is imported: reading from a description imports it."""

    def from_config(_, config):
        return getattr(importlib.import_module(module), name).from_config(config)

    return type(name, (), {"from_config": classmethod(from_config), "__doc__": f"Stands in for {module}.{name}."})


class _WhenKerasIsImported:
    """A finder that finds nothing of its own; it offers the layers right behind the import of Keras."""

    _asking = False

    def find_spec(self, name, path=None, target=None):
        """The specification that others find, with one more thing to do. Whoever asks need not import what it finds."""
        if name != "keras" or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_offer(module):
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _offer()

            spec.loader.exec_module = execute_and_offer
        return spec
