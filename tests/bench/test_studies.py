"""The studies count, scale up and draw correctly, regardless of the timings."""

import math
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from bench import commands
from bench.measure.records import Comparison, Rounds
from bench.peers import competitor
from bench.peers.task import UnavailableError
from bench.publish import style
from bench.studies import break_even, kernels, ladder, products, roofline, scaling, workers
from kernels import get_backend, simd
from kernels.numpy_backend import NumpyBackend
from model import published
from model.data import DataError, limited, load_idx
from model.mlp import MLP
from model.shards import SHARD
from model.threads import thread_pool
from model.training import train


def test_shifted_copies_keep_their_labels_and_non_zeros(digits28):
    few = limited(digits28, 40)
    many = scaling.shifted(few, 1_000)
    assert many.train_images.shape == (1_000, 784)
    np.testing.assert_array_equal(many.train_images[:40], few.train_images)
    np.testing.assert_array_equal(many.train_labels, np.tile(few.train_labels, 25))
    copies = many.train_images.reshape(25, 40, 28, 28)
    np.testing.assert_array_equal(*(np.count_nonzero(copies[n], axis=(1, 2)) for n in (0, 24)))
    assert len(np.unique(copies[:, 0], axis=0)) == 25
    (place,) = np.argwhere(copies[0, 0] == copies[0, 0].max())[:1]
    moved = {tuple(abs(np.argwhere(copy[0] == copy[0].max())[0] - place)) for copy in copies}
    assert moved == {(rows, columns) for rows in range(3) for columns in range(3)}


def test_a_step_does_409_088_operations_per_image():
    """In five products: two of 784 × 128 multiply-adds, three of 128 × 10."""
    result = scaling.Result({}, 60_000, 784, 2, {1: 1.0}, {}, {}, {})
    assert scaling.flop(result, "batch size", 1) == 60_000 * 409_088
    assert scaling.flop(result, "images", 120_000) == 120_000 * 409_088
    assert scaling.flop(result, "hidden units", 64) == 60_000 * 409_088 / 2


@pytest.mark.parametrize("size", [7, 50])
def test_timed_mini_batches_match_the_trainer(digits28, size):
    few, mlp = limited(digits28, 50), MLP()
    train(mlp, get_backend("numpy"), few, epochs=1, batch_size=size, learning_rate=scaling.LEARNING_RATE)
    with thread_pool(1) as parallel_map:
        timed = competitor("numpy", scaling.task_of(parallel_map, few))
        scaling.take_batches(timed, 50, size, count=-(-50 // size))()
    for ours, theirs in zip(timed.parameters(), mlp.parameters):
        np.testing.assert_array_equal(ours, theirs)


def test_points_of_an_axis_are_joined_from_left_to_right():
    """Peers' steps over all images are measured first."""
    row = [scaling.Measured([seconds], at=at) for at, seconds in ((60_000, 0.1), (1, 9.0), (64, 0.5))]
    axes = Figure().subplots()
    result = scaling.Result({}, 60_000, 784, 2, {1: 1.0, 2: 2.0}, {}, {}, {})
    scaling.draw_axis(axes, result, "batch size", {"JAX": row})
    joined = [line.get_xdata().tolist() for line in axes.lines if len(line.get_xdata()) == 3]
    assert joined == [[1, 64, 60_000]]


class Wrong(NumpyBackend):
    """Its ReLU returns one row, which broadcasting would compare with all."""

    def _relu(self, z):
        return super()._relu(z)[:1]


class Watched(NumpyBackend):
    """Notes how many negative numbers it gets."""

    def _relu(self, z):
        self.negatives = int((z < 0).sum())
        return super()._relu(z)


def test_each_timed_call_gets_an_argument_that_was_not_overwritten(digits28):
    backend = Watched()
    call, reset, images = kernels.checked_call(backend, "relu", digits28)
    first = backend.negatives
    assert images == min(SHARD, len(digits28.train_images))
    for _ in range(2):
        reset()
        call()
        assert backend.negatives == first > 0
    call()
    assert backend.negatives == 0


def test_a_result_of_a_wrong_shape_is_not_timed(digits28):
    with pytest.raises(AssertionError, match=r"Wrong, relu: float32 \(1, 128\), not float32 \(\d+, 128\)"):
        kernels.checked_call(Wrong(), "relu", digits28)


def test_batches_of_the_scaling_study_change():
    seen = []
    learner = SimpleNamespace(learn_rows_all=lambda batches: seen.extend(rows.tolist() for rows in batches))
    take = scaling.take_batches(learner, images=10, size=4, count=2)
    for _ in range(3):
        take()
    assert [len(rows) for rows in seen] == [4, 4, 2, 4, 4, 2]
    epochs = [[row for rows in seen[start : start + 3] for row in rows] for start in (0, 3)]
    assert [sorted(rows) for rows in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]


def test_a_part_of_an_epoch_is_scaled_up(monkeypatch):
    """Two steps of one second, each over a quarter of the images: four seconds per epoch."""
    now = [0.0]
    monkeypatch.setattr("bench.measure.interleave.time.perf_counter", lambda: now[0])

    def step():
        now[0] += 1

    points = {("numpy", 8): scaling.Point(step, share=0.25, repeats=2)}
    assert scaling.timed(points, 3) == {"numpy": [scaling.Measured([4, 4, 4], at=8, share=0.25)]}


@pytest.mark.parametrize("name", ["numpy", "sparse"])
def test_flop_and_bytes_of_the_big_products(digits28, name):
    backend = get_backend(name)
    images = digits28.train_images[: SHARD + 100]  # two shards
    big = roofline.products(backend, images)
    multiplied = images.size if name == "numpy" else np.count_nonzero(images)
    weights, results = 4 * 784 * 128, 4 * len(images) * 128
    for which, other in (("forward", 4 * 2 * 128), ("backward", 0)):
        assert big[which].flop == 2 * multiplied * 128
        pixels = big[which].flop / big[which].intensity - 2 * weights - results - other
        if name == "numpy":
            assert pixels == pytest.approx(4 * images.size)
        else:
            assert multiplied <= pixels <= 2.5 * multiplied  # a byte per value, less than one per position, and counts
        big[which].run()


def test_readers_read_the_whole_array():
    for level in ("L1", "L2"):
        run, size = roofline.reader(level)
        assert run.args[0].nbytes == pytest.approx(roofline.MEMORY[level], rel=0.1)
        assert size == run.args[0].nbytes * run.args[2]
        run()


def test_readers_add_every_value():
    values = np.arange(2 * roofline.CHAINS * simd.REGISTER_BYTES // 4, dtype=np.float32)
    lanes = simd.REGISTER_BYTES // 4
    expected = values.reshape(-1, lanes).sum(axis=0) + sum(range(roofline.CHAINS))
    roofline.add_up(values, 2, 1)
    np.testing.assert_allclose(values[:lanes], expected, rtol=1e-6)  # a sum of 24 or 32 small integers


def test_the_peak_does_its_multiply_adds():
    values = np.full(simd.REGISTER_BYTES // 4, 0.5, np.float32)
    roofline.run_chains(values, 3)
    assert set(values) == {sum(range(roofline.CHAINS)) + 3 * 0.25 * roofline.CHAINS}


@pytest.mark.parametrize("transposes", products.TRANSPOSES)
@pytest.mark.parametrize("shape", [(2, 30, 7), (5, 64, 33)])
def test_products_in_all_transposes(shape, transposes):
    """Every available library is verified; operands have the memory layout that their names say."""
    m, k, n = shape
    a, b = products.operands(shape, transposes)
    assert (a.shape, b.shape) == ((m, k), (k, n))
    assert (not a.flags.c_contiguous) == ("Aᵀ" in transposes)
    assert (not b.flags.c_contiguous) == ("Bᵀ" in transposes)
    libraries, skipped = products.torch_libraries()
    swept = products.swept(shape, transposes, libraries, rounds=1)
    assert list(swept.seconds.seconds) == ["numba", "OpenBLAS", *libraries]
    assert {*libraries, *skipped} == {"MKL", "oneDNN"}


def test_a_wrong_product_is_not_timed():
    def wrong(a, b):
        return lambda: a[:, :-1] @ b[:-1]

    with pytest.raises(AssertionError, match=r"wrong, AB at \(3, 40, 5\)"):
        products.swept((3, 40, 5), "AB", {"wrong": wrong}, rounds=1)


def test_sums_of_the_largest_operands_are_exact():
    deepest = max(k for shapes in products.SHAPES.values() for _, k, _ in shapes)
    assert 8 * 8 * deepest < 2**24


def test_cells_and_the_title_are_medians_over_the_runs(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr("matplotlib.figure.Figure.suptitle", lambda self, text, **look: titles.append(text))
    cells = []
    monkeypatch.setattr("matplotlib.axes.Axes.text", lambda self, x, y, text, **look: cells.append(text))
    runs = [
        products.Result(
            [],
            [
                products.Swept(shape, transposes, Comparison("", {"numba": [seconds], "OpenBLAS": [1.0]}))
                for shape in ((1, 2, 3), (4, 5, 6))
                for transposes, seconds in zip(products.TRANSPOSES, (0.5, odd, 1.5 if shape == (4, 5, 6) else 1, 0.9))
            ],
        )
        for odd in (0.62, 2.5, 0.87)
    ]
    products.draw(runs, "", tmp_path / "products.png")
    assert titles == ["Time relative to OpenBLAS's, by shape and transposes; numba's largest: 1.50"]
    assert cells == ["0.50", "0.87", "1.00", "0.90", "0.50", "0.87", "1.50", "0.90"]
    products.draw([products.Result([])], "", tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


def test_without_pytorch_its_libraries_are_skipped(monkeypatch):
    def package(name):
        raise UnavailableError("torch is not installed")

    monkeypatch.setattr(products, "package", package)
    assert products.torch_libraries() == ({}, dict.fromkeys(("MKL", "oneDNN"), "torch is not installed"))


def test_break_even():
    def start(fixed, epoch):
        return break_even.Start(Rounds([fixed + 5 * epoch]), epoch, 5)

    numpy = start(1.0, 0.2)
    assert break_even.break_even(start(2.0, 0.1), numpy) == pytest.approx(10)
    assert break_even.break_even(start(0.5, 0.1), numpy) == 0
    assert break_even.break_even(start(0.5, 0.3), numpy) == 0
    assert break_even.break_even(start(2.0, 0.2), numpy) == math.inf
    words = {
        0: "is always ahead of numpy",
        16.2: "overtakes numpy after 17 epochs",
        259: "overtakes numpy after more than 250 epochs",
        math.inf: "never overtakes numpy",
    }
    assert {epochs: break_even.crossing(epochs) for epochs in words} == words


def test_a_process_reports_its_epochs(tmp_path):
    data = ("--dataset", "digits28", "--limit", 50)
    seconds = break_even.train_in_process("--epochs", 3, "--backend", "numpy", *data, cache=tmp_path / "cache")
    assert len(seconds) == 3
    assert min(seconds) > 0


def test_files_for_workers_hold_the_data_set(digits28, tmp_path):
    few = limited(digits28, 40)
    workers.write(few, tmp_path, 100)
    _, *written = load_idx(tmp_path)
    expected = [np.concatenate([array, array, array[:20]]) for array in few[1:3]] + list(few[3:])
    for array, each in zip(written, expected, strict=True):
        np.testing.assert_array_equal(array, each)


@pytest.mark.parametrize(("processes", "threads", "levels"), [(1, 2, 0), (4, 8, 1), (16, 32, 2), (4000, 2048, 4)])
def test_estimate_for_more_workers(processes, threads, levels):
    """On two threads a million images take a second, so one thread takes 2 µs per image; a task takes 0.5 ms.

    Three million images make 2,048 shards, so no more threads are of use.
    """
    traffic = [workers.Traffic(1, 0, 2, 0.01), workers.Traffic(16, 0, 20, 0.019)]
    result = workers.Result(2, 400_000, 1e9, traffic, [workers.Growth(10**6, 1.0, 0)], [])
    calculated = workers.calculation(result, processes, 3e6)
    assert calculated["arithmetic"] == pytest.approx(3e6 * 2e-6 / threads)
    assert calculated["tasks"] == pytest.approx(0.01 + 0.0005 * 1.25 * processes)
    assert calculated["network"] == pytest.approx((2 + 16 * levels) * 4e5 / 1.25e9)
    assert calculated["hashing"] == pytest.approx(2 * 3e6 * 784 / 1e9 / threads)


def test_the_report_comes_last_after_a_failure_and_ctrl_c(tmp_path, monkeypatch):
    """The first study has a result, the second fails, and Ctrl-C stops the third."""

    def run(command):
        if "density" in command:
            raise KeyboardInterrupt
        return SimpleNamespace(returncode=int("ladder" in command))

    reported = []

    def show(folder, output, missing):
        reported.append(missing)
        print("report: here")

    monkeypatch.setattr(commands, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(commands, "show", show)
    (tmp_path / "run.json").write_text('{"kind": "run"}')
    result = CliRunner().invoke(
        commands.app, ["run", "epochs", "ladder", "density", "epochs", "--output", str(tmp_path)]
    )
    assert reported == [{"density": commands.STOPPED, "ladder": "it failed; see above"}]
    assert result.output.splitlines()[-1] == "report: here"
    assert result.exit_code == 128 + signal.SIGINT


@pytest.mark.parametrize("changed", ["pixels", "classes"])
def test_the_published_network_takes_only_mnists_sizes(digits28, changed):
    """Which is checked before anything is trained."""
    few = limited(digits28, 100)._replace(name="idx")
    if changed == "pixels":
        few = few._replace(train_images=few.train_images[:, :25], test_images=few.test_images[:, :25])
    else:
        few = few._replace(train_labels=few.train_labels + np.uint8(3))
    with pytest.raises(DataError, match="takes 784 pixels and at most 10 classes: use python -m model train"):
        published.reproduce({"numpy": get_backend("numpy")}, few, 1, 1, None)


def test_reproduction(digits28, monkeypatch):
    """Every run, with three epochs instead of 250, and the band over all random starts."""
    short = {"images": 200, "epochs": 3, "learning_rate": 0.3}
    monkeypatch.setattr(published, "FULL_BATCH", published.Schedule(**short, batch_size=None))
    monkeypatch.setattr(published, "MINI_BATCH", published.Schedule(**short, batch_size=50))
    slow = get_backend("numpy")
    monkeypatch.setattr(slow, "too_slow_for_full_batches", True)
    backends = {"naive": slow, "numba": get_backend("numba")}
    silent = nullcontext((lambda images: None, lambda state: None))
    result = published.reproduce(backends, digits28, 3, 1, lambda name, images: silent)
    assert result.dataset == "digits28"
    assert {name: run.protocol.batch_size for name, run in result.runs.items()} == {"numba": None, "naive": 50}
    assert list(published.full_batch_histories(result)) == ["numba"]
    others = [published.run(published.FULL_BATCH, backends["numba"], digits28, seed, 1)[1] for seed in range(3)]
    for kind in ("train", "test"):
        curves = np.array([history.accuracies(kind) for history in others])
        band = getattr(result.starts, kind)
        np.testing.assert_array_equal(band.low, curves.min(axis=0))
        np.testing.assert_array_equal(band.high, curves.max(axis=0))
        np.testing.assert_array_equal(result.runs["numba"].result().accuracies(kind), curves[0])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1, "0.10"),
        (0.0338, "0.034"),
        (0.996, "1.0"),
        (4.04, "4.0"),
        (17.84, "17.8"),
        (286.8, "287"),
        (11_329, "11,300"),
    ],
)
def test_numbers_have_two_or_three_significant_digits(value, text):
    assert style.short(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(1350, "1,350 s"), (1, "1.0 s"), (0.0718, "72 ms"), (0.0056, "5.6 ms"), (0.00084, "840 µs")]
)
def test_durations_are_numbers_of_at_least_one(seconds, text):
    assert style.in_seconds(seconds) == text


def test_lines_of_code_leave_out_the_compiler():
    """llvmlite's `ir`, which the kernels use, is not the method of that name, which compiles them."""

    def names(step):
        return {name for _, name in ladder.reached(("kernels.ladder.steps", step), {})}

    assert {"add_block", "_emit_sums", "Vectors", ".fma", "PACKS_A"} <= names("vectors")
    assert names("vectors").isdisjoint({".ir", "_require_compiler", "_Cache"})
    assert names("compiled") == {"compiled", "three_loops", "matmul"}
