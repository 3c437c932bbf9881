"""Decoding: every format and every Exif orientation as Pillow has them."""

import io
import struct

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from k4p1.data import preprocessing

HEIGHT, WIDTH = 20, 33
TAG, SHORT = 0x0112, 3


def picture() -> Image.Image:
    """Colours that change in every direction, so that no two orientations look alike."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return Image.fromarray(np.stack([7 * x, 12 * y, 4 * (x + y)], axis=-1).astype(np.uint8))


def encoded(image, format_name, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


@tf.function(input_signature=[tf.TensorSpec([], tf.string)])
def decode(content):
    """In a graph, as input pipelines and the exported model decode."""
    return preprocessing.decode(content)


def decoded(content: bytes) -> np.ndarray:
    return decode(tf.constant(content)).numpy()


def assert_as_pillow(content: bytes, tolerance: int = 0):
    """Compares with Pillow, upright and in RGB; JPEG decoders round differently."""
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    found = decoded(content)
    assert found.dtype == np.uint8 and found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= tolerance


def paletted(colours):
    return picture().convert("P", palette=Image.ADAPTIVE, colors=colours)


FORMATS = {
    "jpeg": (lambda: encoded(picture(), "JPEG"), 4),
    "jpeg progressive": (lambda: encoded(picture(), "JPEG", progressive=True), 4),
    "jpeg grey": (lambda: encoded(picture().convert("L"), "JPEG"), 4),
    "jpeg CMYK": (lambda: encoded(picture().convert("CMYK"), "JPEG", quality=95), 6),
    "png": (lambda: encoded(picture(), "PNG"), 0),
    "png alpha": (lambda: encoded(picture().convert("RGBA"), "PNG"), 0),
    "png grey and alpha": (lambda: encoded(picture().convert("LA"), "PNG"), 0),
    "png palette": (lambda: encoded(paletted(200), "PNG"), 0),
    "png 1 bit": (lambda: encoded(picture().convert("1"), "PNG"), 0),
    "bmp": (lambda: encoded(picture(), "BMP"), 0),
    "bmp alpha": (lambda: encoded(picture().convert("RGBA"), "BMP"), 0),
    "bmp grey": (lambda: encoded(picture().convert("L"), "BMP"), 0),
    "bmp 256 colours": (lambda: encoded(paletted(256), "BMP"), 0),
    "bmp 7 colours": (lambda: encoded(paletted(7), "BMP"), 0),
    "bmp 1 bit": (lambda: encoded(picture().convert("1"), "BMP"), 0),
    "gif": (lambda: encoded(picture(), "GIF"), 0),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name):
    make, tolerance = FORMATS[name]
    assert_as_pillow(make(), tolerance)


def test_the_first_frame_of_an_animation_counts():
    frames = [picture().rotate(90 * turn).quantize(64) for turn in range(3)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decoded(content), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


@pytest.mark.parametrize("channels", [1, 3])
def test_of_16_bits_the_upper_eight_count(channels):
    values = np.arange(12 * 16 * channels).reshape(12, 16, channels).astype(np.uint16) * 113
    expected = np.broadcast_to((values >> 8).astype(np.uint8), (12, 16, 3))
    np.testing.assert_array_equal(decoded(tf.io.encode_png(values).numpy()), expected)


def bitmap_of_16_colours(height, rows):
    """A BMP of 4 bits per pixel, 5 wide: a colour table of 16 and `rows` of 4 bytes each."""
    table = b"".join(bytes([16 * i, 255 - i, i, 0]) for i in range(16))
    info = struct.pack("<IiiHHIIiiII", 40, 5, height, 1, 4, 0, len(rows), 0, 0, 16, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(table) + len(rows), 0, 0, 54 + len(table)) + info + table + rows


@pytest.mark.parametrize("height", [2, -2], ids=["from the bottom", "from the top"])
def test_a_bitmap_of_16_colours(height):
    content = bitmap_of_16_colours(height, bytes.fromhex("01234000fedcb000"))
    assert_as_pillow(content)
    assert decoded(content)[0, 0].tolist() == ([0, 255, 0] if height < 0 else [15, 240, 240])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no image",
        b"BM",
        bitmap_of_16_colours(2, b"\1\2\3\4"),  # a row is missing
        bitmap_of_16_colours(2, b"\x77" * 8).replace(struct.pack("<I", 118), struct.pack("<I", 58), 1),  # one colour
        encoded(picture(), "JPEG")[:200],
        encoded(picture(), "TIFF"),
    ],
    ids=["empty", "text", "two letters", "a row short", "too few colours", "cut", "tiff"],
)
def test_what_is_no_image_is_refused(content):
    with pytest.raises(tf.errors.InvalidArgumentError):
        decoded(content)


def exif_block(number, byte_order="<", *, tag=TAG, field_type=SHORT, before=3):
    """A TIFF header and a directory in which the orientation follows `before` other entries."""
    entries = b"".join(struct.pack(f"{byte_order}HHII", 0x0100 + i, 4, 1, 1234) for i in range(before))
    entries += struct.pack(f"{byte_order}HHIHH", tag, field_type, 1, number, 0)
    mark = b"II" if byte_order == "<" else b"MM"
    head = mark + struct.pack(f"{byte_order}HI", 42, 8) + struct.pack(f"{byte_order}H", before + 1)
    return head + entries + bytes(4)


def with_exif(block, *, app0=True, comment=b"", fill=b"", plain=None):
    """A JPEG with an Exif segment, after a JFIF one and a comment where asked for."""
    content = plain or encoded(picture(), "JPEG")
    assert content[2:4] == b"\xff\xe0"
    after = 4 + struct.unpack(">H", content[4:6])[0]
    segment = b"\xff\xe1" + struct.pack(">H", 8 + len(block)) + b"Exif\0\0" + block
    remark = b"\xff\xfe" + struct.pack(">H", 2 + len(comment)) + comment if comment else b""
    return content[:2] + (content[2:after] if app0 else b"") + remark + fill + segment + content[after:]


class TestOrientation:
    @pytest.mark.parametrize("byte_order", ["<", ">"], ids=["little endian", "big endian"])
    @pytest.mark.parametrize("number", range(1, 9))
    def test_jpeg(self, number, byte_order):
        content = with_exif(exif_block(number, byte_order))
        assert_as_pillow(content, tolerance=4)
        assert decoded(content).shape == ((WIDTH, HEIGHT, 3) if number >= 5 else (HEIGHT, WIDTH, 3))

    @pytest.mark.parametrize("number", range(1, 9))
    @pytest.mark.parametrize("format_name", ["JPEG", "PNG"])
    def test_files_that_pillow_writes(self, number, format_name):
        exif = Image.Exif()
        exif[TAG] = number
        exif[0x010F] = "a maker"
        assert_as_pillow(encoded(picture(), format_name, exif=exif), tolerance=4)

    @pytest.mark.parametrize(
        "how", [{"app0": False}, {"comment": b"text"}, {"fill": b"\xff\xff"}, {"comment": b"x" * 60_000}]
    )
    def test_wherever_the_segment_lies(self, how):
        assert_as_pillow(with_exif(exif_block(6), **how), tolerance=4)

    def test_a_thumbnail_with_its_own_orientation_does_not_count(self):
        block = exif_block(6)
        other = exif_block(3)[8:]
        linked = block[:-4] + struct.pack("<I", len(block)) + other
        assert_as_pillow(with_exif(linked), tolerance=4)

    @pytest.mark.parametrize(
        "block",
        [
            b"",
            b"II",
            b"XX" + exif_block(6)[2:],
            exif_block(6)[:12],
            exif_block(6)[:-8],
            exif_block(0),
            exif_block(9),
            exif_block(65535),
            exif_block(6, field_type=2),
            exif_block(6, tag=0x0113),
            exif_block(6).replace(struct.pack("<HI", 42, 8), struct.pack("<HI", 42, 2**32 - 1)),
            exif_block(6).replace(struct.pack("<HI", 42, 8), struct.pack("<HI", 43, 8)),
            exif_block(6, ">").replace(struct.pack(">HI", 42, 8), struct.pack(">HI", 42, 40_000)),
        ],
    )
    def test_a_broken_block_turns_nothing(self, block):
        np.testing.assert_array_equal(decoded(with_exif(block)), decoded(encoded(picture(), "JPEG")))

    def test_a_segment_longer_than_the_file_turns_nothing_it_does_not_have(self):
        content = bytearray(with_exif(exif_block(6)))
        start = content.index(b"\xff\xe1")
        content[start + 2 : start + 4] = b"\xff\xff"
        with pytest.raises(tf.errors.InvalidArgumentError):  # the JPEG itself is cut
            decoded(bytes(content[: start + 40]))

    def test_any_bytes_have_an_orientation(self):
        """Damaged blocks are read within their bounds: 1 to 8, and no error, whatever the bytes."""
        from k4p1.data.orientation import orientation

        read = tf.function(orientation, input_signature=[tf.TensorSpec([], tf.string)])
        random = np.random.default_rng(0)
        for start in (with_exif(exif_block(6)), with_exif(exif_block(8, ">")), encoded(picture(), "PNG")):
            for _ in range(150):
                content = bytearray(start[: random.integers(0, 400)])
                for position in random.integers(0, len(content), 4) if content else ():
                    content[position] = random.integers(0, 256)
                assert 1 <= int(read(tf.constant(bytes(content)))) <= 8
