"""Checkpoints: a training run in one safetensors file, from which it resumes with the same bits.

The tensors are the parameters and the history. The rest of the run's state is in the metadata, as JSON, with a checksum
over everything. Nothing in a file is trusted, and loading one runs no code from it. Sizes are bounded before anything
is read. Structure and values are checked first, because that gives a more helpful error, and the checksum last.
"""

import hashlib
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from model.files import write_atomically
from model.mlp import MLP
from model.training import Epoch, History, State

FORMAT = "vectorization-study checkpoint 2"
MAX_BYTES = 2**28
MAX_HEADER_BYTES = 2**16

DTYPES = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}

# The values in the metadata by type, besides the layer sizes and the RNG state.
TEXTS = {"backend", "dataset", "data_sha256"}
COUNTS = {"limit", "hidden", "batch_size", "seed", "epochs", "eval_every", "epochs_done", "steps", "correct"}
AMOUNTS = {"learning_rate", "prepare_seconds", "loss", "seconds"}
OPTIONAL = {"limit", "batch_size"}


class CheckpointError(Exception):
    """A checkpoint cannot be read or written; the message says in one line what is wrong."""


class Config(NamedTuple):
    """The settings of a run, as `python -m model train` takes them."""

    backend: str
    dataset: str
    data_sha256: str
    """`model.data.sha256` of the whole data set."""
    limit: int | None
    hidden: int
    learning_rate: float
    batch_size: int | None
    seed: int
    epochs: int
    eval_every: int


class Checkpoint(NamedTuple):
    """A training run between two steps."""

    mlp: MLP
    state: State
    config: Config


def save(file: Path, mlp: MLP, state: State, config: Config) -> None:
    """Write a checkpoint atomically.

    Parameters
    ----------
    file
        The file to write; replaced if it exists.
    mlp, state
        The network, with float32 parameters in any layout, and the state that `train` passes to `on_step`.
    config
        The settings of the run.

    Raises
    ------
    CheckpointError
        If `load` would reject it, for example because a parameter is not finite or is float64. The file is then
        unchanged.
    OSError
        If the file cannot be written, or another process is writing it. The file is then unchanged.
    """
    try:
        content = _content(mlp, state, config)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"cannot save {file}: {error}") from error
    write_atomically(file, content)


def load(file: Path) -> Checkpoint:
    """Read a checkpoint.

    Parameters
    ----------
    file
        A file that `save` wrote.

    Returns
    -------
    Checkpoint

    Raises
    ------
    CheckpointError
        If the file is missing, damaged, or not a checkpoint. Memory is bounded by a few times the actual file size,
        which is limited to 256 MiB.
    """
    try:
        _require(file.is_file(), "there is no such file")
        _require(file.stat().st_size <= MAX_BYTES, f"it is larger than the limit of {MAX_BYTES:,} bytes")
        return _read(file)
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is damaged or not a checkpoint ({error}); pass a file written by --checkpoint"
        ) from error
    except (ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error  # an OSError's text repeats the name
        raise CheckpointError(
            f"cannot use the checkpoint {file}: {reason}; pass a file written by --checkpoint"
        ) from error


def check_same(saved: Config, config: Config) -> None:
    """Raise a CheckpointError that lists the differences if `config` and `saved` differ in more than `epochs`."""
    differences = [
        f"{name} {theirs!r}, not {ours!r}"
        for name, theirs, ours in zip(Config._fields, saved, config)
        if theirs != ours and name != "epochs"
    ]
    if differences:
        raise CheckpointError(
            f"the checkpoint belongs to another run; resume it with its own settings: {'; '.join(differences)}"
        )


def _read(file: Path) -> Checkpoint:
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
    _require(header_bytes <= MAX_HEADER_BYTES, "it is damaged or not a checkpoint")
    with safe_open(file, framework="np") as stored:
        texts = stored.metadata() or {}
        _require(set(texts) == {"format", "run", "sha256"}, "it is damaged or not a checkpoint")
        _require(texts["format"] == FORMAT, f"its format is not {FORMAT!r}")
        values = _parse(texts["run"])
        _check_values(values)
        slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118  no dictionary
        declared = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        _require(declared == _expected(values), "its tensors are not those of the run in its metadata")
        tensors = {name: stored.get_tensor(name) for name in declared}
    _check_tensors(tensors)
    _require(texts.pop("sha256") == checksum(tensors, texts), "its checksum does not match: the file is damaged")
    mlp = MLP(values["layer_sizes"])
    for name, parameter in _named(mlp).items():
        parameter[...] = tensors[name]
    history = History(values["prepare_seconds"], _epochs(tensors["history"]))
    state = State(history=history, **{name: values[name] for name in ("rng", "steps", "loss", "correct", "seconds")})
    return Checkpoint(mlp, state, Config(**{name: values[name] for name in Config._fields}))


def _content(mlp: MLP, state: State, config: Config) -> bytes:
    """The bytes of a checkpoint; raises a ValueError or TypeError if `_read` would reject it."""
    run = json.dumps(_values(mlp, state, config), default=_plain)
    values = json.loads(run)
    _check_values(values)
    tensors = {name: _in_order(tensor) for name, tensor in {**_named(mlp), "history": _table(state.history)}.items()}
    for name, (dtype, shape) in _expected(values).items():
        _require(tensors[name].dtype == DTYPES[dtype], f"{name} is {tensors[name].dtype}, not {DTYPES[dtype]}")
        _require(tensors[name].shape == shape, f"{name} has shape {tensors[name].shape}, not {shape}")
    _check_tensors(tensors)
    texts = {"format": FORMAT, "run": run}
    content = safetensors.numpy.save(tensors, {**texts, "sha256": checksum(tensors, texts)})
    _require(len(content) <= MAX_BYTES, f"it takes more than the limit of {MAX_BYTES:,} bytes")
    header_bytes = int.from_bytes(content[:8], "little")
    _require(header_bytes <= MAX_HEADER_BYTES, f"its settings take more than the limit of {MAX_HEADER_BYTES:,} bytes")
    return content


def _plain(value: Any) -> Any:
    """Convert a NumPy scalar to a Python number, for JSON."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a checkpoint cannot hold {value!r}, of type {type(value).__name__}")


def _in_order(tensor: NDArray) -> NDArray:
    """The same values, row-major and little-endian as in the file, from any layout."""
    return np.ascontiguousarray(tensor, np.asarray(tensor).dtype.newbyteorder("<"))


def _values(mlp: MLP, state: State, config: Config) -> dict[str, Any]:
    """All state that is not in a tensor, ready for JSON."""
    return {
        **config._asdict(),
        "layer_sizes": [len(mlp.layers[0][0]), *(len(bias) for _, bias in mlp.layers)],
        "rng": state.rng,
        "epochs_done": len(state.history.epochs),
        "prepare_seconds": state.history.prepare_seconds,
        "steps": state.steps,
        "loss": float(state.loss),
        "correct": int(state.correct),
        "seconds": state.seconds,
    }


def _named(mlp: MLP) -> dict[str, NDArray]:
    """The parameters, by their names in the file."""
    return {
        f"layers.{index}.{kind}": parameter
        for index, layer in enumerate(mlp.layers)
        for kind, parameter in zip(("weights", "bias"), layer)
    }


def _expected(values: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Data type and shape of every tensor in the file, by name."""
    expected: dict[str, tuple[str, tuple[int, ...]]] = {"history": ("F64", (values["epochs_done"], 4))}
    for index, (inputs, outputs) in enumerate(itertools.pairwise(values["layer_sizes"])):
        expected[f"layers.{index}.weights"] = "F32", (inputs, outputs)
        expected[f"layers.{index}.bias"] = "F32", (outputs,)
    return expected


def _table(history: History) -> NDArray[np.float64]:
    """Loss, both accuracies and seconds of each epoch, (epochs, 4); NaN where an accuracy is None."""
    return np.array([epoch[1:] for epoch in history.epochs], np.float64).reshape(-1, 4)


def _epochs(table: NDArray[np.float64]) -> list[Epoch]:
    """The inverse of `_table`."""
    return [
        Epoch(epoch, loss, train, None if math.isnan(test) else test, seconds)
        for epoch, (loss, train, test, seconds) in enumerate(table.tolist(), start=1)
    ]


def checksum(tensors: dict[str, NDArray], texts: dict[str, str]) -> str:
    """The SHA-256, in hexadecimal, over the tensors and the other metadata of a checkpoint."""
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("its metadata is damaged") from error


def _check_values(values: Any) -> None:
    """Raise a ValueError unless all that `_values` returns is there, with values that a run could have."""
    names = TEXTS | COUNTS | AMOUNTS | {"layer_sizes", "rng"}
    _require(isinstance(values, dict) and set(values) == names, "its metadata is incomplete")
    for name, value in values.items():
        if name in TEXTS:
            _require(isinstance(value, str), f"its {name} is not a string")
        elif name in COUNTS and not (value is None and name in OPTIONAL):
            _require(_is_count(value), f"its {name} is not a whole number from 0 to 2⁶³ - 1")
        elif name in AMOUNTS:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            _require(is_number and 0 <= value <= sys.float_info.max, f"its {name} is not a finite number")
    sizes = values["layer_sizes"]
    plausible = isinstance(sizes, list) and len(sizes) > 1 and all(_is_count(size) and size > 0 for size in sizes)
    _require(plausible and sizes[1] == values["hidden"], "its layer sizes are not those of a network")
    bit_generator = np.random.default_rng().bit_generator
    try:
        bit_generator.state = values["rng"]
    except Exception as error:  # of many types
        raise ValueError("its RNG state is damaged, or from another version of NumPy") from error
    _require(bit_generator.state == values["rng"], "its RNG state is damaged")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _check_tensors(tensors: dict[str, NDArray]) -> None:
    """Raise a ValueError unless every tensor has values that a run could have."""
    for name, tensor in tensors.items():
        if name != "history":
            _require(bool(np.isfinite(tensor).all()), f"{name} is not finite")
    loss, train, test, seconds = tensors["history"].T
    amounts, accuracies = np.stack([loss, seconds]), np.concatenate([train, test[~np.isnan(test)]])
    plausible = np.all((amounts >= 0) & (amounts < np.inf)) and np.all((accuracies >= 0) & (accuracies <= 1))
    _require(bool(plausible), "its history is implausible")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)
