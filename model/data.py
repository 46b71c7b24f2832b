"""The data: MNIST, verified; digits28, a stand-in that needs no network; IDX files of any size.

MNIST's files come from outside, so nothing in them is trusted. Sizes are bounded before anything is read. The structure
is checked first, because that gives a more helpful error, and the SHA-256 last.
"""

import contextlib
import gzip
import hashlib
import inspect
import io
import math
import os
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from model.digits28 import build_digits28, vary
from model.files import write_atomically
from model.mapping import map_bytes
from model.shards import shard_ranges

Bytes: TypeAlias = NDArray[np.uint8]

DATASETS = ("auto", "mnist", "digits28", "idx")
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
TIMEOUT = (5.0, 30.0)  # seconds to connect, and to wait for the next bytes
ADVICE = f"Replace it with the original from {MIRRORS[0]}"
IDX_INSTEAD = "or train on it as it is: --dataset idx"
IDX_ADVICE = "Rewrite it in the format of MNIST's files"
DIGEST = hashlib.sha256().digest_size
HEAD_BYTES = 64
GZIP = b"\x1f\x8b"  # the first bytes of a compressed file


class File(NamedTuple):
    """One of MNIST's files: its name, its dimensions, and its checksums as served (gzip) and decompressed."""

    name: str
    shape: tuple[int, ...]
    md5_gzip: str
    sha256: str


FILES = (
    File(
        "train-images-idx3-ubyte",
        (60_000, 28, 28),
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    File(
        "train-labels-idx1-ubyte",
        (60_000,),
        "d53e105ee54ea40749a09fcbcd1e9432",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    File(
        "t10k-images-idx3-ubyte",
        (10_000, 28, 28),
        "9fb629c4189551a2d022fa330f9573f3",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    File(
        "t10k-labels-idx1-ubyte",
        (10_000,),
        "ec29112dd5afa0611ce80d1b7f02629c",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
)

# Remembered, so that only the first of several calls waits for the network to time out.
download_failure = ""


class DataError(Exception):
    """The data cannot be used; the message says in one line what is wrong and what to do."""


class Dataset(NamedTuple):
    """Images of handwritten digits with their labels; all arrays are read-only.

    Attributes
    ----------
    name : str
        ``"MNIST"``, ``"digits28"`` or ``"idx"``.
    train_images, test_images : uint8 arrays of shape (60000, 784) and (10000, 784)
        One image of 28 x 28 pixels per row; 0 is background, 255 is ink.
    train_labels, test_labels : uint8 arrays of shape (60000,) and (10000,)
        The digits, 0 to 9.

    With ``"idx"``, they are memory maps, with any number of images of any size, and labels from 0 to 255.
    """

    name: str
    train_images: Bytes
    train_labels: Bytes
    test_images: Bytes
    test_labels: Bytes

    @property
    def classes(self) -> int:
        """Ten for digits; for ``"idx"``, the largest label plus one, so that a label is the index of its class."""
        return 1 + int(max(self.train_labels.max(), self.test_labels.max())) if self.name == "idx" else 10

    def __repr__(self) -> str:
        counts = f"{len(self.train_images):,} training and {len(self.test_images):,} test images"
        return f"<Dataset {self.name}: {counts} of {'×'.join(map(str, np.shape(self.train_images)[1:]))} pixels>"


def load_dataset(name: str = "auto", directory: str | os.PathLike[str] | None = None) -> Dataset:
    """Load a dataset by name.

    Parameters
    ----------
    name : str
        ``"mnist"``, ``"digits28"``, ``"idx"``, or ``"auto"``: MNIST if available, else digits28, with a line on stderr.
    directory : path, optional
        Where the files are, see `load_mnist` and `load_idx`.

    Returns
    -------
    Dataset

    Raises
    ------
    DataError
        If the name is unknown or the data cannot be loaded. With ``"auto"``, the latter is an error only if `directory`
        or the environment variable ``MNIST_DIR`` is given: whoever gives a folder wants MNIST.
    """
    if name not in DATASETS:
        raise DataError(f"Unknown dataset {name!r}: choose one of {', '.join(DATASETS)}")
    if name == "digits28":
        return load_digits28()
    if name == "idx":
        return load_idx(directory)
    try:
        return load_mnist(directory)
    except DataError as error:
        if name == "mnist" or _given_directory(directory):
            raise
        print(f"Using digits28 instead of MNIST, so accuracies will differ. {error}", file=sys.stderr)
        return load_digits28()


def load_mnist(directory: str | os.PathLike[str] | None = None) -> Dataset:
    """Load MNIST from a directory or, if none is given, from the user's cache, after downloading what is missing.

    Parameters
    ----------
    directory : path, optional
        Where the four files are, plain or as ``.gz``, named like ``train-images-idx3-ubyte`` or
        ``train-images.idx3-ubyte``. Defaults to the environment variable ``MNIST_DIR``.

    Returns
    -------
    Dataset

    Raises
    ------
    DataError
        If a file is missing or is not MNIST's, if no mirror works, or if the cache cannot be written. If a given
        directory lacks a file, nothing is downloaded in its place.
    """
    source = _given_directory(directory)
    if source is None:
        source = cache_directory()
        _download(source)
    return Dataset("MNIST", *_read_pair(source, *FILES[:2]), *_read_pair(source, *FILES[2:]))


def load_idx(directory: str | os.PathLike[str] | None = None) -> Dataset:
    """Open any number of images and labels, in the format of MNIST's files, as memory maps: nothing is read yet.

    Parameters
    ----------
    directory : path, optional
        Where the four files are, not compressed, named like MNIST's, see `load_mnist`. Defaults to the environment
        variable ``MNIST_DIR``.

    Returns
    -------
    Dataset

    Raises
    ------
    DataError
        If no directory is given, or a file is missing, compressed or invalid.
    """
    source = _given_directory(directory)
    if source is None:
        raise DataError("No folder with IDX files is given: pass --data or set MNIST_DIR")
    arrays: list[Bytes] = []
    for images_file, labels_file in (FILES[:2], FILES[2:]):
        images_path, images = _map(source, images_file)
        labels_path, labels = _map(source, labels_file)
        _check_counts(images, labels_path, labels, IDX_ADVICE)
        if arrays and images[0].size != arrays[0].shape[1]:
            raise DataError(
                f"{images_path}: images of {images[0].size} pixels, but {arrays[0].shape[1]} in training. {IDX_ADVICE}"
            )
        arrays += [images.reshape(len(images), -1), labels]
    return Dataset("idx", *arrays)


def limited(dataset: Dataset, count: int | None) -> Dataset:
    """Keep only the first `count` training images and their labels; None keeps all.

    Parameters
    ----------
    dataset : Dataset
    count : int, optional
        From 1 to the number of training images.

    Returns
    -------
    Dataset
        The training arrays are views; all test images are kept.

    Raises
    ------
    DataError
        If there are fewer than `count` training images, `count` is not positive, or labels are missing.
    """
    images, labels = len(dataset.train_images), len(dataset.train_labels)
    if images != labels:  # the views would hide the difference
        raise DataError(f"{dataset.name} has {images} training images but {labels} labels: each image needs one")
    if count is None:
        return dataset
    if not 1 <= count <= images:
        raise DataError(f"{dataset.name} cannot be limited to {count} training images: choose 1 to {images}")
    return dataset._replace(train_images=dataset.train_images[:count], train_labels=dataset.train_labels[:count])


def digests(array: Bytes) -> bytes:
    """Return the concatenated SHA-256 of each shard, 32 bytes each; the array may be larger than memory."""
    return b"".join(shard_digest(array[rows]) for rows in shard_ranges(len(array)))


def sha256(dataset: Dataset, digests_of: Callable[[Bytes], bytes] = digests) -> str:
    """Return the SHA-256, in hexadecimal, over the shapes of all arrays and the SHA-256 of each of their shards.

    Parameters
    ----------
    dataset : Dataset
    digests_of : callable, optional
        Replacement for `digests`, to hash on the workers of a cluster.
    """
    digest = hashlib.sha256()
    for array in dataset[1:]:
        digest.update(str(array.shape).encode())
        digest.update(digests_of(array))
    return digest.hexdigest()


def shard_digest(rows: Bytes) -> bytes:
    """Return the SHA-256 of some images or labels."""
    return hashlib.sha256(np.ascontiguousarray(rows).data).digest()


def cache_directory() -> Path:
    """Return the user's cache directory, by the platform's convention, for downloads and digits28."""
    from pooch import os_cache

    return Path(os_cache("vectorization-study"))


def _given_directory(directory: str | os.PathLike[str] | None) -> Path | None:
    given = directory or os.environ.get("MNIST_DIR")
    return Path(os.path.expanduser(given)) if given else None


def _download(cache: Path) -> None:
    """Download the files that are missing or damaged in `cache`; pooch stores only what passes its checksum."""
    import pooch  # these take a fifteenth of a second to import, and are needed only once
    import requests

    global download_failure
    if download_failure:
        raise DataError(download_failure)
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=TIMEOUT)
    failures = []
    for mirror in MIRRORS:
        try:
            for file in FILES:
                name = f"{file.name}.gz"
                pooch.retrieve(mirror + name, f"md5:{file.md5_gzip}", name, cache, downloader=downloader)
            return
        except requests.HTTPError as error:
            reason = str(error)
        except requests.Timeout:
            reason = "timed out"
        except requests.exceptions.ChunkedEncodingError:
            reason = "the connection was dropped"
        except requests.RequestException as error:
            reason = type(error).__name__
        except ValueError:
            reason = "checksum mismatch"
        except OSError as error:
            raise DataError(
                f"Cannot write to the cache directory {cache} ({error}). Make it writable,"
                " or set --data or MNIST_DIR to a folder with MNIST's files"
            ) from error
        failures.append(f"{mirror} ({reason})")
    download_failure = (
        f"MNIST could not be downloaded from {' or '.join(failures)}. Check the network,"
        " set --data or MNIST_DIR to a folder with MNIST's files, or use --dataset digits28"
    )
    raise DataError(download_failure)


def _read_pair(directory: Path, images_file: File, labels_file: File) -> tuple[Bytes, Bytes]:
    """Read and verify the images, as rows of pixels, and the labels that belong to them."""
    images_path, images_payload = _read(directory, images_file)
    labels_path, labels_payload = _read(directory, labels_file)
    images = parse_idx(images_payload, 3, str(images_path))
    labels = parse_idx(labels_payload, 1, str(labels_path))
    _check_pair(images_path, images, labels_path, labels)
    for file, path, payload in (
        (images_file, images_path, images_payload),
        (labels_file, labels_path, labels_payload),
    ):
        if hashlib.sha256(payload).hexdigest() != file.sha256:
            raise DataError(f"{path}: checksum mismatch, the content is not MNIST's. {ADVICE}, {IDX_INSTEAD}")
    return images.reshape(len(images), -1), labels


def _check_pair(images_path: Path, images: Bytes, labels_path: Path, labels: Bytes) -> None:
    """Raise a DataError unless these are images of 28 x 28 pixels with one digit each."""
    if images.shape[1:] != (28, 28):
        size = " x ".join(map(str, images.shape[1:]))
        raise DataError(f"{images_path}: images of {size} pixels, not 28 x 28. {ADVICE}, {IDX_INSTEAD}")
    _check_counts(images, labels_path, labels, ADVICE)
    if labels.max() > 9:
        problem = f"label {labels.max()} is outside 0-9, MNIST's classes"
        raise DataError(f"{labels_path}: {problem}. {ADVICE}, {IDX_INSTEAD}")


def _check_counts(images: Bytes, labels_path: Path, labels: Bytes, advice: str) -> None:
    if len(images) != len(labels):
        raise DataError(f"{labels_path}: {len(labels)} labels for {len(images)} images. {advice}")


def _find(directory: Path, file: File) -> Path | None:
    """The path of the file under any of its usual names; None if there is none."""
    _check_folder(directory)
    stems = file.name, file.name.replace("-idx", ".idx")
    paths = [directory / (stem + suffix) for suffix in ("", ".gz") for stem in stems]
    return next((path for path in paths if os.path.isfile(path)), None)  # Path.is_file may raise OSError


def _check_folder(directory: Path) -> None:
    """Raise a DataError if there is no such folder, or it is a file."""
    if os.path.isfile(directory):
        raise DataError(f"{directory} is a file. Pass its folder: --data {directory.absolute().parent}")
    if not os.path.isdir(directory):
        raise DataError(f"there is no folder {directory}: pass the one with the four files")


def _check_head(path: Path, head: bytes, advice: str, compressed: bool = False) -> None:
    """Raise a DataError if the file starts like one that is often saved in its place by mistake."""
    if not head:
        raise DataError(f"{path}: the file is empty. {advice}")
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{path}: a Git LFS pointer, not the file itself; git lfs pull fetches it. {advice}")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise DataError(f"{path}: a web page (HTML or XML), as servers send in place of a missing file. {advice}")
    if head.startswith(b"PK\3\4"):
        raise DataError(f"{path}: a zip archive; unpack it. {advice}")
    if head.startswith(GZIP) and not compressed:
        raise DataError(f"{path}: compressed with gzip, but not named so; rename it to {path.name}.gz. {advice}")


def _map(directory: Path, file: File) -> tuple[Path, Bytes]:
    """Find a file; return its path and a memory map of its content after the header."""
    path = _find(directory, file)
    if path is None:
        raise DataError(f"{directory}: {file.name} is missing or inaccessible. Copy it there")
    ndim, compressed = len(file.shape), path.suffix == ".gz"
    try:
        with path.open("rb") as stream:
            header = stream.read(HEAD_BYTES)
        _check_head(path, header, IDX_ADVICE, compressed)
        if compressed:
            raise DataError(f"{path}: a compressed file cannot be mapped into memory. Decompress it: gunzip {path}")
        header = header[: 4 + 4 * ndim]
        shape = _idx_shape(header, path.stat().st_size, ndim, str(path), IDX_ADVICE)
        return path, map_bytes(path, len(header), shape)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}). {IDX_ADVICE}") from error


def _read(directory: Path, file: File) -> tuple[Path, bytes]:
    """Find a file under any of its usual names; return its path and its decompressed content."""
    path = _find(directory, file)
    if path is None:
        raise DataError(
            f"{directory}: {file.name} is missing or inaccessible, plain or as .gz."
            f" Put the original from {MIRRORS[0]} there"
        )
    size = 4 + 4 * len(file.shape) + math.prod(file.shape)
    try:
        with path.open("rb") as raw:
            compressed = path.suffix == ".gz"
            _check_head(path, raw.read(HEAD_BYTES), ADVICE, compressed)
            raw.seek(0)
            with gzip.open(raw) if compressed else contextlib.nullcontext(raw) as stream:
                payload = stream.read(size)  # a few kilobytes of gzip can expand to gigabytes
                with contextlib.suppress(gzip.BadGzipFile):  # trailing bytes: the checksum decides
                    payload += stream.read(1)
            if payload.startswith(GZIP):
                raise DataError(f"{path}: compressed twice; decompress it once: gunzip {path}")
            _check_head(path, payload[:HEAD_BYTES], ADVICE)
    except EOFError as error:
        raise DataError(f"{path}: truncated, the gzip stream ends early. {ADVICE}") from error
    except (OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}). {ADVICE}") from error
    if len(payload) > size:
        raise DataError(f"{path}: longer than MNIST's {size} bytes. {ADVICE}, {IDX_INSTEAD}")
    return path, payload


def parse_idx(payload: bytes, ndim: int, source: str) -> Bytes:
    """Interpret the content of an IDX file of unsigned bytes, without a copy.

    Parameters
    ----------
    payload : bytes
        The file: a magic number (two zero bytes, 8 for unsigned bytes, the number of dimensions), each
        dimension as a big-endian 32-bit integer, then the elements in row-major order.
    ndim : int
        The number of dimensions to expect: 3 for images, 1 for labels.
    source : str
        Name of the file in error messages.

    Returns
    -------
    uint8 array with `ndim` dimensions
        A read-only view of `payload`, not empty.

    Raises
    ------
    DataError
        If the magic number is wrong, or the length does not match the dimensions.
    """
    shape = _idx_shape(payload[: 4 + 4 * ndim], len(payload), ndim, source, ADVICE)
    return np.frombuffer(payload, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def _idx_shape(header: bytes, length: int, ndim: int, source: str, advice: str) -> tuple[int, ...]:
    """The dimensions of an IDX file of `length` bytes, from its first bytes."""
    magic, size = bytes((0, 0, 8, ndim)), 4 + 4 * ndim
    if header[:4] != magic:
        raise DataError(f"{source}: magic number {header[:4].hex()} instead of {magic.hex()}. {advice}")
    if len(header) < size:
        raise DataError(f"{source}: truncated inside its header of {size} bytes. {advice}")
    shape = struct.unpack_from(f">{ndim}I", header, 4)
    expected = size + math.prod(shape)  # Python integers, so hostile dimensions cannot overflow
    if expected == size:
        raise DataError(f"{source}: no data, its dimensions are {shape}. {advice}")
    if length != expected:
        kind = "truncated" if length < expected else "too long"
        raise DataError(f"{source}: {kind}, {length} bytes instead of {expected}. {advice}")
    return shape


def load_digits28() -> Dataset:
    """Load digits28, a stand-in that needs no network, with MNIST's shapes and about its sparsity.

    The 1797 handwritten digits of 8 x 8 pixels that come with scikit-learn are prepared like MNIST (scaled to 20 x 20
    pixels, centred in 28 x 28 by their centre of mass) and augmented by small shifts, rotations and scalings to 60,000
    and 10,000 images. No original is used for both training and test. The result is deterministic. It takes a few
    seconds to make, and is kept in the user's cache if possible.

    Returns
    -------
    Dataset
    """
    # The file's name has a hash of the source that makes the data, so that data made by other code is never used.
    recipe = inspect.getsource(build_digits28) + inspect.getsource(vary)
    path = cache_directory() / f"digits28-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.npz"
    try:
        with path.open("rb") as stream, np.load(stream) as stored:
            dataset = Dataset("digits28", *(stored[field] for field in Dataset._fields[1:]))
    except Exception:  # missing, or damaged in any way: build it again
        dataset = Dataset("digits28", *build_digits28())
        with contextlib.suppress(OSError):  # without a cache, it is built again next time
            _store(dataset, path)
    for array in dataset[1:]:
        array.setflags(write=False)
    return dataset


def _store(dataset: Dataset, path: Path) -> None:
    """Write the dataset as .npz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    np.savez(stream, **dataset._asdict())
    write_atomically(path, stream.getvalue())
