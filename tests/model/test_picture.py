"""Pictures of digits are prepared like MNIST's images, whatever they look like, or refused in one line."""

import io
import os
import re
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from kernels import get_backend
from model.cli import app
from model.cli.predict import predict_command
from model.data import limited, load_dataset
from model.extras import picture
from model.extras.checkpoint import CheckpointError, Config, save
from model.extras.picture import MAX_PIXELS, PictureError, decode, prepare, read_picture
from model.mlp import MLP
from model.threads import available_cores
from model.training import State, train
from tests.support.datasets import DATASET
from tests.support.idx import write_idx
from tests.support.pictures import (
    EXPECTED,
    JPEGS,
    PICTURES,
    SIZE,
    assert_prepared,
    digit,
    encoded,
    png_chunk,
    prepared,
)
from tests.support.runs import run_model
from tests.support.systems import needs_posix, peak_memory

# Like MNIST --------------------------------------------------------------------------------------------------------


def enlarged(image, rng):
    return image.resize((28 * int(rng.integers(2, 7)),) * 2, Image.Resampling.BICUBIC)


def padded(image, rng):
    """On a larger background, at a random place."""
    return ImageOps.expand(image, tuple(rng.integers(0, 60, 4).tolist()))


VARIANTS = {
    "as it is": lambda image, rng: image,
    "enlarged": enlarged,
    "inverted": lambda image, rng: ImageOps.invert(image),
    "padded": padded,
    "all of it": lambda image, rng: ImageOps.invert(padded(enlarged(image, rng), rng)),
}


@pytest.fixture(scope="module")
def trained():
    """A network trained for a moment, and images that it has not seen: 1,000 of MNIST's, or 500 of digits28's.

    The digits of digits28 do not fill the box of 20 x 20: they are prepared again first.
    """
    dataset, step = limited(load_dataset(DATASET), 6000), 10 if DATASET == "mnist" else 20
    dataset = dataset._replace(test_images=dataset.test_images[::step], test_labels=dataset.test_labels[::step])
    if DATASET == "digits28":
        dataset = dataset._replace(**prepared_again(dataset, "train"), **prepared_again(dataset, "test"))
    mlp = MLP()
    train(mlp, get_backend("sparse"), dataset, epochs=3, batch_size=32, learning_rate=0.1)
    return mlp, dataset.test_images, dataset.test_labels


def prepared_again(dataset, part):
    """Images and labels of digits28, without the few in a hundred that are refused."""
    images, labels = getattr(dataset, f"{part}_images"), getattr(dataset, f"{part}_labels")
    results = prepared_or_none(encoded(Image.fromarray(image.reshape(28, 28))) for image in images)
    read = [result is not None for result in results]
    assert np.mean(read) > 0.98
    again = np.array([result.reshape(-1) for result in results if result is not None])
    return {f"{part}_images": again, f"{part}_labels": labels[read]}


def prepared_or_none(contents):
    """The image in each file, or None if refused; on all cores, as the filters release the GIL."""
    decoding = threading.Lock()  # catch_warnings changes global state

    def attempt(content):
        try:
            with decoding:
                pixels = decode(io.BytesIO(content), "picture")
            return prepare(pixels, "picture")
        except PictureError:
            return None

    with ThreadPoolExecutor(available_cores()) as pool:
        return list(pool.map(attempt, contents))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_accuracy_is_kept_within_two_points(trained, variant, record_property):
    """Slow: a large picture takes 0.1 s."""
    mlp, images, labels = trained
    rng = np.random.default_rng(0)
    drawn = [VARIANTS[variant](Image.fromarray(image.reshape(28, 28)), rng) for image in images]
    results = prepared_or_none(encoded(image, compress_level=1) for image in drawn)
    read = np.array([result is not None for result in results])  # what is refused is not recognised
    blank = np.zeros((28, 28), np.uint8)
    again = np.array([blank if result is None else result for result in results]).reshape(len(images), -1)
    expected = np.mean(mlp.predict(get_backend("numpy"), images) == labels)
    accuracy = np.mean((mlp.predict(get_backend("numpy"), again) == labels) & read)
    record_property("accuracy", (expected, accuracy))
    assert expected > 0.85
    assert accuracy >= expected - 0.02


def test_images_of_mnist_hardly_change(mnist):
    """They already fit the box and are centred: only the faintest pixels are lost, sometimes with a row or column.

    If no pixel is dropped, nine in ten images come back within three levels, since full ink is a percentile. So scale
    and centre are MNIST's.
    """
    images = mnist.test_images[:300].reshape(-1, 28, 28)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(picture, "FAINT", 0)
        same = [np.abs(prepare(image[:, :, None], "image") - image.astype(int)).max() <= 3 for image in images]
    assert np.mean(same) > 0.85


# Every format -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PICTURES)
def test_the_same_drawing_gives_the_same_image(name):
    result = prepared(PICTURES[name])
    assert_prepared(result)
    np.testing.assert_allclose(result.astype(int), EXPECTED, rtol=0, atol=1)  # levels may be rounded differently


@pytest.mark.parametrize("factor", [2, 10, 50])
def test_size_hardly_matters(factor):
    """Antialiasing has more grey levels where there are more pixels."""
    large = digit("L").resize([factor * length for length in SIZE], Image.Resampling.NEAREST)
    pixels = decode(io.BytesIO(encoded(large, compress_level=1)), "picture")
    assert max(pixels.shape) <= picture.WORKING_SIZE
    result = prepare(pixels, "picture")
    assert_prepared(result)
    np.testing.assert_allclose(result.astype(int), EXPECTED, rtol=0, atol=40)


@pytest.mark.parametrize("name", JPEGS)
def test_jpeg_gives_nearly_the_same_image(name):
    """JPEG blurs edges, so the box may be one pixel of 120 larger: grey levels differ little on average."""
    result = prepared(JPEGS[name])
    assert_prepared(result)
    assert np.abs(result.astype(int) - EXPECTED).mean() < 4


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_damaged_exif_data_are_ignored(kind):
    """Any damaged byte; the orientation is applied whenever it can be found, however damaged the rest is."""

    def with_exif(content):
        return decode(io.BytesIO(encoded(digit(), kind, exif=content)), "picture").tobytes()

    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    content = exif.tobytes()
    turned, as_it_is = with_exif(content), with_exif(b"")
    for value in (b"\0", b"\xff"):
        results = [with_exif(content[:n] + value + content[n + 1 :]) for n in range(len(b"Exif\0\0"), len(content))]
        assert set(results) == {turned, as_it_is}
        assert results[-1] == turned  # the last byte belongs to the resolution
    for noise in (b"", b"MM", b"\xff" * 99):
        assert with_exif(b"Exif\0\0" + noise) == as_it_is


def test_preview_inside_a_jpeg_does_not_matter():
    with_preview = encoded(digit(), "MPO", save_all=True, append_images=[digit().resize((12, 8))])
    np.testing.assert_array_equal(prepared(with_preview), prepared(JPEGS["JPEG"]))


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (1, 5000), (5000, 1), (2, 2), (3, 3), (2000, 3)])
def test_pictures_too_narrow_for_a_digit_are_blank(shape):
    pixels = np.zeros((*shape, 4), np.uint8)
    pixels[-1, -1] = 255
    with pytest.raises(PictureError, match="is blank"):
        prepare(pixels, "picture")


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(1, 10), (1, 5000), (2, 10), (2, 100), (5, 300), (10, 2000), (60, 5000)])
def test_pictures_with_ink_but_no_room_for_a_digit_are_refused(shape, turned):
    """A tenth of the longer side is ink."""
    length = shape[1]
    pixels = np.full(shape, 255, np.uint8)
    pixels[:, length // 3 : length // 3 + length // 10] = 0
    picture = encoded(Image.fromarray(pixels.T if turned else pixels))
    with pytest.raises(PictureError, match=r"is too narrow for a digit\. Crop it to the digit, with a margin"):
        prepared(picture)


@pytest.mark.parametrize("shape", [(9, 7), (7, 300), (300, 9), (30, 1000)])
def test_pictures_of_odd_shapes_are_prepared(shape):
    pixels = np.full((*shape, 3), 255, np.uint8)  # a light rectangle on dark would be a sheet on a table
    rows, columns = shape
    pixels[rows // 3 : rows - rows // 3, columns // 3 : columns - columns // 3] = 0
    assert_prepared(prepare(pixels, "picture"))


def test_large_texts_in_a_png_are_skipped():
    texts = PngInfo()
    texts.add_itxt("note", "x" * 20_000_000, zip=True)
    np.testing.assert_array_equal(prepared(encoded(digit(), pnginfo=texts)), EXPECTED)


def test_a_jpeg_without_its_end_marker_is_read():
    np.testing.assert_array_equal(prepared(JPEGS["JPEG"][:-2]), prepared(JPEGS["JPEG"]))


# Refused -----------------------------------------------------------------------------------------------------------


def png_that_declares(width, height):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")


def jpeg_that_declares(width, height):
    content = encoded(digit("L"), "JPEG")
    return content.replace(struct.pack(">HH", *SIZE[::-1]), struct.pack(">HH", height, width), 1)


def animated():
    return encoded(digit(), save_all=True, append_images=[digit(paper="red")])


REFUSED = {
    "empty file": (b"", "not a PNG or JPEG"),
    "text": (b"seven\n" * 100, "not a PNG or JPEG"),
    "GIF": (encoded(digit(), "GIF"), "not a PNG or JPEG"),
    "animated": (animated(), "is animated"),
    "truncated PNG": (PICTURES["grey"][:-40], "damaged or truncated"),
    "truncated JPEG": (JPEGS["JPEG"][:-400], "damaged or truncated"),
    "damaged PNG": (PICTURES["grey"][:99] + b"x" + PICTURES["grey"][100:], "damaged or truncated"),
    "white": (encoded(Image.new("L", SIZE, 255)), "is blank"),
    "transparent": (encoded(Image.new("RGBA", SIZE, (10, 20, 30, 0))), "is blank"),
    "nearly white": (encoded(digit("L", 240, 255)), "is blank"),
    "one pixel": (encoded(Image.new("L", (1, 1))), "is blank"),
    "no pixels": (png_that_declares(0, 5), "not a PNG or JPEG|damaged"),
    "bomb": (png_that_declares(60_000, 60_000), "declares more than 50,000,000 pixels"),
    "largest bomb": (png_that_declares(2**31 - 1, 2**31 - 1), "declares more than 50,000,000 pixels"),
    "little bomb": (png_that_declares(10_000, 10_000), "declares more than 50,000,000 pixels"),
    "least bomb": (png_that_declares(1, MAX_PIXELS + 1), "declares more than 50,000,000 pixels"),
    "JPEG bomb": (jpeg_that_declares(65_500, 65_500), "declares more than 50,000,000 pixels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_pictures_are_refused_in_one_line(tmp_path, name):
    content, problem = REFUSED[name]
    file = tmp_path / "picture.png"
    file.write_bytes(content)
    before, start = peak_memory(), time.perf_counter()
    with pytest.raises(PictureError, match=rf"^{re.escape(str(file))} .*({problem}).*\. [A-Z]") as error:
        read_picture(file)
    assert "\n" not in str(error.value)
    assert peak_memory() - before < 20e6
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("content", [PICTURES["grey"], JPEGS["JPEG"], PICTURES["16 bits"]])
def test_a_file_cut_short_anywhere_is_refused(content):
    """Refused, unless only checksums and end markers are missing."""
    for end in range(len(content)):
        try:
            result = prepared(content[:end])
        except PictureError:
            continue
        assert end >= len(content) - 20
        np.testing.assert_array_equal(result, prepared(content))


@needs_posix
def test_paths_that_are_not_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, problem in {
        tmp_path: "is a folder",
        tmp_path / "nothing.png": "cannot be opened .No such file",
        tmp_path / "pipe": "is a device or a pipe",
        "/dev/zero": "is a device or a pipe",
        "x" * 5000: "cannot be opened .File name too long",
        "nul\0l": "cannot be opened .embedded null",
    }.items():
        with pytest.raises(PictureError, match=problem) as error:
            read_picture(name)
        assert "\n" not in str(error.value)


def test_oversized_files_are_not_read(tmp_path):
    file = tmp_path / "huge.png"
    with file.open("wb") as stream:
        stream.write(PICTURES["grey"])
        stream.truncate(picture.MAX_BYTES + 1)
    with pytest.raises(PictureError, match="has more than 100,000,000 bytes"):
        read_picture(file)


# The command -------------------------------------------------------------------------------------------------------


def saved(file, mlp):
    """A checkpoint of the network."""
    hidden = len(mlp.layers[0][1])
    save(file, mlp, State.start(0), Config("numpy", "mnist", "0" * 64, None, hidden, 0.1, 32, 0, 1, 1))
    return file


def test_predict_shows_the_digit_and_a_bar_for_each(tmp_path, trained):
    mlp, images, _ = trained
    shown = int(mlp.predict(get_backend("numpy"), images[:1])[0])
    likely = mlp.probabilities(get_backend("numpy"), images[:1])[0]
    assert likely.sum() == pytest.approx(1)
    file = tmp_path / "a [bold]digit.png"  # which is not markup
    ImageOps.invert(Image.fromarray(images[0].reshape(28, 28))).save(file)
    result = run_model("predict", file, "--checkpoint", saved(tmp_path / "network", mlp))
    assert (result.returncode, result.stderr) == (0, "")
    first, *bars = result.stdout.splitlines()
    assert first == f"{file} shows the digit {shown}"
    rows = [re.fullmatch(r"(\d) +([\d.]+)% +([█▉▊▋▌▍▎▏]*) *", bar).groups() for bar in bars]
    assert [int(digit) for digit, _, _ in rows] == list(range(10))
    assert [float(percent) for _, percent, _ in rows] == pytest.approx(100 * likely, abs=15)  # faint pixels are gone
    for _, percent, bar in rows:
        assert len(bar) == pytest.approx(float(percent) * 40 / 100, abs=1)


def test_letters_are_trained_resumed_and_predicted(tmp_path, digits28):
    """Labels 1 to 26, like EMNIST's letters: train, resume and predict."""
    few = limited(digits28, 300)
    labels = [(1 + np.arange(len(array)) % 26).astype(np.uint8) for array in (few.train_labels, few.test_labels)]
    write_idx(tmp_path, few._replace(train_labels=labels[0], test_labels=labels[1]))
    file, picture = tmp_path / "run", tmp_path / "picture.png"
    picture.write_bytes(PICTURES["grey"])
    options = ("--dataset", "idx", "--data", tmp_path)
    assert run_model("train", *options, "--epochs", 1, "--limit", 20, "--checkpoint", file).returncode == 0
    resumed = run_model("train", *options, "--epochs", 2, "--resume", file)
    assert resumed.returncode == 0, resumed.stderr
    result = run_model("predict", picture, "--checkpoint", file)
    assert re.search(r"shows the label \d+, or perhaps \d+: the network is unsure\n", result.stderr + result.stdout)
    assert re.findall(r"^ *(\d+) ", result.stdout, re.MULTILINE) == [str(label) for label in range(27)]


def test_bars_without_blocks(tmp_path, monkeypatch):
    """In ASCII, which has no block characters."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    file = tmp_path / "good.png"
    file.write_bytes(PICTURES["grey"])
    result = run_model("predict", file, "--checkpoint", saved(tmp_path / "network", certain()))
    assert (result.returncode, result.stderr) == (0, "")
    first, *bars = result.stdout.splitlines()
    assert first == f"{file} shows the digit 3"
    assert [bar.split() for bar in bars] == [
        [str(label), "100.0%", "#" * 40] if label == 3 else [str(label), "0.0%"] for label in range(10)
    ]


def certain():
    """A network that takes everything for a 3."""
    mlp = MLP((784, 3, 10))
    mlp.layers[1][1][3] = 100
    return mlp


def predicted(capsys, picture, checkpoint):
    """What the command prints on stdout and stderr."""
    app(["predict", str(picture), "--checkpoint", str(checkpoint)], standalone_mode=False)
    return capsys.readouterr()


def test_an_unsure_network_says_so(tmp_path, capsys):
    file = tmp_path / "good.png"
    file.write_bytes(PICTURES["grey"])
    shown, noted = predicted(capsys, file, saved(tmp_path / "network", MLP((784, 3, 10))))
    first = shown.splitlines()[0]
    assert re.fullmatch(rf"{re.escape(str(file))} shows the digit \d, or perhaps \d: the network is unsure", first)
    assert noted == ""


def test_predict_warns_about_networks_trained_on_digits28(tmp_path, capsys):
    file, network = tmp_path / "good.png", tmp_path / "network"
    file.write_bytes(PICTURES["grey"])
    config = Config("numpy", "digits28", "0" * 64, None, 3, 0.1, 32, 0, 1, 1)
    save(network, certain(), State.start(0), config)
    shown, noted = predicted(capsys, file, network)
    assert shown.startswith(f"{file} shows the digit 3\n")
    message = "was trained on digits28 and recognises only half of MNIST's digits: train on mnist instead"
    assert noted == f"{network} {message}\n"


def test_a_picture_in_the_home_folder(tmp_path, capsys, monkeypatch):
    """With a quoted tilde, which the shell does not expand."""
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    (tmp_path / "good.png").write_bytes(PICTURES["grey"])
    saved(tmp_path / "network", certain())
    shown, _ = predicted(capsys, "~/good.png", "~/network")
    assert shown.startswith(f"{tmp_path / 'good.png'} shows the digit 3\n")


def test_several_digits_are_refused(tmp_path):
    """Side by side, or one above the other."""
    network = saved(tmp_path / "network", certain())
    file = tmp_path / "pair.png"
    for turned in (False, True):
        pair = Image.new("L", (2 * SIZE[0], SIZE[1] + 20), "white")
        for left in (0, SIZE[0]):
            pair.paste(digit("L"), (left, 10))
        (pair.rotate(90, expand=True) if turned else pair).save(file)
        with pytest.raises(PictureError, match=rf"^{re.escape(str(file))} shows several digits\. Crop it to one of"):
            predict_command(file, network)


def test_errors_of_predict_are_one_line(tmp_path):
    good, text = tmp_path / "good.png", tmp_path / "text.png"
    good.write_bytes(PICTURES["grey"])
    text.write_text("seven")
    network = saved(tmp_path / "network", MLP((784, 3, 10)))
    small = saved(tmp_path / "small", MLP((25, 3, 10)))
    huge = MLP((784, 3, 10))
    for parameter in huge.parameters:
        parameter[...] = 3e38
    huge = saved(tmp_path / "huge", huge)
    result = run_model("predict", text, "--checkpoint", network)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(rf"error: {re.escape(str(text))} is not a PNG or JPEG picture.*\n", result.stderr)
    for checkpoint, message in (
        (small, f"^{re.escape(str(small))}: its network does not take images of 28 x 28 pixels: use one that does$"),
        (huge, f"^{re.escape(str(huge))}: its parameters are too large"),
        (text, f"{re.escape(str(text))}.* not a checkpoint"),
    ):
        with pytest.raises((ValueError, CheckpointError), match=message) as error:
            predict_command(good, checkpoint)
        assert "\n" not in str(error.value)
