"""Study: how often the digit in a picture is recognised, by kind of picture.

The pictures are simulated from MNIST's test images: enlarged, on paper, in uneven light.
"""

import io
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track
from scipy import ndimage

from kernels import get_backend
from model.data import Dataset
from model.extras.picture import PictureError, decode, prepare
from model.mlp import MLP
from model.threads import available_cores
from model.training import train

Floats = NDArray[np.floating]
Random = np.random.Generator

EPOCHS, BATCH_SIZE, LEARNING_RATE = 5, 32, 0.1
PAPER, INK = (236, 233, 226), (40, 38, 56)


# Parts of a picture -------------------------------------------------------------------------------------------------


def pen(image: NDArray[np.uint8], rng: Random) -> Floats:
    """Strokes of 0 to 1 with edges as sharp as a pen's, and a margin around the digit."""
    side = int(rng.integers(200, 280))
    large = Image.fromarray(image.reshape(28, 28)).resize((side, side), Image.Resampling.BICUBIC)
    strokes = np.clip((np.asarray(large) / 255 - 0.5) * 3 + 0.5, 0, 1)
    return np.pad(strokes, [tuple(rng.integers(10, 60, 2)) for _ in range(2)])


def paper(shape: tuple[int, ...], rng: Random, grain: float = 3) -> Floats:
    """A sheet of paper in even light, (height, width, 3), with grain slightly blurred as by a lens."""
    noise = ndimage.gaussian_filter(rng.normal(0, 1, shape), 0.8)
    return np.array(PAPER) + grain * (noise / noise.std())[..., None]


def inked(page: Floats, strokes: Floats, ink: Any = INK) -> Floats:
    """The page with strokes of ink on it."""
    return page + strokes[..., None] * (np.array(ink) - page)


def across(shape: tuple[int, ...], rng: Random) -> Floats:
    """A ramp from 0 on one side of the page to 1 on the other, in a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    distance = np.cos(angle) * columns + np.sin(angle) * rows
    return (distance - distance.min()) / np.ptp(distance)


def gradient(shape: tuple[int, ...], rng: Random, depth: float = 0.35) -> Floats:
    """Light that fades across the page, as a factor for each pixel."""
    return (1 - depth * across(shape, rng))[..., None]


def shadow(shape: tuple[int, ...], rng: Random) -> Floats:
    """A shadow of 10 to 35 % with a soft edge, on one side of the page."""
    soft = 1 / (1 + np.exp((across(shape, rng) - rng.uniform(0.25, 0.75)) / rng.uniform(0.01, 0.04)))
    return (1 - rng.uniform(0.1, 0.35) * soft)[..., None]


def noisy(page: Floats, rng: Random, amount: float) -> Floats:
    """The page with sensor noise."""
    return page + rng.normal(0, amount, page.shape)


def lined(page: Floats, rng: Random, squares: bool) -> Floats:
    """The page with pale blue rules, or squares."""
    page, gap = page.copy(), int(rng.integers(25, 60))
    width = int(rng.integers(1, 3))
    for start in range(int(rng.integers(0, gap)), max(page.shape), gap):
        page[start : start + width] = (140, 165, 215)
        if squares:
            page[:, start : start + width] = (140, 165, 215)
    return page


def on_table(page: Floats, rng: Random) -> Floats:
    """The sheet on dark wood, slightly rotated."""
    height, width = page.shape[:2]
    sheet = Image.fromarray(np.clip(page, 0, 255).astype(np.uint8)).convert("RGBA")
    sheet = sheet.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC, expand=True)
    grain = ndimage.gaussian_filter(rng.normal(0, 1, (2 * height, 2 * width)), (0.7, 12))[: int(1.5 * height)]
    wood = np.array((62, 44, 32)) + 40 * grain[:, : int(1.6 * width), None]
    table = Image.fromarray(np.clip(wood, 0, 255).astype(np.uint8))
    left, top = (int(rng.uniform(0.2, 0.8) * (large - small)) for large, small in zip(table.size, sheet.size))
    table.paste(sheet, (left, top), sheet)
    return np.asarray(table, float)


def dots(strokes: Floats, rng: Random, count: int, radius: float) -> Floats:
    """Round dots of 0 to 1 near the page's corners, away from the digit."""
    rows, columns = np.mgrid[: strokes.shape[0], : strokes.shape[1]]
    spots = np.zeros_like(strokes)
    for corner in rng.permutation(4)[:count]:
        row, column = (
            abs(at * (length - 1) - rng.integers(3, 12)) for at, length in zip(divmod(int(corner), 2), strokes.shape)
        )
        spots = np.maximum(spots, np.clip(radius + 0.5 - np.hypot(rows - row, columns - column), 0, 1))
    return spots


def jpeg(page: Floats) -> bytes:
    """A JPEG file, as a camera writes."""
    stream = io.BytesIO()
    Image.fromarray(np.clip(np.rint(page), 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=85)
    return stream.getvalue()


def png(page: NDArray) -> bytes:
    """A PNG file, as from a screenshot or a drawing program."""
    stream = io.BytesIO()
    Image.fromarray(np.clip(np.rint(page), 0, 255).astype(np.uint8)).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


# Kinds --------------------------------------------------------------------------------------------------------------

Kind = Callable[[NDArray[np.uint8], Random], bytes]


def photo(light: Callable[[tuple[int, ...], Random], Any] = lambda shape, rng: 1.0) -> Kind:
    """Pen on paper, in this light."""

    def draw(image: NDArray[np.uint8], rng: Random) -> bytes:
        strokes = pen(image, rng)
        return jpeg(noisy(inked(paper(strokes.shape, rng), strokes) * light(strokes.shape, rng), rng, 2))

    return draw


def pencil(image: NDArray[np.uint8], rng: Random) -> bytes:
    """Grey strokes, broken up by the paper's grain."""
    strokes = pen(image, rng)
    grain = np.clip(0.75 + 0.3 * ndimage.gaussian_filter(rng.normal(0, 1.6, strokes.shape), 0.8), 0, 1)
    page = inked(paper(strokes.shape, rng, 5), strokes * grain, (130, 130, 134))
    return jpeg(noisy(page * gradient(strokes.shape, rng, 0.15), rng, 8))


def low_light(image: NDArray[np.uint8], rng: Random) -> bytes:
    """A fifth of the light, and strong noise."""
    strokes = pen(image, rng)
    page = inked(paper(strokes.shape, rng), strokes) * 0.2 * gradient(strokes.shape, rng, 0.3)
    return jpeg(noisy(page, rng, 4))


def on_lines(squares: bool) -> Kind:
    """Pen on ruled or squared paper."""

    def draw(image: NDArray[np.uint8], rng: Random) -> bytes:
        strokes = pen(image, rng)
        page = inked(lined(paper(strokes.shape, rng), rng, squares), strokes)
        return jpeg(noisy(page * gradient(strokes.shape, rng, 0.1), rng, 2))

    return draw


def dark_table(image: NDArray[np.uint8], rng: Random) -> bytes:
    """A sheet on a dark table, smaller than the picture."""
    strokes = pen(image, rng)
    return jpeg(noisy(on_table(inked(paper(strokes.shape, rng), strokes), rng), rng, 2))


def drawn(image: NDArray[np.uint8], rng: Random) -> tuple[Floats, Floats]:
    """Strokes, and a drawing of them in black on white."""
    strokes = pen(image, rng)
    return strokes, 255 * (1 - strokes)


def edge_line(image: NDArray[np.uint8], rng: Random) -> bytes:
    """A frame, or a line along one side."""
    _, page = drawn(image, rng)
    width = int(rng.integers(1, 4))
    sides = rng.permutation(4)[: int(rng.choice([1, 4]))]
    for side in sides:
        np.rot90(page, side)[:width] = 0  # a view
    return png(page)


def title_bar(image: NDArray[np.uint8], rng: Random) -> bytes:
    """A drawing program's window, with name and buttons in light letters on a dark title bar."""
    _, page = drawn(image, rng)
    bar = np.full((int(rng.integers(18, 36)), page.shape[1]), rng.uniform(30, 90))
    bar[7:-7, 8 : 8 + bar.shape[1] // 3] = rng.choice([60, 235], (len(bar) - 14, bar.shape[1] // 3), p=[0.6, 0.4])
    bar[8:-8, -14:-8] = 235
    return png(np.vstack([bar, page]))


def three_specks(image: NDArray[np.uint8], rng: Random) -> bytes:
    """Three specks of dust."""
    strokes, _ = drawn(image, rng)
    return png(255 * (1 - np.maximum(strokes, dots(strokes, rng, 3, rng.uniform(0.5, 2.5)))))


def black_dot(image: NDArray[np.uint8], rng: Random) -> bytes:
    """A pale digit, and one much darker dot."""
    strokes, _ = drawn(image, rng)
    pale = rng.uniform(0.25, 0.5)
    return png(255 * (1 - np.maximum(pale * strokes, dots(strokes, rng, 1, rng.uniform(2, 5)))))


def transparent_margin(image: NDArray[np.uint8], rng: Random) -> bytes:
    """A page with a transparent margin, like a layer of a larger picture."""
    _, page = drawn(image, rng)
    pixels = np.stack([page, page, page, np.full_like(page, 255)], axis=2)
    return png(np.pad(pixels, [tuple(rng.integers(10, 50, 2)) for _ in range(2)] + [(0, 0)]))


def ink_on_nothing(image: NDArray[np.uint8], rng: Random) -> bytes:
    """Ink of a random colour on a transparent layer."""
    strokes, _ = drawn(image, rng)
    pixels = np.empty((*strokes.shape, 4))
    pixels[..., :3], pixels[..., 3] = rng.integers(0, 256, 3), 255 * strokes
    return png(pixels)


def own(inverted: bool) -> Kind:
    """MNIST's own image, white on black, or black on white if `inverted`."""
    return lambda image, rng: png(255 - image.reshape(28, 28) if inverted else image.reshape(28, 28))


CLEAN = "black on white, drawn"

KINDS: dict[str, Kind] = {
    "MNIST's own image, white on black": own(False),
    "the same, black on white": own(True),
    CLEAN: lambda image, rng: png(drawn(image, rng)[1]),
    "even light": photo(),
    "a gradient of 35 % across the page": photo(gradient),
    "a soft shadow of 10 to 35 %": photo(shadow),
    "pencil, with noise": pencil,
    "low light": low_light,
    "ruled paper": on_lines(False),
    "squared paper": on_lines(True),
    "a sheet on a dark table": dark_table,
    "a line along the edge": edge_line,
    "a title bar": title_bar,
    "three specks": three_specks,
    "one black dot beside a pale digit": black_dot,
    "a page with a transparent margin": transparent_margin,
    "ink on a transparent layer": ink_on_nothing,
}

BLANK: dict[str, Kind] = {
    name: KINDS[name]
    for name in (
        "even light",
        "a gradient of 35 % across the page",
        "a soft shadow of 10 to 35 %",
        "pencil, with noise",
        "low light",
        "ruled paper",
        "squared paper",
        "a sheet on a dark table",
    )
}


def pair(first: NDArray[np.uint8], second: NDArray[np.uint8], rng: Random) -> bytes:
    """Two digits in a row."""
    strokes = [Image.fromarray(np.rint(255 * pen(image, rng)).astype(np.uint8)) for image in (first, second)]
    page = np.hstack([np.asarray(stroke.resize((300, 300))) for stroke in strokes])
    return png(255 - page)


# Recognition --------------------------------------------------------------------------------------------------------


def network(dataset: Dataset) -> MLP:
    """A network trained for five epochs in mini-batches."""
    mlp = MLP()
    backend = get_backend("sparse")
    train(mlp, backend, dataset, epochs=EPOCHS, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE)
    return mlp


def recognised(mlp: MLP, content: bytes) -> int | None:
    """The digit that the network recognises in a file; None if the file is refused."""
    try:
        image = prepare(decode(io.BytesIO(content), "picture"), "picture")
    except PictureError:
        return None
    return int(mlp.predict(get_backend("numpy"), image.reshape(1, -1))[0])


def accuracy(mlp: MLP, images: NDArray[np.uint8], labels: NDArray[np.uint8], name: str) -> float:
    """Percent of the digits that are recognised, in pictures of this kind."""
    rng = np.random.default_rng(0)
    right = [recognised(mlp, KINDS[name](image, rng)) == label for image, label in zip(images, labels)]
    return 100 * float(np.mean(right))


def blank_refused(mlp: MLP, images: NDArray[np.uint8], name: str) -> float:
    """Percent of blank pages of this kind that are refused, of as many as there are images."""
    rng = np.random.default_rng(0)
    return _refused(mlp, [BLANK[name](np.zeros_like(image), rng) for image in images])


def pairs_refused(mlp: MLP, images: NDArray[np.uint8]) -> float:
    """Percent of the pictures of two digits that are refused."""
    rng = np.random.default_rng(0)
    return _refused(mlp, [pair(*two, rng) for two in zip(images, images[::-1])])


def _refused(mlp: MLP, contents: list[bytes]) -> float:
    return 100 * float(np.mean([recognised(mlp, content) is None for content in contents]))


@dataclass(frozen=True)
class Result:
    """Measured percentages."""

    pictures: int
    """Number of pictures of each kind."""
    right: dict[str, float]
    """Recognised digits, by kind."""
    blank_refused: dict[str, float]
    """Refused blank pages, by kind."""
    pairs_refused: float
    """Refused pictures of two digits."""
    kind: Literal["pictures"] = "pictures"


def measure(dataset: Dataset, quick: bool) -> Result:
    """Test each kind of picture, blank pages and pairs of digits, a process per core; takes a few minutes."""
    mlp, count = network(dataset), 20 if quick else 100
    chosen = np.random.default_rng(0).permutation(len(dataset.test_images))[:count]
    images, labels = dataset.test_images[chosen], dataset.test_labels[chosen]
    with ProcessPoolExecutor(available_cores(), mp_context=get_context("spawn")) as pool:
        right = pool.map(partial(accuracy, mlp, images, labels), KINDS)
        blank = pool.map(partial(blank_refused, mlp, images), BLANK)
        pairs = pool.submit(pairs_refused, mlp, images)
        return Result(
            pictures=count,
            right=dict(zip(KINDS, track(right, "pictures", len(KINDS), transient=True))),
            blank_refused=dict(zip(BLANK, blank)),
            pairs_refused=pairs.result(),
        )
