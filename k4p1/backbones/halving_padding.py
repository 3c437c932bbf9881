"""Padding before a layer of stride 2, right for whatever size the image has."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="k4p1")
class HalvingPadding(keras.layers.ZeroPadding2D):
    """Zeros around maps (batch, n, m, channels), after which a kernel of k (odd), stride 2, puts out ceil(n / 2) values.

    k // 2 zeros after the last row, and before the first one k // 2 where n is odd, k // 2 - 1 where it is even or not
    known; columns alike. Keras' networks pad so, but for the size that they are built for.

    Args:
      kernel_size: k.
    """

    def __init__(self, kernel_size: int, **kwargs):
        self.kernel_size = kernel_size
        after = kernel_size // 2
        super().__init__(((after - 1, after), (after - 1, after)), data_format="channels_last", **kwargs)

    def _amounts(self, shape):
        after = self.kernel_size // 2
        return [(0, 0), *((after - 1 + (side or 0) % 2, after) for side in shape[1:3]), (0, 0)]

    def call(self, inputs):
        return ops.pad(inputs, self._amounts(inputs.shape))

    def plain(self, inputs):
        """The same as a layer of Keras, for the size of these inputs, so that a folded model can be read without k4p1."""
        rows, columns = self._amounts(inputs.shape)[1:3]
        return keras.layers.ZeroPadding2D((rows, columns), dtype=self.dtype_policy, name=self.name)(inputs)

    def compute_output_shape(self, input_shape):
        amounts = self._amounts(input_shape)
        return tuple(None if side is None else side + sum(of) for side, of in zip(input_shape, amounts, strict=True))

    def get_config(self):
        config = super().get_config()
        return {**{n: v for n, v in config.items() if n not in ("padding", "data_format")}, "kernel_size": self.kernel_size}


def for_any_size(model: keras.Model, paddings: str) -> keras.Model:
    """A network that was built for one size, with the same weights and layers for every size.

    Args:
      model: the network.
      paddings: part of the names of those `ZeroPadding2D` that stand before layers of stride 2.
    """

    def replaced(layer: keras.layers.Layer) -> keras.layers.Layer:
        if isinstance(layer, keras.layers.ZeroPadding2D) and paddings in layer.name:
            return HalvingPadding(2 * layer.padding[0][1] + 1, dtype=layer.dtype_policy, name=layer.name)
        return type(layer).from_config(layer.get_config())

    image = keras.Input((None, None, 3), name=model.input.name)
    copy = keras.models.clone_model(model, input_tensors=image, clone_function=replaced)
    copy.set_weights(model.get_weights())
    return copy
