"""Read a picture of one handwritten digit, and prepare it the way MNIST's images were.

Pictures are untrusted input. The size of the file and the number of pixels that it declares are checked before anything
is decoded, and every error is one line.
"""

import io
import os
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import ndimage
from skimage.filters import rank, threshold_otsu
from skimage.measure import euler_number
from skimage.morphology import area_opening

from model.data import DataError

MAX_BYTES = 100_000_000
MAX_PIXELS = 50_000_000  # decoding and converting them takes at most 500 MB
WORKING_SIZE = 320  # larger pictures are reduced to this: enough for a digit, and averaging removes noise

CONTRAST = 16 / 255  # fraction of the paper's brightness: with less contrast, a picture is blank
NOISE = 5  # standard deviations of the paper's noise: likewise
DIMMEST = 48  # grey level of 255: darker paper counts as this bright, as its noise would look like ink
SPECK = 0.0015  # fraction of the picture's area: smaller components are specks of dust
SMALL = 0.05  # fraction of the largest component's area: smaller ones belong to no digit
EDGE = 0.015  # fraction of a side: a component this close to the picture's edge touches it
DARK = 0.5  # fraction of the paper's brightness: no shadow is this deep
RECTANGLE = 0.85  # fraction of its minimum bounding rectangle: a component that fills more is a sheet
FAINT = 0.25  # fraction of full ink: the edges of strokes end here
ONE_COLOUR = 8  # grey levels of 255: colours that differ by less are the same up to rounding
NARROWEST = 3  # pixels, or a fiftieth of the longer side: a narrower picture has no room for a digit
FULL = 95  # percentile of a digit's pixels that counts as full ink

PNG, METADATA, END_OF_JPEG = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt", b"iCCP"), b"\xff\xd9"
ADVICE = "Draw the digit with more contrast, and with a margin around it"

SIDE, BOX, CENTRE = 28, 20, 14  # pixels: side of an image, side of the digit's box, position of its centre of mass


class PictureError(DataError):
    """The picture cannot be used; the message says in one line what is wrong and what to do."""


def read_picture(file: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Read a picture of one digit and prepare it the way MNIST's images were.

    Parameters
    ----------
    file : path
        PNG or JPEG of at most 100 MB and 50 million pixels: 1 to 16 bits, grey, colour or palette, transparent or not,
        with any ink on any plain background. The orientation in the EXIF data is applied, if it can be read.

    Returns
    -------
    uint8 array of shape (784,)
        See `prepare`.

    Raises
    ------
    PictureError
        If the file cannot be read or is not such a picture, or if it is blank, too narrow, or shows several digits.
    """
    path = Path(file)
    try:
        if path.is_dir():
            raise PictureError(f"{file} is a folder. Pass a PNG or JPEG file")
        if path.exists() and not path.is_file():
            raise PictureError(f"{file} is a device or a pipe. Pass a PNG or JPEG file")
        with path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size > MAX_BYTES:
                raise PictureError(f"{file} has more than {MAX_BYTES:,} bytes. Make the picture smaller")
            return prepare(decode(stream, str(file)), str(file)).reshape(-1)
    except (OSError, ValueError) as error:  # the latter if no file can have this name
        reason = getattr(error, "strerror", None) or error
        raise PictureError(f"{file} cannot be opened ({reason}). Pass a PNG or JPEG file") from error


def decode(stream: BinaryIO, source: str) -> NDArray[np.uint8]:
    """Decode a PNG or JPEG picture, and turn it upright.

    Parameters
    ----------
    stream : file, opened for reading bytes
    source : str
        What to call the picture in an error.

    Returns
    -------
    uint8 array of shape (height, width, 3)
        Red, green and blue, see `opaque`. Large pictures are reduced until no side is longer than `WORKING_SIZE`.

    Raises
    ------
    PictureError
        If it is not a PNG or JPEG, is damaged or animated, or declares more than 50 million pixels.
    """
    too_large = f"{source} declares more than {MAX_PIXELS:,} pixels. Make the picture smaller"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata, and sizes that are refused below
            content = without_metadata(stream.read(MAX_BYTES + 1))
            image: Image.Image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
            if image.width * image.height > MAX_PIXELS:
                raise PictureError(too_large)
            # A JPEG may have a preview as its second frame.
            if image.format == "PNG" and getattr(image, "is_animated", False):
                raise PictureError(f"{source} is animated. Save one of its frames")
            try:
                image.load()
            except OSError:
                if image.format != "JPEG":
                    raise
                image = without_end(content)
            turn_upright(image)
            if image.mode.startswith("I"):  # grey of 16 bits, which Pillow's conversion would clip
                image = Image.fromarray(full_range(np.asarray(image)))
            # In premultiplied alpha, invisible pixels have no colour that could bleed into others when averaged.
            image = image.convert("RGBA").convert("RGBa")
            return opaque(np.asarray(image.reduce(-(-max(image.size) // WORKING_SIZE))))
    except (PictureError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(too_large) from error
    except UnidentifiedImageError as error:
        raise PictureError(f"{source} is not a PNG or JPEG picture. Save or export it as one") from error
    except Exception as error:  # Pillow's parsers raise anything on damaged data
        raise PictureError(f"{source} is damaged or truncated. Save or export it again") from error


def without_end(content: bytes) -> Image.Image:
    """Decode a JPEG that lacks only its end marker. If pixels are missing, too, the last one comes out grey."""
    image = Image.open(io.BytesIO(content + END_OF_JPEG), formats=("JPEG",))
    if image.convert("L").getpixel((image.width - 1, image.height - 1)) == 128:
        raise OSError("truncated")
    return image


def without_metadata(content: bytes) -> bytes:
    """Drop text chunks and the colour profile from a PNG file: Pillow refuses the whole file if they are large."""
    if not content.startswith(PNG):
        return content
    kept, at = [PNG], len(PNG)
    while at < len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        if content[at + 4 : at + 8] not in METADATA:
            kept.append(content[at:end])
        at = end
    return b"".join(kept)


def full_range(levels: NDArray[Any]) -> NDArray[np.uint8]:
    """Stretch grey levels to 0 to 255 between their 0.1 and 99.9 percentiles, which ignores a few stray pixels."""
    low, high = np.percentile(levels, (0.1, 99.9))
    return np.rint(255 / max(high - low, 1) * (levels.clip(low, high) - low)).astype(np.uint8)


def opaque(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Colours without alpha, (height, width, 3), from premultiplied ones.

    If everything opaque has the same colour, it is ink on white paper. If it is a sheet of paper, the picture is its
    bounding box, and missing corners get its median colour. Anything else is composited on white.
    """
    alpha = pixels[..., 3:]
    visible = alpha[..., 0] > 127
    colours = 255.0 * pixels[visible, :3] / alpha[visible]
    behind = np.full(3, 255.0)
    if visible.any() and not visible.all():
        if np.ptp(colours, axis=0).max() <= ONE_COLOUR:
            return np.repeat(255 - alpha, 3, axis=2)
        if is_sheet(visible):
            (box,) = ndimage.find_objects(visible.astype(int))
            pixels, alpha, behind = pixels[box], alpha[box], np.median(colours, axis=0)
    return np.rint(pixels[..., :3] + behind * ((255 - alpha) / 255)).astype(np.uint8)


def turn_upright(image: Image.Image) -> None:
    """Apply the orientation in a picture's EXIF data in place; damaged data are ignored."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # when the data are read, or written back after rotation
        return


def prepare(pixels: NDArray[np.uint8], source: str) -> NDArray[np.uint8]:
    """Turn a picture of a digit into an image like MNIST's.

    MNIST's digits were scaled to fit 20 x 20 pixels, keeping their aspect ratio, with grey levels from antialiasing,
    and placed with their centre of mass in the middle of 28 x 28 (LeCun, Bottou, Bengio and Haffner 1998,
    Gradient-based learning applied to document recognition). Before that, `separate_ink` separates the ink from the
    paper, and `strokes` separates the digit from everything else on the paper.

    Parameters
    ----------
    pixels : uint8 array of shape (height, width, channels)
        Both sides at least 1.
    source : str
        What to call the picture in an error.

    Returns
    -------
    uint8 array of shape (28, 28)
        0 is background, 255 full ink.

    Raises
    ------
    PictureError
        If nothing stands out from the paper, several digits do, or the paper has no room for a digit.
    """
    grey = grey_levels(pixels)
    page = find_sheet(grey)
    ink, noise = separate_ink(grey[page])
    mask = strokes(ink, whole=grey[page].shape == grey.shape)
    full = np.percentile(ink[mask], FULL) if mask.any() else 0
    if full <= max(CONTRAST, NOISE * noise):
        raise PictureError(f"{source} is blank: no digit stands out from the paper. {ADVICE}")
    if min(ink.shape) < max(NARROWEST, max(ink.shape) / 50):
        raise PictureError(f"{source} is too narrow for a digit. Crop it to the digit, with a margin around it")
    if shows_several(mask):
        raise PictureError(f"{source} shows several digits. Crop it to one of them")
    rims = ndimage.binary_dilation(mask, iterations=3) & (ink > FAINT * full)
    (box,) = ndimage.find_objects(rims.astype(int))
    return placed(np.where(rims, np.minimum(ink / full, 1), 0)[box])


def grey_levels(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Grey levels of 0 to 255, (height, width): the first principal component of the colours.

    In luminance, red ink on green paper of the same brightness would be invisible.
    """
    colours = pixels.reshape(-1, pixels.shape[2]).astype(np.float32)
    covariance = np.atleast_2d(np.cov(colours, rowvar=False, bias=True))
    axis = np.linalg.eigh(covariance)[1][:, -1]
    axis *= np.copysign(1 / np.abs(axis).sum(), axis.sum())  # bright stays bright
    return (colours @ axis - 255 * np.minimum(axis, 0).sum()).reshape(pixels.shape[:2]).astype(np.float32)


def find_sheet(grey: NDArray[np.floating]) -> tuple[slice, ...]:
    """Find the paper: a light rectangle that at most one edge of the picture cuts off, or else the whole picture."""
    labels, count = ndimage.label(grey > threshold_otsu(grey))
    if count:
        largest = labels == np.argmax(np.bincount(labels.ravel())[1:]) + 1
        (box,) = ndimage.find_objects(largest.astype(int))
        cut_off = sum((at.start == 0) + (at.stop == length) for at, length in zip(box, grey.shape))
        if cut_off <= 1 and is_sheet(largest):
            return box
    return tuple(map(slice, grey.shape))


def is_sheet(mask: NDArray[np.bool_]) -> bool:
    """Whether the mask is a large rectangle at any angle, ignoring holes."""
    filled = ndimage.binary_fill_holes(mask)
    sides = smallest_rectangle(filled)
    return bool(filled.sum() > RECTANGLE * np.prod(sides) and min(sides) > min(mask.shape) / 2)


def smallest_rectangle(mask: NDArray[np.bool_]) -> tuple[float, float]:
    """Sides of the minimum bounding rectangle of the mask, at any angle."""
    points = np.argwhere(mask ^ ndimage.binary_erosion(mask))
    angles = np.radians(np.arange(0, 90, 2))
    turned = (points @ np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) for a in angles)
    return min((tuple(np.ptp(way, axis=0) + 1) for way in turned), key=np.prod)


def separate_ink(grey: NDArray[np.floating]) -> tuple[NDArray[np.floating], float]:
    """Separate ink from paper, dark on light or light on dark.

    The paper is estimated by a local median, which follows gradients and the edges of shadows. The median is taken
    twice, the second time without pixels that look like ink, because a bold digit fills half a window. Ink is the
    missing fraction of the paper's brightness, because light and shadow are factors.

    Returns
    -------
    float32 array of shape (height, width)
        Ink, from 0 for paper to 1.
    float
        Standard deviation of the paper's noise.
    """
    step = 2 if max(grey.shape) > 100 else 1  # a quarter of the pixels is enough, and far cheaper
    some = grey[::step, ::step]
    levels = np.rint(some).clip(1).astype(np.uint8)
    window = np.ones((max(some.shape) // 2 | 1,) * 2, np.uint8)
    paper = rank.median(levels, window)
    off = np.abs(paper - some)
    bare = off <= threshold_otsu(off)
    without_ink = rank.median(levels, window, mask=bare)  # 0 where nothing is left
    paper = np.where(without_ink, without_ink, paper).astype(np.float32)
    paper = np.asarray(Image.fromarray(paper).resize(grey.shape[::-1], Image.Resampling.BILINEAR))
    blur = max(grey.shape) / 400 if max(grey.shape) > 100 else 0
    lacking = ndimage.gaussian_filter(paper - grey, blur)
    if np.square(lacking.clip(max=0)).sum() > np.square(lacking.clip(min=0)).sum():
        lacking, paper = -lacking, np.maximum(255 - paper, 128)  # on bright paper, a bit more light is not white ink
    ink = lacking / np.maximum(paper, DIMMEST)
    bare_ink = ink[::step, ::step][bare]
    noise = 1.4826 * np.median(np.abs(bare_ink - np.median(bare_ink)))
    return np.clip(ink, 0, 1), noise


def strokes(ink: NDArray[np.floating], whole: bool) -> NDArray[np.bool_]:
    """Mask of the strokes of digits, without specks, lines on the paper, table tops, and lines and bars at the edge.

    A component that touches the edge is a digit only if it looks like one, nothing else is left, and the picture was
    used as a `whole`.
    """
    levels = np.rint(255 * ink).astype(np.uint8)
    opened = area_opening(np.pad(levels, 2), int(SPECK * levels.size) + 1)[2:-2, 2:-2]  # fails on tiny arrays
    levels = opened if opened.max() > 255 * CONTRAST else levels
    labels, _ = ndimage.label(levels > threshold_otsu(levels), np.ones((3, 3)))
    areas = np.bincount(labels.ravel())
    inside = np.zeros(ink.shape, bool)
    inside[tuple(slice(int(EDGE * length) + 1, -int(EDGE * length) - 1) for length in ink.shape)] = True
    at_edge = np.isin(np.arange(len(areas)), labels[~inside])
    areas[0] = 0
    if at_edge[1:].any():  # the edge of a shadow leaves fragments
        areas[~at_edge & (areas < 4 * SPECK * ink.size)] = 0
    if not areas[~at_edge].any():
        largest = labels == areas.argmax()
        dark = np.median(ink[largest]) > DARK
        return largest if whole and dark and like_a_digit(largest, inside) else np.zeros(ink.shape, bool)
    areas[at_edge] = 0
    return (areas > SMALL * areas.max())[labels]


def like_a_digit(part: NDArray[np.bool_], inside: NDArray[np.bool_]) -> bool:
    """Whether a component at the edge may be a digit: not a thin line, mostly off the edge, with at most two holes."""
    (box,) = ndimage.find_objects(part.astype(int))
    wide = min(at.stop - at.start for at in box) > min(part.shape) / 8
    return wide and 4 * (part & ~inside).sum() < (~inside).sum() and euler_number(part) >= -1


def shows_several(mask: NDArray[np.bool_]) -> bool:
    """Whether there are two separate components, the shorter more than half as tall as the taller."""
    heights = [box[0].stop - box[0].start for box in ndimage.find_objects(ndimage.label(mask, np.ones((3, 3)))[0])]
    gap = max(heights) // 10
    apart, _ = ndimage.label(ndimage.binary_dilation(mask, np.ones((3, 3)), iterations=gap) if gap else mask)
    heights = sorted(box[0].stop - box[0].start for box in ndimage.find_objects(apart))
    return len(heights) > 1 and 2 * heights[-2] > heights[-1]


def placed(digit: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Scale a digit to fit 20 x 20 pixels, and place its centre of mass in the middle of 28 x 28."""
    crop = Image.fromarray(digit.astype(np.float32))
    scale = BOX / max(crop.size)
    width, height = (max(1, round(scale * length)) for length in crop.size)
    small = np.asarray(crop.resize((width, height), Image.Resampling.BILINEAR))  # averages what each pixel covers
    starts = (round(CENTRE - centre) for centre in ndimage.center_of_mass(small))
    top, left = (min(max(start, 0), SIDE - length) for start, length in zip(starts, small.shape))
    image = np.zeros((SIDE, SIDE), np.uint8)
    image[top : top + height, left : left + width] = np.rint(small * (255 / small.max()))
    return image
