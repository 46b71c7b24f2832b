"""MNIST is found, fetched and verified; every problem is a one-line error; digits28 is sound.

Nothing here touches the internet or the user's cache: tiny files stand in for MNIST, a local server for its mirrors.
"""

import errno
import gzip
import hashlib
import http.server
import re
import socket
import struct
import threading
import tracemalloc

import numpy as np
import pooch
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import data
from model.data import DataError, limited, load_dataset, load_digits28, load_idx, load_mnist, parse_idx
from tests.support.idx import (
    ARRAYS,
    GZIP,
    PLAIN,
    TEST_IMAGES,
    TEST_LABELS,
    TINY,
    TINY_FILES,
    TRAIN_IMAGES,
    TRAIN_LABELS,
    assert_tiny,
    idx,
    write,
    write_idx,
)


@pytest.fixture(autouse=True)
def sandbox(monkeypatch, tmp_path):
    """Make the tiny files count as MNIST, the cache an empty directory, and no mirror reachable."""
    monkeypatch.setattr(data, "FILES", TINY_FILES)
    monkeypatch.setattr(data, "MIRRORS", ["http://127.0.0.1:1/"])
    monkeypatch.setattr(data, "TIMEOUT", (1, 0.2))
    monkeypatch.setattr(data, "download_failure", "")
    monkeypatch.setattr(data, "cache_directory", lambda: tmp_path / "cache")
    # The handler of pooch's logger writes to what was stderr when pooch was imported, perhaps for this test.
    monkeypatch.setattr(pooch.get_logger(), "disabled", True)
    monkeypatch.delenv("MNIST_DIR", raising=False)
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(variable, "127.0.0.1")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    """Return a directory that holds the tiny files."""
    directory = tmp_path / "mnist"
    write(directory, GZIP)
    return directory


# Finding and verifying


@pytest.mark.parametrize("contents", [PLAIN, GZIP], ids=["plain", "gz"])
@pytest.mark.parametrize("separator", ["-", "."])
def test_files_are_found_under_their_usual_names(tmp_path, contents, separator):
    directory = tmp_path / "elsewhere"
    write(directory, {name.replace("-idx", f"{separator}idx"): text for name, text in contents.items()})
    assert_tiny(load_mnist(directory))


def test_directory_comes_before_the_environment_and_that_before_the_cache(monkeypatch, tmp_path, folder, cache):
    write(cache, GZIP)
    assert_tiny(load_mnist())
    monkeypatch.setenv("MNIST_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="nowhere"):
        load_mnist()
    assert_tiny(load_mnist(folder))


def test_given_directory_without_a_file_is_an_error(folder, cache):
    write(cache, GZIP)
    (folder / f"{TEST_LABELS}.gz").unlink()
    with pytest.raises(
        DataError, match=rf"{re.escape(str(folder))}: {TEST_LABELS} is missing.*Put the original from"
    ) as error:
        load_mnist(folder)
    assert "\n" not in str(error.value)


def with_element(name, index, value):
    array = ARRAYS[name].copy()
    array[index] = value
    return idx(array)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (f"{TRAIN_IMAGES}.gz", GZIP[f"{TRAIN_IMAGES}.gz"][:-20], "truncated, the gzip stream ends early"),
        (f"{TRAIN_IMAGES}.gz", PLAIN[TRAIN_IMAGES], "cannot be read .*[Nn]ot a gzipped file"),
        (f"{TEST_LABELS}.gz", GZIP[f"{TEST_LABELS}.gz"][:10] + bytes([7] * 20), "cannot be read"),
        (TRAIN_IMAGES, PLAIN[TRAIN_IMAGES][:-1], "truncated, 3935 bytes instead of 3936"),
        (TRAIN_IMAGES, PLAIN[TRAIN_IMAGES][:9], "truncated inside its header"),
        (TRAIN_IMAGES, PLAIN[TRAIN_IMAGES] + b"\0", "longer than MNIST's 3936 bytes"),
        (TRAIN_IMAGES, PLAIN[TRAIN_LABELS], "magic number 00000801 instead of 00000803"),
        (TRAIN_IMAGES, idx(np.zeros((5, 27, 29), np.uint8)), "images of 27 x 29 pixels, not 28 x 28"),
        (TRAIN_LABELS, idx(ARRAYS[TRAIN_LABELS][:4]), "4 labels for 5 images"),
        (TRAIN_LABELS, with_element(TRAIN_LABELS, 2, 10), "label 10 is outside 0-9"),
        (TRAIN_LABELS, with_element(TRAIN_LABELS, 2, 5), "checksum mismatch"),
        (
            TEST_IMAGES,
            with_element(TEST_IMAGES, (0, 0, 0), ARRAYS[TEST_IMAGES][0, 0, 0] ^ 1),
            "checksum mismatch",
        ),
    ],
    ids=[
        "truncated gzip",
        "not gzip",
        "damaged gzip",
        "truncated IDX",
        "truncated header",
        "too long",
        "magic number",
        "image size",
        "counts differ",
        "label",
        "checksum of labels",
        "checksum of images",
    ],
)
def test_broken_file_gives_its_name_the_problem_and_the_fix(folder, name, content, problem):
    write(folder, {name: content})
    with pytest.raises(DataError, match=rf"^{re.escape(str(folder / name))}: {problem}.*Replace it with") as error:
        load_mnist(folder)
    assert "\n" not in str(error.value)


def test_gzip_bomb_is_refused_before_it_fills_the_memory(folder):
    write(folder, {f"{TRAIN_IMAGES}.gz": gzip.compress(bytes(50_000_000), 1)})
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"longer than MNIST's"):
            load_mnist(folder)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


# The parser


def test_parser_returns_a_view():
    payload = idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    array = parse_idx(payload, 3, "file")
    np.testing.assert_array_equal(array, np.arange(24).reshape(2, 3, 4))
    assert array.dtype == np.uint8
    assert not array.flags.owndata
    assert not array.flags.writeable


@pytest.mark.parametrize(
    ("payload", "problem"),
    [
        (b"", "magic number"),
        (b"\0\0\x0d\3" + bytes(40), "magic number 00000d03"),
        (struct.pack(">4B3I", 0, 0, 8, 3, 2**16, 2**16, 2**32 - 1), "truncated"),
        (
            struct.pack(">4B3I", 0, 0, 8, 3, 2**31, 2**31, 4),
            "truncated",
        ),  # 2**64 elements: 0 if it overflowed
        (struct.pack(">4B3I", 0, 0, 8, 3, 0, 2**32 - 1, 2**32 - 1), "no data"),
    ],
)
def test_parser_refuses_hostile_headers(payload, problem):
    with pytest.raises(DataError, match=f"^file: {problem}"):
        parse_idx(payload, 3, "file")


@settings(database=None, deadline=None)
@given(st.sampled_from((1, 3)), st.binary(max_size=16), st.binary(max_size=64), st.booleans())
def test_parser_accepts_exactly_what_it_can_represent(ndim, header, body, right_magic):
    payload = (bytes((0, 0, 8, ndim)) if right_magic else b"") + header + body
    try:
        array = parse_idx(payload, ndim, "file")
    except DataError:
        return
    assert idx(array) == payload


# Downloading


class Mirrors(http.server.BaseHTTPRequestHandler):
    """One server with several mirrors: the first part of the path determines how each fails."""

    def do_GET(self):
        self.server.requests.append(self.path)
        _, mirror, name = self.path.split("/")
        content = GZIP[name]
        if mirror == "silent":
            self.server.closing.wait()
            return
        self.send_response(404 if mirror == "absent" else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if mirror in ("abrupt", "stalled"):
            content = content[: len(content) // 2]
        elif mirror == "corrupt":
            content = content[::-1]
        self.wfile.write(content)
        if mirror == "stalled":
            self.server.closing.wait()

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirrors) as server:
        server.requests = []
        server.closing = threading.Event()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def use_mirrors(monkeypatch, server):
    """Return a function that sets the mirrors to use."""

    def use(*names):
        mirrors = [f"http://127.0.0.1:{server.server_port}/{name}/" for name in names]
        monkeypatch.setattr(data, "MIRRORS", mirrors)

    return use


def files_below(directory):
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


def test_download_fills_the_cache_once(server, use_mirrors, cache):
    use_mirrors("good")
    assert_tiny(load_mnist())
    assert files_below(cache) == sorted(GZIP)
    assert len(server.requests) == 4
    assert_tiny(load_mnist())
    assert len(server.requests) == 4


def test_damaged_file_in_the_cache_is_downloaded_again(server, use_mirrors, cache):
    write(cache, {**GZIP, f"{TEST_IMAGES}.gz": b"damaged"})
    use_mirrors("good")
    assert_tiny(load_mnist())
    assert server.requests == [f"/good/{TEST_IMAGES}.gz"]


@pytest.mark.parametrize(
    ("mirror", "problem"),
    [
        ("absent", "404"),
        ("silent", "timed out"),
        ("abrupt", "the connection was dropped"),
        ("stalled", "ConnectionError"),
        ("corrupt", "checksum mismatch"),
    ],
)
def test_failing_mirror_is_reported_and_leaves_nothing_behind(use_mirrors, cache, mirror, problem):
    use_mirrors(mirror)
    with pytest.raises(DataError, match=rf"not be downloaded from .*/{mirror}/ \(.*{problem}.*--data") as error:
        load_mnist()
    assert "\n" not in str(error.value)
    assert files_below(cache) == []


@pytest.mark.parametrize("mirror", ["absent", "silent", "abrupt", "corrupt"])
def test_second_mirror_is_used_when_the_first_fails(use_mirrors, cache, mirror):
    use_mirrors(mirror, "good")
    assert_tiny(load_mnist())
    assert files_below(cache) == sorted(GZIP)


def test_without_network(monkeypatch, cache):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening, so connections are refused
        mirrors = [f"http://127.0.0.1:{unused.getsockname()[1]}/{name}/" for name in ("first", "second")]
        monkeypatch.setattr(data, "MIRRORS", mirrors)
        with pytest.raises(DataError, match=r"/first/ \(ConnectionError\) or .*/second/ \(ConnectionError\).*network"):
            load_mnist()
    assert files_below(cache) == []


def test_failure_is_remembered(server, use_mirrors):
    use_mirrors("absent")
    with pytest.raises(DataError) as first:
        load_mnist()
    server.requests.clear()
    with pytest.raises(DataError) as second:
        load_mnist()
    assert server.requests == []
    assert str(second.value) == str(first.value)


def test_unwritable_cache(monkeypatch, tmp_path, use_mirrors):
    use_mirrors("good")
    (tmp_path / "file").touch()
    monkeypatch.setattr(data, "cache_directory", lambda: tmp_path / "file" / "cache")  # stops even root
    with pytest.raises(
        DataError, match=rf"Cannot write to the cache directory {re.escape(str(tmp_path))}.*Make it writable"
    ):
        load_mnist()


def test_mirrors_checksums_and_shapes_are_those_of_the_real_mnist(mnist):
    assert mnist.name == "MNIST"
    assert_shapes(mnist)
    assert np.bincount(mnist.train_labels).tolist() == [
        *(5923, 6742, 5958, 6131, 5842),
        *(5421, 5918, 6265, 5851, 5949),
    ]
    assert np.count_nonzero(mnist.train_images) / mnist.train_images.size == pytest.approx(0.1912, abs=1e-4)


# digits28


@pytest.fixture(scope="module")
def digits28(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "cache_directory", lambda: tmp_path_factory.getbasetemp())
        return load_digits28()


def assert_shapes(dataset):
    assert [array.shape for array in dataset[1:]] == [(60_000, 784), (60_000,), (10_000, 784), (10_000,)]
    for array in dataset[1:]:
        assert array.dtype == np.uint8
        assert array.flags.c_contiguous
        assert not array.flags.writeable


@pytest.mark.slow
def test_digits28_resembles_mnist(digits28):
    assert digits28.name == "digits28"
    assert_shapes(digits28)
    assert 0.18 < np.count_nonzero(digits28.train_images) / digits28.train_images.size < 0.21
    images = digits28.train_images.reshape(-1, 28, 28)
    assert images.max() == 255
    assert images[:, [0, 1, -2, -1]].mean() < 1  # the margin is empty
    for labels in (digits28.train_labels, digits28.test_labels):
        assert np.bincount(labels, minlength=10).min() > 0.05 * len(labels)
        assert (np.diff(labels.astype(int)) != 0).mean() > 0.8  # shuffled


@pytest.fixture
def builds(monkeypatch):
    """Count how often digits28 is built, and build something smaller."""
    count = []

    def build():
        count.append(1)
        return TINY._replace(train_images=TINY.train_images.copy())[1:]

    monkeypatch.setattr(data, "build_digits28", build)
    return count


def assert_tiny_digits28(dataset):
    assert_tiny(dataset._replace(name="MNIST"))
    assert dataset.name == "digits28"
    assert not dataset.train_images.flags.writeable


def test_digits28_is_built_once(builds, cache):
    for _ in range(3):
        assert_tiny_digits28(load_digits28())
    assert len(builds) == 1
    assert len(files_below(cache)) == 1


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: b"", lambda content: b"junk"])
def test_damaged_digits28_is_built_again(builds, cache, damage):
    load_digits28()
    (stored,) = cache.iterdir()
    content = stored.read_bytes()
    stored.write_bytes(damage(content))
    assert_tiny_digits28(load_digits28())
    assert len(builds) == 2
    assert files_below(cache) == [stored.name]
    assert stored.stat().st_size == len(content)


def test_flipped_bit_in_cached_digits28_is_detected(builds, cache):
    load_digits28()
    (stored,) = cache.iterdir()
    content = bytearray(stored.read_bytes())
    content[content.index(TINY.train_images.tobytes()) + 1000] ^= 1
    stored.write_bytes(content)
    assert_tiny_digits28(load_digits28())
    assert len(builds) == 2


def test_changed_recipe_does_not_serve_stale_digits28(monkeypatch, builds, cache):
    load_digits28()
    monkeypatch.setattr(data, "build_digits28", lambda: TINY._replace(train_labels=TINY.train_labels[::-1])[1:])
    np.testing.assert_array_equal(load_digits28().train_labels, TINY.train_labels[::-1])
    assert len(files_below(cache)) == 2


def test_digits28_without_a_cache(monkeypatch, builds, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(data, "cache_directory", lambda: tmp_path / "file" / "cache")
    assert_tiny_digits28(load_digits28())
    assert files_below(tmp_path) == ["file"]


def test_interrupted_write_of_digits28_leaves_nothing_behind(monkeypatch, builds, cache):
    def full_disk(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    assert_tiny_digits28(load_digits28())
    assert files_below(cache) == []


# Choosing


@pytest.mark.usefixtures("builds")
def test_auto_falls_back_to_digits28_with_a_notice(server, use_mirrors, capsys):
    use_mirrors("absent")
    assert load_dataset("auto").name == "digits28"
    shown, notice = capsys.readouterr()
    assert shown == ""
    assert re.fullmatch(r"Using digits28 instead of MNIST, .*MNIST could not be downloaded.*\n", notice)
    assert load_dataset().name == "digits28"
    assert capsys.readouterr() == ("", notice)


def test_auto_prefers_mnist(folder, use_mirrors, capsys):
    assert_tiny(load_dataset("auto", folder))
    use_mirrors("good")
    assert_tiny(load_dataset("auto"))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("by_environment", [False, True])
def test_auto_does_not_replace_a_given_but_broken_mnist(monkeypatch, capsys, tmp_path, by_environment):
    if by_environment:
        monkeypatch.setenv("MNIST_DIR", str(tmp_path))
    with pytest.raises(DataError, match="is missing"):
        load_dataset("auto", None if by_environment else tmp_path)
    assert capsys.readouterr().err == ""


def test_mnist_is_never_replaced(use_mirrors, capsys):
    use_mirrors("absent")
    with pytest.raises(DataError, match="could not be downloaded"):
        load_dataset("mnist")
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("builds")
def test_digits28_by_name_ignores_mnist(folder, capsys):
    assert load_dataset("digits28", folder).name == "digits28"
    assert capsys.readouterr() == ("", "")


def test_unknown_dataset():
    with pytest.raises(DataError, match="Unknown dataset 'cifar': choose one of auto, mnist, digits28"):
        load_dataset("cifar")


def test_limited_keeps_the_first_training_images():
    assert limited(TINY, None) is TINY
    few = limited(TINY, 2)
    np.testing.assert_array_equal(few.train_images, TINY.train_images[:2])
    np.testing.assert_array_equal(few.train_labels, TINY.train_labels[:2])
    assert few.test_images is TINY.test_images
    for count in (-1, 0, 6):
        with pytest.raises(DataError, match=f"limited to {count} training images: choose 1 to 5"):
            limited(TINY, count)


# IDX files of any size


def test_idx_files_are_mapped(monkeypatch, tmp_path):
    write(tmp_path, PLAIN)
    for directory in (tmp_path, None):
        dataset = load_dataset("idx", directory)
        assert dataset.name == "idx"
        for actual, expected in zip(dataset[1:], TINY[1:], strict=True):
            assert isinstance(actual, np.memmap)
            assert not actual.flags.writeable
            np.testing.assert_array_equal(actual, expected)
        assert data.sha256(dataset) == data.sha256(TINY)
        monkeypatch.setenv("MNIST_DIR", str(tmp_path))


@pytest.mark.parametrize("count", [1, 7, 100])
def test_idx_files_may_hold_any_number_of_images(tmp_path, count):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (count, 784), np.uint8), rng.integers(0, 10, count, np.uint8)
    write_idx(tmp_path, TINY._replace(train_images=images, train_labels=labels))
    dataset = load_idx(tmp_path)
    np.testing.assert_array_equal(dataset.train_images, images)
    np.testing.assert_array_equal(dataset.train_labels, labels)


def test_sha256_covers_shapes_and_shards(monkeypatch):
    monkeypatch.setattr(data, "shard_ranges", lambda count: [slice(0, 2), slice(2, count)])
    content = b""
    for array in TINY[1:]:
        content += str(array.shape).encode() + b"".join(
            hashlib.sha256(a.tobytes()).digest() for a in (array[:2], array[2:])
        )
    assert data.sha256(TINY) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(("largest", "shape"), [(1, (28, 28)), (26, (28, 28)), (46, (7, 9)), (255, (1, 1))])
def test_idx_files_may_have_any_classes_and_size(tmp_path, largest, shape):
    rng = np.random.default_rng(0)
    write(tmp_path, PLAIN)
    for images, labels, count in ((TRAIN_IMAGES, TRAIN_LABELS, 50), (TEST_IMAGES, TEST_LABELS, 9)):
        numbers = rng.integers(0, largest + 1, count, np.uint8)
        numbers[-1] = largest
        write(tmp_path, {images: idx(rng.integers(0, 256, (count, *shape), np.uint8)), labels: idx(numbers)})
    dataset = load_idx(tmp_path)
    assert dataset.classes == largest + 1
    assert dataset.train_images.shape == (50, shape[0] * shape[1])
    assert TINY.classes == 10


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (TRAIN_IMAGES, None, "train-images-idx3-ubyte is missing or inaccessible. Copy it there"),
        (TRAIN_IMAGES, PLAIN[TRAIN_IMAGES][:-1], "truncated, 3935 bytes instead of 3936"),
        (TRAIN_IMAGES, PLAIN[TRAIN_IMAGES] + b"x", "too long"),
        (TRAIN_IMAGES, PLAIN[TRAIN_LABELS], "magic number 00000801 instead of 00000803"),
        (TEST_IMAGES, idx(np.zeros((3, 20, 20), np.uint8)), "images of 400 pixels, but 784 in training"),
        (TEST_LABELS, b"", "the file is empty"),
        (TEST_LABELS, PLAIN[TEST_LABELS][:6], "truncated inside its header of 8 bytes"),
        (TEST_LABELS, idx(np.array([], np.uint8)), "no data"),
        (TEST_LABELS, idx(np.array([1, 2], np.uint8)), "2 labels for 3 images"),
        (f"{TEST_LABELS}.gz", b"<html>", "a web page"),
        (f"{TEST_LABELS}.gz", b"version https://git-lfs", "a Git LFS pointer"),
    ],
)
def test_broken_idx_file_gives_its_name_and_the_problem(tmp_path, name, content, problem):
    write(tmp_path, {other: payload for other, payload in PLAIN.items() if other != name.removesuffix(".gz")})
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        load_idx(tmp_path)
    assert problem in str(error.value)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_compressed_idx_files_are_not_mapped(folder):
    with pytest.raises(DataError, match=rf"cannot be mapped into memory. Decompress it: gunzip \S+{TRAIN_IMAGES}.gz"):
        load_idx(folder)


def test_idx_needs_a_folder():
    with pytest.raises(DataError, match="pass --data or set MNIST_DIR"):
        load_dataset("idx")


def test_files_larger_than_mnist_suggest_idx(folder):
    write(folder, {TRAIN_IMAGES: idx(np.zeros((6, 28, 28), np.uint8))})
    with pytest.raises(DataError, match=r"longer than MNIST's .* or train on it as it is: --dataset idx"):
        load_mnist(folder)


# Wrong files and folders

PAGE = b"\n<!DOCTYPE html><title>404</title>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize("load", [load_mnist, load_idx])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "the file is empty"),
        (PAGE, "a web page"),
        (POINTER, "a Git LFS pointer, not the file itself; git lfs pull fetches it"),
        (GZIP[f"{TEST_LABELS}.gz"], f"compressed with gzip, but not named so; rename it to {TEST_LABELS}.gz"),
        (b"PK\3\4" + bytes(40), "a zip archive; unpack it"),
    ],
)
def test_files_saved_by_mistake_are_recognised(tmp_path, load, content, problem):
    write(tmp_path, {**PLAIN, TEST_LABELS: content})
    with pytest.raises(DataError) as error:
        load(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / TEST_LABELS}: {problem}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", PAGE, POINTER, gzip.compress(PAGE), gzip.compress(b"")])
def test_compressed_files_saved_by_mistake_are_recognised(folder, content):
    write(folder, {f"{TEST_LABELS}.gz": content})
    with pytest.raises(DataError, match=r"the file is empty|a web page|a Git LFS pointer"):
        load_mnist(folder)


def test_a_file_compressed_twice_is_recognised(folder):
    write(folder, {f"{TEST_LABELS}.gz": gzip.compress(GZIP[f"{TEST_LABELS}.gz"])})
    with pytest.raises(DataError, match=f"compressed twice; decompress it once: gunzip .*{TEST_LABELS}.gz$"):
        load_mnist(folder)


@pytest.mark.parametrize("tail", [b"\0" * 512, b"\r\n", b"<html>"])
def test_trailing_bytes_after_gzip_are_ignored(folder, tail):
    write(folder, {name: content + tail for name, content in GZIP.items()})
    assert_tiny(load_mnist(folder))


def test_trailing_bytes_do_not_hide_a_wrong_checksum(folder):
    other = gzip.compress(with_element(TRAIN_LABELS, 2, 5))
    write(folder, {f"{TRAIN_LABELS}.gz": other + b"tail"})
    with pytest.raises(DataError, match=r"checksum mismatch.*or train on it as it is: --dataset idx"):
        load_mnist(folder)


def test_labels_beyond_9_are_explained(folder):
    write(folder, {TRAIN_LABELS: with_element(TRAIN_LABELS, 2, 46)})
    with pytest.raises(DataError, match=r"label 46 is outside 0-9.*--dataset idx$"):
        load_mnist(folder)


@pytest.mark.parametrize("load", [load_mnist, load_idx])
def test_a_file_or_nothing_instead_of_the_folder(folder, load):
    file = folder / f"{TRAIN_IMAGES}.gz"
    with pytest.raises(DataError, match=re.escape(f"{file} is a file. Pass its folder: --data {folder}") + "$"):
        load(file)
    with pytest.raises(DataError, match=r"there is no folder .*/none: pass the one with"):
        load(folder / "none")


def test_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert_tiny(load_mnist(f"~/{folder.name}"))
    monkeypatch.setenv("MNIST_DIR", f"~/{folder.name}")
    assert_tiny(load_mnist())
    with pytest.raises(DataError, match=r"there is no folder .*: pass the one with"):
        load_mnist("~nobody-of-this-name/x")


# A dataset by itself


@pytest.mark.parametrize("count", [None, 2, 4])
def test_limiting_does_not_hide_missing_labels(count):
    with pytest.raises(DataError, match="tiny has 5 training images but 4 labels: each image needs one"):
        limited(TINY._replace(train_labels=TINY.train_labels[:4]), count)


def test_dataset_repr():
    assert repr(TINY) == "<Dataset tiny: 5 training and 3 test images of 784 pixels>"
