"""Which way up an image is meant to be shown, read from its encoded bytes with TensorFlow operations.

Cameras store the pixels as the sensor lies and say in tag 0x0112 of the Exif block (Exif 2.3, section 4.6.4.A) how to turn
them. The block is the APP1 segment before the tables of a JPEG, or the chunk `eXIf` of a PNG. Training and the exported
model both read it here, from the bytes, so that they see the same pixels.
"""

import tensorflow as tf

from k4p1.data.byte_fields import SEPARATE, unsigned

_TAG, _SHORT = 0x0112, 3
_MOST_SEGMENTS = 4096


def orientation(encoded: tf.Tensor) -> tf.Tensor:
    """The orientation, 1 to 8, int32 scalar, of an encoded image; 1 where it has none or a broken one."""
    return tf.cond(_may_have_exif(encoded), lambda: _read(encoded), lambda: tf.constant(1))


def upright(image: tf.Tensor, encoded: tf.Tensor) -> tf.Tensor:
    """The pixels (height, width, 3) uint8 of an encoded image as it is meant to be shown."""
    shown = tf.cond(_may_have_exif(encoded), lambda: _turned(image, encoded), lambda: image)
    return tf.ensure_shape(shown, [None, None, 3])


def _may_have_exif(encoded: tf.Tensor) -> tf.Tensor:
    """Whether the name of such a block is anywhere in the bytes, which is quick to see and seldom so without one."""
    return tf.strings.regex_full_match(encoded, r"\C*(Exif\x00\x00|eXIf)\C*")


def _read(encoded: tf.Tensor) -> tf.Tensor:
    data = tf.io.decode_raw(encoded, tf.uint8)
    is_jpeg = tf.equal(unsigned(data, 0, 2), 0xFFD8)
    is_png = tf.equal(unsigned(data, 0, 4), 0x89504E47)
    start, end = tf.cond(is_jpeg, lambda: _exif_of_jpeg(data), lambda: _exif_of_png(data, is_png))
    return tf.cond(end > start, lambda: _tag_of_tiff(data[start:end]), lambda: tf.constant(1))


@tf.function(
    input_signature=[tf.TensorSpec([None, None, 3], tf.uint8), tf.TensorSpec([], tf.string)],
    experimental_attributes=SEPARATE,
)
def _turned(image: tf.Tensor, encoded: tf.Tensor) -> tf.Tensor:
    """The image upright; orientations 5 to 8 swap height and width."""
    number = _read(encoded)
    turned = tf.transpose(image, tf.where(number >= 5, [1, 0, 2], [0, 1, 2]))
    upside_down = _is_one_of(number, (3, 4, 7, 8))
    mirrored = _is_one_of(number, (2, 3, 6, 7))
    return tf.reverse(turned, tf.boolean_mask(tf.constant([0, 1]), tf.stack([upside_down, mirrored])))


def _exif_of_jpeg(data: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Where the Exif block of a JPEG begins and ends; (0, 0) for none. It is in one of the segments before the tables."""

    def is_searching(position, start, end):
        marker = unsigned(data, position, 2)
        is_segment = ((marker >= 0xFFE0) & (marker <= 0xFFEF)) | _is_one_of(marker, (0xFFFE, 0xFFFF))
        return (end == 0) & is_segment

    def look(position, start, end):
        marker, length = unsigned(data, position, 2), unsigned(data, position + 2, 2)
        one = tf.ones_like(position)
        after = position + tf.where(marker == 0xFFFF, one, 2 + tf.maximum(length, 2))  # 0xFF may fill up between segments
        named = tf.equal(unsigned(data, position + 4, 6), 0x457869660000)  # "Exif", 0, 0
        found = (marker == 0xFFE1) & named
        return after, tf.where(found, position + 10, start), tf.where(found, after, end)

    return _walk(is_searching, look, 2, data)


def _exif_of_png(data: tf.Tensor, is_png: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Where the chunk `eXIf` of a PNG begins and ends; (0, 0) for none, or where `is_png` is false."""

    def is_searching(position, start, end):
        is_inside = position + 12 <= tf.size(data, tf.int64)
        return is_png & (end == 0) & is_inside

    def look(position, start, end):
        length, kind = unsigned(data, position, 4), unsigned(data, position + 4, 4)
        found = tf.equal(kind, 0x65584966)
        begin = position + 8
        return begin + length + 4, tf.where(found, begin, start), tf.where(found, begin + length, end)

    return _walk(is_searching, look, 8, data)


def _walk(is_searching, look, position: int, data: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """(start, end) that stepping from segment to segment finds."""
    state = (tf.constant(position, tf.int64), tf.constant(0, tf.int64), tf.constant(0, tf.int64))
    _, start, end = tf.while_loop(is_searching, look, state, maximum_iterations=_MOST_SEGMENTS)
    size = tf.size(data, tf.int64)
    return tf.minimum(start, size), tf.minimum(end, size)


def _tag_of_tiff(block: tf.Tensor) -> tf.Tensor:
    """The orientation in an Exif block: a TIFF header, and the entries of its first directory."""
    order = unsigned(block, 0, 2)
    little = tf.equal(order, 0x4949)
    is_tiff = (little | tf.equal(order, 0x4D4D)) & tf.equal(unsigned(block, 2, 2, little), 42)
    directory = tf.minimum(unsigned(block, 4, 4, little), tf.size(block, tf.int64))
    entries = block[directory + 2 :]
    count = tf.minimum(unsigned(block, directory, 2, little), tf.size(entries, tf.int64) // 12)
    rows = tf.cast(tf.reshape(entries[: 12 * count], [-1, 12]), tf.int32)
    scale = tf.where(little, [1, 256], [256, 1])
    tags, types, values = (tf.reduce_sum(rows[:, at : at + 2] * scale, axis=1) for at in (0, 2, 8))
    fits = (tags == _TAG) & (types == _SHORT) & (values >= 1) & (values <= 8)
    return tf.where(is_tiff, tf.concat([values[fits], [1]], axis=0)[0], 1)


def _is_one_of(number: tf.Tensor, allowed: tuple[int, ...]) -> tf.Tensor:
    return tf.reduce_any(tf.equal(number, tf.constant(allowed, number.dtype)))
