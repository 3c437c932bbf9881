"""From encoded bytes to pixels of the task's size: the same ops in training, evaluation and the exported model."""

import tensorflow as tf

from k4p1.data import orientation, palette_bitmap


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """RGB pixels (height, width, 3) uint8 of encoded JPEG, PNG, BMP or GIF bytes, turned as their Exif orientation says.

    Grey images are repeated, colour tables looked up, alpha channels dropped, 16 bits cut to 8; of an animation the first
    frame.
    """
    image = tf.cond(
        tf.strings.substr(encoded, 0, 2) == b"BM",
        lambda: palette_bitmap.decode_bitmap(encoded),
        lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
    )
    image.set_shape([None, None, 3])
    return orientation.upright(image, encoded)


def resize(images: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """Bilinear resizing with antialiasing of (..., height, width, 3), rounded back to uint8; unchanged at the right size."""
    fits = tf.reduce_all(tf.equal(tf.shape(images)[-3:-1], size))
    resized = tf.cond(
        fits,
        lambda: tf.cast(images, tf.uint8),
        lambda: tf.saturate_cast(tf.round(tf.image.resize(images, size, antialias=True)), tf.uint8),
    )
    return tf.ensure_shape(resized, [*images.shape[:-3], *size, 3])


def resize_map(image: tf.Tensor, size) -> tf.Tensor:
    """A map of labels (height, width, channels) at another size, to the nearest value; type and channels stay."""
    resized = tf.image.resize(image, size, method="nearest")
    return tf.ensure_shape(resized, [*(size if isinstance(size, tuple) else (None, None)), image.shape[-1]])
