"""Layer, group and RMS normalisation with private scale and bias."""

import keras

from k4p1.patches import patched_layer
from k4p1.patches.patched_layer import TRAINED, PrivateVariable

NORMALISATIONS = (
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
)
"""The layers that can be patched so; each normalises an image by its own statistics."""


def has_bias(layer: keras.layers.Layer) -> bool:
    """Whether the layer can have a bias: RMS normalisation has but a scale."""
    return not isinstance(layer, keras.layers.RMSNormalization) and not getattr(layer, "rms_scaling", False)


@keras.saving.register_keras_serializable("k4p1")
class PatchedNormalization(patched_layer.PatchedLayer):
    """`y = gamma * normalise(x) + beta` with gamma, beta or both of the task.

    `normalise` is the layer's own: by mean and variance over the channels or a group of them, or by the root mean square.
    It has no statistics that would move, so that nothing is recalibrated. RMS normalisation has no beta.

    Args:
      layer: a built layer of `NORMALISATIONS`; it stays shared. One without scale or centre gains them, at 1 and 0.
      affine: `both`, `scale` or `bias` are the task's; the others stay those of the backbone.
      kind: the patch kind that owns the variables.

    Inputs: of the layer, (batch, ..., channels). Variables: of the shape of the layer's, as a rule (channels,).
    """

    def __init__(self, layer, affine="both", kind="scale_bias", **kwargs):
        kwargs.setdefault("autocast", layer.autocast)
        super().__init__(layer, **kwargs)
        self.affine, self.kind = affine, kind
        self.supports_masking = layer.supports_masking

    def bind(self):
        layer = self.layer
        is_rms = isinstance(layer, keras.layers.RMSNormalization)
        gamma = layer.scale if is_rms else layer.gamma
        beta = None if is_rms else layer.beta
        axes = [layer.axis] if isinstance(layer.axis, int) else layer.axis
        input_shape = layer.get_build_config()["input_shape"]
        shape = tuple(input_shape[axis] for axis in axes)

        def private(name, shared, default):
            start = patched_layer.copy_of(shared) if shared is not None else default
            return self.add_weight(name=name, shape=shape, initializer=start, dtype=layer.variable_dtype, autocast=is_rms)

        self.gamma = private("gamma", gamma, "ones") if self.affine in ("both", "scale") else gamma
        self.beta = private("beta", beta, "zeros") if self.affine in ("both", "bias") and has_bias(layer) else beta
        own = patched_layer.view(layer, True)
        own.__dict__.update(
            {"scale": self.gamma}
            if is_rms
            else {
                "gamma": self.gamma,
                "beta": self.beta,
                "scale": self.gamma is not None,
                "center": self.beta is not None,
            }
        )
        self.__dict__["own"] = own  # computes as the layer does, with the task's variables

    def call(self, inputs):
        return self.own.call(inputs)

    def private_variables(self):
        owned = [("gamma", self.gamma)] if self.affine in ("both", "scale") else []
        owned += [("beta", self.beta)] if self.affine in ("both", "bias") and has_bias(self.layer) else []
        return [PrivateVariable(self.kind, name, variable, TRAINED) for name, variable in owned]

    def folded(self):
        config = self.layer.get_config()
        if not isinstance(self.layer, keras.layers.RMSNormalization):
            config.update(scale=self.gamma is not None, center=self.beta is not None)
        plain = type(self.layer).from_config(config)
        plain.build_from_config(self.layer.get_build_config())
        for variable in plain.variables:
            variable.assign(self.beta if variable.name == "beta" else self.gamma)
        return plain

    def get_config(self):
        return {**super().get_config(), "affine": self.affine, "kind": self.kind}
