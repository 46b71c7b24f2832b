"""Hostile input: random mutants of valid files, for everything that reads files from outside.

Each mutant must either be refused, with the reader's exception and a one-line message, or give a result that keeps the
reader's promises. Any other exception, too much memory or too much time is a finding. Mutants are numbered, and each
depends only on the seed and its number, so a finding can be repeated.
"""

import faulthandler
import gzip
import json
import math
import os
import struct
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from random import Random
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import safetensors.numpy
from safetensors import safe_open

from model import data
from model.data import DataError, load_mnist, parse_idx
from model.extras import checkpoint
from model.extras.checkpoint import CheckpointError, Config, load, save
from model.extras.picture import PictureError
from model.mlp import MLP
from model.training import Epoch, History, State
from tests.support.idx import GZIP, PLAIN, TINY_FILES, TRAIN_IMAGES, assert_tiny, idx, write
from tests.support.pictures import JPEGS, PICTURES, assert_prepared, png_chunk, prepared
from tests.support.runs import assert_same

ODD_VALUES = [None, True, "9", [], {}, [3, 2], [1] * 9999, [2**62, 4], -1, 0, 0.5, 2**63, 10**400, math.inf, math.nan]
SECONDS = 20  # for one input, which usually takes a hundredth of a second
SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # files in memory are faster
SMALL, LARGE = 8_000_000, 500_000_000  # bytes; Python itself asks for a megabyte at a time


# Mutants ------------------------------------------------------------------------------------------------------------


def mutated(content: bytes, others: list[bytes], random: Random) -> bytes:
    """Apply one to four mutations to the content of a file, half of them near its beginning."""
    for _ in range(random.randrange(1, 5)):
        at = random.randrange(min(len(content), random.choice([32, len(content)])) + 1)
        content = random.choice(MUTATIONS)(content, at, others, random)
    return content


def with_flipped_bit(content, at, others, random):
    return content[:at] + bytes(byte ^ 1 << random.randrange(8) for byte in content[at : at + 1]) + content[at + 1 :]


def with_number(content, at, others, random):
    """Overwrite a number, such as a length: with a limit, a value next to one, or any value."""
    size = random.choice([1, 2, 4, 8])
    number = random.choice([0, 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1, random.getrandbits(8 * size)])
    number = max(0, min(2 ** (8 * size) - 1, number + random.randrange(-1, 2)))
    return content[:at] + number.to_bytes(size, random.choice(["big", "little"])) + content[at + size :]


def truncated(content, at, others, random):
    return content[:at]


def shortened(content, at, others, random):
    return content[:at] + content[at + random.randrange(1, 100) :]


def with_repetition(content, at, others, random):
    return content[:at] + content[max(0, at - random.randrange(1, 100)) :]


def with_noise(content, at, others, random):
    noise = bytes(random.randrange(256) for _ in range(random.randrange(1, 20)))
    return content[:at] + noise + content[at + random.choice([0, len(noise)]) :]


def spliced(content, at, others, random):
    other = random.choice(others)
    return content[:at] + other[random.randrange(len(other) + 1) :]


MUTATIONS = [with_flipped_bit, with_number, truncated, shortened, with_repetition, with_noise, spliced]


# Readers -------------------------------------------------------------------------------------------------------------


class Reader(NamedTuple):
    """Code that reads untrusted files."""

    mutant: Callable[[Random], bytes]
    read: Callable[[bytes], None]
    """Reads the content and checks the promises about the result."""
    error: type[Exception]
    memory: int
    """Maximum bytes that it may allocate."""
    share: int
    """Share of the inputs, in percent."""


@cache
def folder() -> Path:
    """The folder, one per process, for the files to read."""
    folder.keep = tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", SCRATCH))  # type: ignore[attr-defined]  it goes with the process
    return Path(folder.keep.name)  # type: ignore[attr-defined]


def idx_mutant(random):
    samples = [PLAIN[file.name] for file in TINY_FILES]
    return mutated(random.choice(samples), samples, random)


def read_idx(content):
    ndim = 1 if content[3:4] == b"\1" else 3
    array = parse_idx(content, ndim, "file")
    assert (array.ndim, array.dtype, array.flags.writeable) == (ndim, np.uint8, False)
    assert idx(array) == content


def gzip_mutant(random):
    """Mutate the compressed file, or its content."""
    samples = list(GZIP.values())
    if random.randrange(2):
        return mutated(GZIP[f"{TRAIN_IMAGES}.gz"], samples, random)
    return gzip.compress(mutated(PLAIN[TRAIN_IMAGES], list(PLAIN.values()), random), 1)


def read_mnist(content):
    """The checksum accepts only the original."""
    if not (folder() / f"{TRAIN_IMAGES}.gz").exists():
        write(folder(), GZIP)
    write(folder(), {f"{TRAIN_IMAGES}.gz": content})
    with patch.object(data, "FILES", TINY_FILES):
        assert_tiny(load_mnist(folder()))


@cache
def checkpoints() -> list[tuple[dict, dict, bytes]]:
    """Metadata, tensors and content of some checkpoints."""
    files = []
    for layer_sizes, batch_size, epochs in (((4, 3, 2), None, 3), ((5, 2), 7, 0), ((3, 2, 2, 4), 1, 12)):
        config = Config("numpy", "MNIST", "0" * 64, 600, layer_sizes[1], 0.3, batch_size, 0, 20, 1)
        history = History(0.5, [Epoch(n, 2.3 / n, 0.5, 0.6 if n % 2 else None, 0.05) for n in range(1, epochs + 1)])
        state = State(State.start(0).rng, history, 2, 4.6, 30, 0.01)
        file = folder() / "original"
        save(file, MLP(layer_sizes), state, config)
        content = file.read_bytes()
        with safe_open(file, framework="np") as stored:
            files.append((stored.metadata(), safetensors.numpy.load(content), in_order(content)))
    return files


def in_order(content: bytes) -> bytes:
    """The same file with a sorted header, as safetensors writes the metadata in a different order each time."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True).encode()
    return len(header).to_bytes(8, "little") + header + content[end:]


def checkpoint_mutant(random):
    """Mutate the file, or a part of it with a matching checksum."""
    texts, tensors, content = random.choice(checkpoints())
    if random.randrange(2):
        return mutated(content, [content for _, _, content in checkpoints()], random)
    texts, tensors = dict(texts), dict(tensors)
    kind = random.randrange(3)
    if kind == 0:
        name = random.choice(["format", "run", "run", "run"])
        parts = [text.encode() for other, _, _ in checkpoints() for _, text in sorted(other.items())]
        texts[name] = mutated(texts[name].encode(), parts, random).decode(errors="replace")
    elif kind == 1:
        values = json.loads(texts["run"])
        values[random.choice(sorted(values))] = random.choice(ODD_VALUES)
        texts["run"] = json.dumps(values)
    else:
        name = random.choice(sorted(tensors))
        values = mutated(tensors[name].tobytes(), [content], random)
        dtype = random.choice([np.float32, np.float64, np.float16, np.uint8])
        values = np.frombuffer(values[: len(values) // 8 * 8], dtype)
        same_shape = values.size >= tensors[name].size
        tensors[name] = values[: tensors[name].size].reshape(tensors[name].shape) if same_shape else values
    texts["sha256"] = checkpoint.checksum(tensors, {key: text for key, text in texts.items() if key != "sha256"})
    return in_order(safetensors.numpy.save(tensors, texts))


def read_checkpoint(content):
    file, again = folder() / "checkpoint", folder() / "again"
    file.write_bytes(content)
    run = load(file)
    assert all(np.isfinite(parameter).all() for parameter in run.mlp.parameters)
    assert all(math.isfinite(amount) for amount in (run.config.learning_rate, run.state.loss, run.state.seconds))
    np.random.default_rng().bit_generator.state = run.state.rng
    save(again, *run)
    assert_same(load(again), run)


def picture_mutant(random):
    """Mutate the file, or the chunks of a PNG with matching checksums."""
    pngs, jpegs = list(PICTURES.values()), list(JPEGS.values())
    if random.randrange(2):
        return mutated(random.choice(pngs + jpegs), pngs + jpegs, random)
    content = random.choice(pngs)
    chunks = png_chunks(content)
    changed = random.randrange(len(chunks))
    chunks[changed] = (chunks[changed][0], mutated(chunks[changed][1], [body for _, body in chunks], random))
    if random.randrange(4) == 0:
        chunks.insert(random.randrange(len(chunks)), random.choice(png_chunks(random.choice(pngs))))
    return content[:8] + b"".join(png_chunk(kind, body) for kind, body in chunks)


def png_chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    """Kind and content of each chunk of a PNG file."""
    chunks, at = [], 8
    while at < len(content):
        (size,) = struct.unpack_from(">I", content, at)
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += size + 12
    return chunks


def read_a_picture(content):
    assert_prepared(prepared(content))


READERS = {
    "idx": Reader(idx_mutant, read_idx, DataError, SMALL, 40),
    "mnist": Reader(gzip_mutant, read_mnist, DataError, SMALL, 10),
    "checkpoint": Reader(checkpoint_mutant, read_checkpoint, CheckpointError, SMALL, 25),
    "picture": Reader(picture_mutant, read_a_picture, PictureError, LARGE, 25),
}


# Running them -------------------------------------------------------------------------------------------------------


def outcome(reader: Reader, content: bytes) -> str:
    """Return "accepted" or "refused", or raise any other exception."""
    message = ""
    try:
        reader.read(content)
    except reader.error as error:
        message = str(error)
    assert "\n" not in message
    return "refused" if message else "accepted"


@contextmanager
def little_memory(size: int) -> Iterator[None]:
    """Limit the additional memory of this process, where /proc shows how much it has."""
    statistics = Path("/proc/self/statm")
    if not statistics.exists():
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(statistics.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def try_inputs(name: str, seed: int, numbers: range) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Counts of the outcomes, and the findings, each with a command to repeat it."""
    reader, outcomes, findings = READERS[name], Counter[tuple[str, str]](), []
    for number in numbers:
        content = reader.mutant(Random(f"{seed} {name} {number}"))
        (folder() / "running").write_text(f"{name}:{number}")
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            with little_memory(reader.memory):
                outcomes[name, outcome(reader, content)] += 1
        except Exception:
            outcomes[name, "finding"] += 1
            findings.append(f"{traceback.format_exc()}repeat it with --seed {seed} --repeat {name}:{number}\n")
        finally:
            faulthandler.cancel_dump_traceback_later()
    return outcomes, findings
