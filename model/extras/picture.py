"""A picture of one handwritten digit, prepared as the images of MNIST were.

Pictures come from outside, so nothing in them is taken on trust: the size of the file and the number of pixels that it
declares are bounded before anything is decoded, and whatever cannot be read is said in one line.
"""

import os
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import ndimage

from model.data import DataError

MAX_BYTES = 100_000_000
MAX_PIXELS = 50_000_000  # no more than 500 MB while they are decoded and converted
WORKING_SIZE = 2000  # longer sides are reduced to this before anything is measured

CONTRAST = 16  # of 255: a picture in which nothing stands out more is blank
FAINT = 0.25  # of the strongest ink: shadows, the texture of paper and what JPEG adds stay below

SIDE, BOX, CENTRE = 28, 20, 14  # pixels of an image, of the box that holds the digit, and where its mass is centred


class PictureError(DataError):
    """The picture cannot be used; the message says in one line what is wrong and what to do about it."""


def read_picture(file: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Read a picture of one digit and prepare it as the images of MNIST were.

    Parameters
    ----------
    file : path
        PNG or JPEG of at most 100 MB and 50 million pixels: 1 to 16 bits, grey, colour or palette, transparent or not,
        of any ink on any plain background. An orientation in its EXIF data is obeyed, if it can be read.

    Returns
    -------
    uint8 array of shape (784,)
        See `prepare`.

    Raises
    ------
    PictureError
        If the file cannot be read, is no such picture, or is blank.
    """
    path = Path(file)
    try:
        if path.is_dir():
            raise PictureError(f"{file}: is a folder. Name a PNG or JPEG file")
        if path.exists() and not path.is_file():
            raise PictureError(f"{file}: is a device or a pipe. Name a PNG or JPEG file")
        with path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size > MAX_BYTES:
                raise PictureError(f"{file}: has more than {MAX_BYTES:,} bytes. Make the picture smaller")
            return prepare(decode(stream, str(file)), str(file)).reshape(-1)
    except (OSError, ValueError) as error:  # the latter from a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise PictureError(f"{file}: cannot be opened ({reason}). Name a PNG or JPEG file") from error


def decode(stream: BinaryIO, source: str) -> NDArray[np.uint8]:
    """Decode a PNG or JPEG picture, and turn it upright.

    Parameters
    ----------
    stream : file, opened for reading bytes
    source : str
        What to call the picture in an error.

    Returns
    -------
    uint8 array of shape (height, width, 4)
        Red, green and blue, multiplied by alpha, and alpha. The longer side of large pictures is reduced to at most
        2,000 pixels.

    Raises
    ------
    PictureError
        If it is no PNG or JPEG, is damaged or animated, or declares more than 50 million pixels.
    """
    too_large = f"{source}: declares more than {MAX_PIXELS:,} pixels. Make the picture smaller"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of sizes that are refused below
            image: Image.Image = Image.open(stream, formats=("PNG", "JPEG"))
            if image.width * image.height > MAX_PIXELS:
                raise PictureError(too_large)
            # A JPEG may hold a preview as its second frame.
            if image.format == "PNG" and getattr(image, "is_animated", False):
                raise PictureError(f"{source}: is animated. Save one of its frames")
            image.load()
            turn_upright(image)
            if image.mode.startswith("I"):  # grey of 16 bits, which Pillow's conversion would clip
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert("RGBA")
            image = image.convert("RGBa")
            return np.asarray(image.reduce(-(-max(image.size) // WORKING_SIZE)))
    except (PictureError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(too_large) from error
    except UnidentifiedImageError as error:
        raise PictureError(f"{source}: is no PNG or JPEG picture. Save or export it as one") from error
    except Exception as error:  # Pillow lets through whatever its parsers stumble over
        raise PictureError(f"{source}: is damaged or truncated. Save or export it again") from error


def turn_upright(image: Image.Image) -> None:
    """Turn a picture in place as its EXIF data say; if they are damaged, they say nothing."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # from reading them, or from writing them again once it is turned
        return


def prepare(pixels: NDArray[np.uint8], source: str) -> NDArray[np.uint8]:
    """Turn a picture of a digit into an image like those of MNIST.

    MNIST's digits were scaled to fit 20 x 20 pixels, keeping their aspect ratio, with grey levels from antialiasing,
    and placed with their centre of mass in the middle of 28 x 28 (LeCun, Bottou, Bengio and Haffner 1998,
    Gradient-based learning applied to document recognition). Ink, which was black there, is here whatever differs from
    the background, and the background is the median colour along the picture's edge: so dark on light, light on dark,
    colours and transparency are all one.

    Parameters
    ----------
    pixels : uint8 array of shape (height, width, channels)
        Neither side 0.
    source : str
        What to call the picture in an error.

    Returns
    -------
    uint8 array of shape (28, 28)
        0 is background, 255 the strongest ink.

    Raises
    ------
    PictureError
        If nothing differs from the background by more than 16 of 255 levels.
    """
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(edge, axis=0).astype(np.int16)
    ink = np.abs(pixels - background).max(axis=2)
    if ink.max() <= CONTRAST:
        raise PictureError(f"{source}: is blank, with nothing that stands out. Draw the digit with more contrast")
    ink[ink <= FAINT * ink.max()] = 0
    rows, columns = (np.flatnonzero(ink.any(axis=axis)) for axis in (1, 0))
    crop = Image.fromarray(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32))
    scale = BOX / max(crop.size)
    width, height = (max(1, round(scale * length)) for length in crop.size)
    digit = np.asarray(crop.resize((width, height), Image.Resampling.BILINEAR))  # a mean of what each pixel covers
    starts = (round(CENTRE - centre) for centre in ndimage.center_of_mass(digit))
    top, left = (min(max(start, 0), SIDE - length) for start, length in zip(starts, digit.shape))
    image = np.zeros((SIDE, SIDE), np.uint8)
    image[top : top + height, left : left + width] = np.rint(digit * (255 / digit.max()))
    return image
