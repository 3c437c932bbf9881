"""BMP files whose pixels are numbers of colours in a table, which TensorFlow decodes as if the numbers were grey values."""

import tensorflow as tf

from k4p1.data.byte_fields import SEPARATE, unsigned

_FILE_HEADER, _INFO_HEADER = 14, 40


@tf.function(input_signature=[tf.TensorSpec([], tf.string)], experimental_attributes=SEPARATE)
def decode_bitmap(encoded: tf.Tensor) -> tf.Tensor:
    """RGB pixels (height, width, 3) uint8 of a BMP file, with a colour table or without."""
    data = tf.io.decode_raw(encoded, tf.uint8)
    bits, compression = unsigned(data, 28, 2, True), unsigned(data, 30, 4, True)
    has_table = tf.reduce_any(tf.equal(bits, [1, 4, 8])) & (compression == 0)
    return tf.cond(
        has_table & (unsigned(data, _FILE_HEADER, 4, True) >= _INFO_HEADER),
        lambda: _from_table(data),
        lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
    )


def _from_table(data: tf.Tensor) -> tf.Tensor:
    """The pixels of a BMP of 1, 4 or 8 bits per pixel, not compressed.

    Rows are filled up to 4 bytes and begin at the bottom, unless the height is negative. TensorFlow raises
    `InvalidArgumentError` where pixels are missing or have no colour.
    """
    width, bits = unsigned(data, 18, 4, True), unsigned(data, 28, 2, True)
    signed = tf.bitcast(tf.cast(unsigned(data, 22, 4, True), tf.uint32), tf.int32)
    height = tf.cast(tf.abs(signed), tf.int64)
    first = unsigned(data, 10, 4, True)
    table = data[_FILE_HEADER + unsigned(data, _FILE_HEADER, 4, True) : first]
    colours = tf.reshape(table[: 4 * (tf.size(table) // 4)], [-1, 4])[:, 2::-1]  # stored as blue, green, red, 0
    row = (width * bits + 31) // 32 * 4
    packed = tf.reshape(data[first : first + row * height], [height, row, 1])
    per_byte = 8 // bits
    places = tf.cast(bits * tf.range(per_byte - 1, -1, -1), tf.uint8)  # the leftmost pixel is in the highest bits
    lowest = tf.cast(2**bits - 1, tf.uint8)
    numbers = tf.bitwise.bitwise_and(tf.bitwise.right_shift(packed, places), lowest)
    numbers = tf.reshape(numbers, [height, row * per_byte])[:, :width]
    pixels = tf.gather(colours, tf.cast(numbers, tf.int32))
    return tf.cond(signed > 0, lambda: pixels[::-1], lambda: pixels)
