"""Pictures of one digit in every file format variant, and the properties of each after preparation."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from model.extras.picture import decode, prepare


def encoded(image, kind="PNG", **options):
    """The content of an image file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def prepared(content):
    return prepare(decode(io.BytesIO(content), "picture"), "picture")


def assert_prepared(image):
    """Check the properties of every result: peak 255, a box of 20 x 20, centre of mass in the middle."""
    assert (image.shape, image.dtype, image.max()) == ((28, 28), np.uint8, 255)
    for axis in (0, 1):
        inked = np.flatnonzero(image.any(axis=axis))
        assert inked[-1] - inked[0] < 20
        centre = np.average(np.arange(28), weights=image.sum(axis=axis))
        # Half a pixel from rounding the position, and a little from rounding grey levels; or there is no room left.
        assert abs(centre - 14) <= 0.6 or inked[0] <= 1 or inked[-1] >= 26


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


SIZE = 120, 80


def digit(mode="RGB", ink="black", paper="white"):
    """A drawing of a 7, without antialiasing."""
    image = Image.new(mode, SIZE, paper)
    ImageDraw.Draw(image).line([(30, 15), (80, 15), (50, 70)], ink, 8)
    return image


def with_levels(ink, paper):
    """Grey of 16 bits, with one pixel that is stuck at full brightness."""
    levels = np.where(np.asarray(digit("L")) == 0, ink, paper).astype(np.uint16)
    levels[3, 3] = 65535
    return Image.fromarray(levels)


def on_invisible_noise():
    """Transparent pixels of random colours."""
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 4), np.uint8)
    ink = np.asarray(digit("L")) == 0
    pixels[..., 3] = np.where(ink, 255, 0)
    pixels[ink] = 255
    return encoded(Image.fromarray(pixels))


def on_transparent_palette():
    image = digit("L").convert("P")
    return encoded(image, transparency=int(np.asarray(image)[0, 0]))


def with_transparent_margin(paper):
    """A page that is one layer of a larger, otherwise empty picture."""
    return encoded(ImageOps.expand(digit("RGBA", "black", paper), (30, 12, 25, 20), (0, 0, 0, 0)))


def by_orientation(orientation, kind):
    """Stored in one of the eight EXIF orientations."""
    methods = Image.Transpose
    undo = {2: methods.FLIP_LEFT_RIGHT, 3: methods.ROTATE_180, 4: methods.FLIP_TOP_BOTTOM, 5: methods.TRANSPOSE}
    undo |= {6: methods.ROTATE_90, 7: methods.TRANSVERSE, 8: methods.ROTATE_270}
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(digit().transpose(undo[orientation]), kind, exif=exif.tobytes())


EXPECTED = prepared(encoded(digit()))

PICTURES = {
    "grey": encoded(digit("L")),
    "light on dark": encoded(digit("L", "white", "black")),
    "little contrast": encoded(digit("L", 100, 120)),
    "black and white": encoded(digit("1")),
    "palette": encoded(digit().convert("P", palette=Image.Palette.ADAPTIVE)),
    "transparent palette": on_transparent_palette(),
    "equally bright colours": encoded(digit("RGB", (255, 0, 0), (0, 130, 0))),
    "grey and alpha": encoded(digit("LA", (0, 255), (255, 255))),
    "black on transparent": encoded(digit("RGBA", (0, 0, 0, 255), (0, 0, 0, 0))),
    "white on transparent": encoded(digit("RGBA", (255, 255, 255, 255), (255, 255, 255, 0))),
    "white on transparent of any colour": on_invisible_noise(),
    "transparent on white": encoded(digit("RGBA", (255, 255, 255, 0), (255, 255, 255, 255))),
    "transparent margin": with_transparent_margin("white"),
    "transparent margin around grey": with_transparent_margin((150, 150, 150)),
    "16 bits": encoded(with_levels(0, 65535)),
    "16 bits, hardly used": encoded(with_levels(50, 900)),
    "16 bits, bright": encoded(with_levels(65535, 40000)),
    "16 bits, dark": encoded(with_levels(0, 20000)),
    "interlaced": encoded(digit(), interlace=1),
    "PNG on its side": by_orientation(6, "PNG"),
}

JPEGS = {
    "JPEG": encoded(digit(), "JPEG"),
    "grey JPEG": encoded(digit("L"), "JPEG"),
    "progressive JPEG": encoded(digit(), "JPEG", progressive=True),
    "CMYK JPEG": encoded(digit().convert("CMYK"), "JPEG"),
    "bad JPEG": encoded(digit(), "JPEG", quality=20),
    **{f"JPEG of orientation {number}": by_orientation(number, "JPEG") for number in range(2, 9)},
}
