"""Folds a patch into plain Keras layers: the model of one task, at the cost of the unpatched backbone."""

import keras

from k4p1.patches.own_layer import OwnLayer
from k4p1.patches.patched_layer import PatchedLayer, private_copy
from k4p1.patches.patched_model import PatchedModel


def fold(model: keras.Model | PatchedModel) -> keras.Model:
    """A copy of a task model without patched layers; it shares no variable with the original.

    A patched batch normalisation becomes a plain one with the task's values, a patched convolution a plain one with scale,
    bias and kernel written into its weights; what k4p1 adds around a network (scaling of pixels, padding) becomes layers of
    Keras. The function at inference stays the same, up to rounding, and Keras alone reads the model from a file.

    Args:
      model: a task model, or what `apply_patches` gave.
    """
    model = model.model if isinstance(model, PatchedModel) else model
    made: dict[int, keras.layers.Layer] = {}

    def plain(layer: keras.layers.Layer) -> keras.layers.Layer:
        if id(layer) not in made:
            has_folded = isinstance(layer, (PatchedLayer, OwnLayer))
            made[id(layer)] = layer.folded() if has_folded else private_copy(layer)
        return made[id(layer)]

    def called(layer: keras.layers.Layer, *args, **kwargs):
        return layer.plain(*args) if hasattr(layer, "plain") else layer(*args, **kwargs)

    return keras.models.clone_model(model, clone_function=plain, call_function=called, recursive=True)
