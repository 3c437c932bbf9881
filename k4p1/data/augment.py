"""Augmentations of training images, TensorFlow ops only, each a function of (image, seed)."""

import dataclasses
import functools
import inspect
from collections.abc import Callable

import tensorflow as tf

from k4p1 import errors, spec_grammar


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """A change of an image, the same for the same seed.

    Attributes:
      function: of (image, seed).
      moves: whether it moves pixels, and so the targets that are maps.
    """

    function: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
    moves: bool = True

    def __call__(self, image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return self.function(image, seed)


def flip(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Mirrors (height, width, 3) left to right with probability 1/2."""
    return tf.image.stateless_random_flip_left_right(image, seed)


def shift(image: tf.Tensor, seed: tf.Tensor, pixels: int = 4) -> tf.Tensor:
    """Moves the image by up to `pixels` in both directions; the border mirrors."""
    padded = tf.pad(image, [[pixels, pixels], [pixels, pixels], [0, 0]], "REFLECT")
    offset = tf.random.stateless_uniform([2], seed, 0, 2 * pixels + 1, tf.int32)
    return tf.slice(padded, [offset[0], offset[1], 0], tf.shape(image))


def crop(image: tf.Tensor, seed: tf.Tensor, area: float = 0.08) -> tf.Tensor:
    """Cuts a random box of at least `area` of the image, sides 3:4 to 4:3; it is resized to the task's size afterwards."""
    begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.shape(image),
        tf.zeros([1, 0, 4]),
        seed,
        area_range=(area, 1.0),
        aspect_ratio_range=(3 / 4, 4 / 3),
        use_image_if_no_bounding_boxes=True,
    )
    return tf.slice(image, begin, size)


def brightness(image: tf.Tensor, seed: tf.Tensor, delta: float = 0.2) -> tf.Tensor:
    """Adds up to `delta` of the full range to all pixels."""
    changed = tf.image.stateless_random_brightness(tf.cast(image, tf.float32) / 255.0, delta, seed)
    return tf.saturate_cast(tf.round(255.0 * changed), tf.uint8)


_KNOWN = {
    "flip": (flip, {}),
    "shift": (shift, {"pixels": int}),
    "crop": (crop, {"area": float}),
    "brightness": (brightness, {"delta": float}),
}


def parse(text: str | Callable) -> tuple[list[Augmentation], list[Augmentation]]:
    """Reads a spec such as `"crop(area=0.3)+flip"`; empty text for none.

    Args:
      text: the spec; or a function of the image (height, width, 3) uint8 at the task's size, or of (image, seed), a pair of
        int64 that is another one for every image and epoch; or a layer of Keras. Where it draws numbers of its own, a
        resumed run draws others than one that was not interrupted. It moves no targets that are maps.

    Returns:
      (augmentations on the image at its original size, augmentations at the task's size).

    Raises:
      ConfigError: unknown augmentation or option, or a value that is no number.
    """
    before, after = [], []
    if callable(text):
        return before, [Augmentation(_of_python(text), moves=False)]
    if not isinstance(text, str):
        raise errors.ConfigError(f"augment={text!r}; expected text such as 'shift(pixels=4)+flip', or a function")
    try:
        parsed = list(spec_grammar.parse(text)) if text.strip() else []
    except ValueError as e:
        raise errors.ConfigError(f"augmentation: {e}") from e
    for name, options in parsed:
        if name not in _KNOWN:
            raise errors.ConfigError(errors.unknown("augmentation", name, _KNOWN))
        function, types = _KNOWN[name]
        values = {option: _number(name, option, value, types) for option, value in options.items()}
        augmentation = Augmentation(functools.partial(function, **values), moves=function is not brightness)
        (before if function is crop else after).append(augmentation)
    return before, after


def check(given: Callable, augmentation: Augmentation, size: tuple[int, int]) -> None:
    """Calls a function or layer of a user once, so that mistakes are told before training.

    Raises:
      ConfigError: it fails, or gives an image of another shape.
    """
    name = getattr(given, "name", None) or getattr(given, "__name__", type(given).__name__)
    try:
        image = augmentation(tf.zeros([*size, 3], tf.uint8), tf.zeros([2], tf.int64))
    except Exception as e:  # whatever a user's function raises
        raise errors.ConfigError(f"augment {name} fails on an image {(*size, 3)} uint8: {errors.reason(e)}") from e
    if tuple(image.shape) != (*size, 3):
        raise errors.ConfigError(
            f"augment {name} gives an image {tuple(image.shape)}; expected that of the task, {(*size, 3)}"
        )


def _of_python(given: Callable) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """A function of (image, seed) that gives uint8 of the image's shape."""
    layer = hasattr(given, "get_config") and hasattr(given, "built")
    takes_seed = not layer and len([p for p in inspect.signature(given).parameters.values() if p.default is p.empty]) > 1

    def augmented(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        if layer:
            changed = given(tf.cast(image, tf.float32)[None], training=True)[0]
        else:
            changed = given(image, seed) if takes_seed else given(image)
        changed = tf.convert_to_tensor(changed)
        if changed.dtype != tf.uint8:
            changed = tf.saturate_cast(tf.round(tf.cast(changed, tf.float32)), tf.uint8)
        return changed

    return augmented


def _number(name: str, option: str, value: str, types: dict[str, type]) -> float:
    if option not in types:
        raise errors.ConfigError(errors.unknown(f"option of augmentation '{name}'", option, types))
    try:
        number = spec_grammar.read(value, types[option])
    except ValueError as e:
        raise errors.ConfigError(f"{name}({option}={value}): {e}") from None
    if number <= 0:
        raise errors.ConfigError(f"{name}({option}={value}): expected a positive number")
    return number
