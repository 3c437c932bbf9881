"""How a backbone expects its pixels, as a layer, so that every task model takes images of 0 to 255."""

import functools

import keras
from keras import ops

from k4p1 import errors

SCALINGS = {
    "none": "x, unchanged: the network scales by itself",
    "unit": "x / 255",
    "symmetric": "x / 127.5 - 1",
    "imagenet": "(x / 255 - mean) / std, RGB, mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)",
    "caffe": "x in BGR order minus (103.939, 116.779, 123.68)",
}
"""Name and equation of each scaling; x are RGB pixels of 0 to 255."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CAFFE_MEAN = (103.939, 116.779, 123.68)


@keras.saving.register_keras_serializable("k4p1")
class InputScaling(keras.layers.Layer):
    """Scales RGB images (batch, height, width, 3) of 0 to 255, integer or float, as `SCALINGS[scaling]` says.

    Raises:
      ConfigError: unknown scaling.
    """

    def __init__(self, scaling: str, **kwargs):
        if scaling not in SCALINGS:
            raise errors.ConfigError(errors.unknown("input scaling", scaling, SCALINGS))
        super().__init__(**{"autocast": False, **kwargs})
        self.scaling = scaling

    def call(self, images):
        x = ops.cast(images, "float32")
        if self.scaling == "unit":
            x = x / 255.0
        elif self.scaling == "symmetric":
            x = x / 127.5 - 1.0
        elif self.scaling == "imagenet":
            x = (x / 255.0 - ops.array(IMAGENET_MEAN, "float32")) / ops.array(IMAGENET_STD, "float32")
        elif self.scaling == "caffe":
            x = ops.flip(x, axis=-1) - ops.array(_CAFFE_MEAN, "float32")
        return ops.cast(x, self.compute_dtype)

    def plain(self, images):
        """The same written with Keras' own layers, so that a folded model can be read without k4p1."""
        rescaling = functools.partial(keras.layers.Rescaling, dtype=self.dtype_policy, name=self.name)
        if self.scaling == "unit":
            return rescaling(1.0 / 255.0)(images)
        if self.scaling == "symmetric":
            return rescaling(1.0 / 127.5, -1.0)(images)
        if self.scaling == "imagenet":
            scale = [1.0 / (255.0 * std) for std in IMAGENET_STD]
            return rescaling(scale, [-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)])(images)
        if self.scaling == "caffe":
            return rescaling(1.0, [-mean for mean in _CAFFE_MEAN])(ops.flip(ops.cast(images, "float32"), axis=-1))
        return rescaling(1.0)(images)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "scaling": self.scaling}
