"""Other packages take the same steps as ours, and the studies measure what they say."""

import itertools
import time
from types import SimpleNamespace

import numpy as np
import pytest

from bench.measure import interleave
from bench.measure.records import Comparison
from bench.peers import PEERS, Form, best_form, competitor, expected_parameters, update_error, verified
from bench.peers.jax_jit import JAX, JAXSteps
from bench.peers.ours import Ours
from bench.peers.pytorch import PyTorch, PyTorchByHand, PyTorchCSR
from bench.peers.task import Competitor, Learner, Task, UnavailableError, batches, take_steps, tolerance
from bench.studies import head_to_head, memory, mini_batches, time_to_accuracy
from bench.studies.time_to_accuracy import Evaluation, Recipe, Trial
from kernels import backend as contract
from kernels import get_backend
from kernels.backend import Backend
from model.data import Dataset
from model.mlp import MLP
from model.shards import Shards
from model.threads import thread_pool

PEERS_TO_TEST = [
    pytest.param(name, form, marks=[pytest.mark.slow] * (name == "torch.compile"))
    for name in PEERS
    for form in PEERS[name]
    if name != "PyTorch bfloat16"
]


def noisy_patterns(pixels, train=2700, test=300):
    """Images of ten distinguishable patterns, with three quarters of the pixels zero."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (10, pixels)) * (rng.random((10, pixels)) < 0.25)
    labels = rng.integers(0, 10, train + test).astype(np.uint8)
    images = (patterns[labels] * rng.uniform(0.5, 1.0, (train + test, pixels))).astype(np.uint8)
    for array in (images, labels):
        array.setflags(write=False)  # like the real data
    return Dataset("patterns", images[:train], labels[:train], images[train:], labels[train:])


@pytest.fixture(scope="module")
def task():
    """Steps of a small network over more images than one part of any peer."""
    dataset = noisy_patterns(25)
    with thread_pool(2) as parallel_map:
        yield Task(MLP((25, 6, 10)), dataset.train_images, dataset.train_labels, 0.3, 2, parallel_map)


def available(name, task, form=None):
    try:
        return competitor(name, task, form)
    except UnavailableError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize(("name", "form"), PEERS_TO_TEST)
def test_three_steps_match_ours(name, form, task):
    start = [parameter.copy() for parameter in task.mlp.parameters]
    expected = expected_parameters(task)
    try:
        peer, how = verified(name, task, expected, form)
    except UnavailableError as reason:
        pytest.skip(str(reason))
    assert (how.compile_seconds is not None) == (name in ("torch.compile", "JAX"))
    assert all(parameter.dtype == np.float32 for parameter in peer.parameters())
    for before, now in zip(start, task.mlp.parameters):
        np.testing.assert_array_equal(before, now)  # the next competitor starts here
    np.testing.assert_allclose(peer.step(), fourth_loss(task), rtol=1e-5)


@pytest.mark.parametrize("missing", [0, 31_234, 59_999])
def test_a_missing_image_is_detected(missing):
    """Even one of 60,000."""
    dataset = noisy_patterns(25, train=60_000)
    with thread_pool(2) as parallel_map:
        whole = Task(MLP((25, 6, 10)), dataset.train_images, dataset.train_labels, 0.3, 2, parallel_map)
        expected = expected_parameters(whole)
        part = competitor(
            "numpy",
            whole._replace(images=np.delete(whole.images, missing, axis=0), labels=np.delete(whole.labels, missing)),
        )
        for _ in range(3):
            part.step()
        assert verified("numpy", whole, expected)[1].error < tolerance(60_000) / 2
        assert update_error(part.parameters(), whole.mlp.parameters, expected) > 2 * tolerance(60_000)


class Careless(PyTorchByHand):
    """Leaves out the last image of each step."""

    def _descend(self, images, labels):
        return super()._descend(images[:-1], labels[:-1])


def test_a_competitor_that_leaves_out_an_image_fails(task, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setitem(PEERS, "careless", {"": Careless})
    with pytest.raises(AssertionError, match="careless: its update differs"):
        verified("careless", task, expected_parameters(task))
    with pytest.raises(AssertionError, match="careless: its update differs"):
        verified("careless", task, expected_parameters(task, 32), size=32)


@pytest.mark.parametrize("form", PEERS["PyTorch bfloat16"])
def test_bfloat16_is_less_exact_but_within_its_tolerance(form, task, monkeypatch):
    """On a network of the real size: over few pixels and units, rounding errors do not average out."""
    pytest.importorskip("torch")
    dataset = noisy_patterns(784)
    task = task._replace(mlp=MLP(), images=dataset.train_images, labels=dataset.train_labels)
    monkeypatch.setattr("bench.peers.pytorch.get_cpu_info", lambda: {"flags": ["avx512_bf16"]})
    try:
        _, how = verified("PyTorch bfloat16", task, expected_parameters(task), form)
    except UnavailableError as reason:
        pytest.skip(str(reason))
    assert how.error > tolerance(len(task.images))


@pytest.mark.parametrize("form", PEERS["PyTorch bfloat16"])
def test_bfloat16_is_skipped_without_instructions_for_it(form, task, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr("bench.peers.pytorch.get_cpu_info", lambda: {"flags": ["avx2"]})
    with pytest.raises(UnavailableError, match="this CPU has no instructions for bfloat16"):
        competitor("PyTorch bfloat16", task, form)


def test_medium_precision_is_skipped_where_only_the_rounding_of_float32_differs(task, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr("bench.peers.pytorch.get_cpu_info", lambda: {"flags": ["avx512_bf16"]})
    forward = torch.nn.Linear.forward

    def by_another_library(layer, x):
        is_medium = torch.get_float32_matmul_precision() == "medium"
        return forward(layer, x) * (1 + 2.0**-20 * is_medium)

    monkeypatch.setattr(torch.nn.Linear, "forward", by_another_library)
    with pytest.raises(UnavailableError, match="PyTorch multiplies in float32 here"):
        competitor("PyTorch bfloat16", task, "medium precision")


def test_medium_precision_ends_with_the_step(task, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr("bench.peers.pytorch.get_cpu_info", lambda: {"flags": ["avx512_bf16"]})
    monkeypatch.setattr("bench.peers.pytorch.FLOAT32_DIFFERENCE", 0)  # also where products stay in float32
    before, seen = torch.get_float32_matmul_precision(), []
    peer = competitor("PyTorch bfloat16", task, "medium precision")

    def loss(*arguments):
        seen.append(torch.get_float32_matmul_precision())
        return torch_loss(*arguments)

    torch_loss, peer.loss = peer.loss, loss
    assert torch.get_float32_matmul_precision() == before
    peer.step()
    assert seen == ["medium"]
    assert torch.get_float32_matmul_precision() == before


def test_the_fastest_form_is_chosen(task, monkeypatch):
    class Slow(PyTorch):
        def step(self):
            time.sleep(0.1)
            return super().step()

    def missing(task):
        raise UnavailableError("there is none")

    pytest.importorskip("torch")
    monkeypatch.setitem(PEERS, "made up", {"slow": Slow, "missing": missing, "fast": PyTorchByHand})
    chosen, form, tried = best_form("made up", task, expected_parameters(task))
    assert (type(chosen), form, tried["missing"].skipped) == (PyTorchByHand, "fast", "there is none")
    assert tried["slow"].seconds > tried["fast"].seconds
    monkeypatch.setitem(PEERS, "made up", {"missing": missing})
    with pytest.raises(UnavailableError, match="there is none"):
        best_form("made up", task, expected_parameters(task))


@pytest.mark.parametrize("size", [1, 8, 200])
@pytest.mark.parametrize(("name", "form"), [*((name, None) for name in mini_batches.BACKENDS), *PEERS_TO_TEST])
def test_steps_over_rows_match_ours(name, form, size, task):
    try:
        verified(name, task, expected_parameters(task, size), form, size)
    except UnavailableError as reason:
        pytest.skip(str(reason))


def test_the_fastest_form_over_mini_batches_is_chosen(task, monkeypatch):
    """A form that only takes full batches is left out."""

    class Slow(PyTorch):
        def learn_rows(self, rows):
            time.sleep(0.02)
            return super().learn_rows(rows)

    pytest.importorskip("torch")
    monkeypatch.setitem(PEERS, "made up", {"full": PyTorchCSR, "slow": Slow, "fast": PyTorchByHand})
    chosen, form, tried = best_form("made up", task, expected_parameters(task, 64), 64)
    assert (type(chosen), form, tried["full"].skipped) == (PyTorchByHand, "fast", "this form takes no mini-batches")
    assert tried["slow"].seconds > 0.02 > tried["fast"].seconds  # of one step


def test_several_steps_in_one_call_are_the_same_steps(task):
    """Of batches of one size, of different sizes, and of images that are prepared first; to float32's rounding."""
    pytest.importorskip("jax")
    one_by_one, at_once = JAX(task), JAXSteps(task)
    for sizes in (8, 8, 8), (8, 5):
        rows = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
        batches = [(task.images[batch], task.labels[batch]) for batch in rows]
        for learner in one_by_one, at_once:
            learner.learn_rows_all(rows)
            learner.learn_all(batches)
    for ours, theirs in zip(at_once.parameters(), one_by_one.parameters(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not np.array_equal(at_once.parameters()[0], task.mlp.parameters[0])


def test_batches_change():
    rows = batches(10, 3)
    epoch, following = (np.concatenate([next(rows) for _ in range(3)]) for _ in range(2))
    assert len(set(epoch)) == len(set(following)) == 9
    assert list(epoch) != list(following)


@pytest.mark.parametrize("name", mini_batches.BACKENDS)
def test_steps_in_parts_are_the_same_steps(name, task):
    """To the bit. Afterwards, the backend and the checks are as before."""
    backend, before = get_backend(name), dict(vars(contract))
    plain, parts = Ours(backend, task), mini_batches.InParts(backend, task)
    take_steps(plain, batches(len(task.images), 32), 3)
    parts.turn(batches(len(task.images), 32), 3)
    for ours, theirs in zip(parts.parameters(), plain.parameters(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert dict(vars(contract)) == before
    assert get_backend(name).matmul.__func__ is Backend.matmul


def test_parts_of_steps(task):
    """Every backend has every part."""
    steps = mini_batches.steps_in_parts(task, 32, rounds=3)
    assert tuple(steps) == mini_batches.BACKENDS
    for step in steps.values():
        assert list(step.seconds) == [*mini_batches.PARTS, mini_batches.WHOLE]
        assert all(len(seconds) == 3 and min(seconds) > 0 for seconds in step.seconds.values())


def test_a_part_does_not_include_others(task, monkeypatch):
    """A second in `outer`, three in `inner`, which it calls."""
    now = [0.0]
    monkeypatch.setattr("bench.studies.mini_batches.time.perf_counter", lambda: now[0])
    learner = mini_batches.InParts(get_backend("numpy"), task)

    def wait(seconds):
        now[0] += seconds

    def outer():
        wait(0.5)
        learner.timed("inner", wait, 3)
        wait(0.5)

    learner.timed("outer", outer)
    assert learner.seconds == {"outer": 1, "inner": 3}


def fourth_loss(task):
    ours = competitor("numpy", task)
    return [ours.step() for _ in range(4)][-1]


def test_a_slightly_wrong_step_is_detected(task):
    expected = expected_parameters(task._replace(learning_rate=1.001 * task.learning_rate))
    with pytest.raises(AssertionError, match="numpy"):
        verified("numpy", task, expected)


@pytest.mark.parametrize(("name", "form"), [("numpy", None), *PEERS_TO_TEST])
def test_mini_batches(name, form, task):
    few = task._replace(images=task.images[:9], labels=task.labels[:9])
    whole, parts = available(name, task, form), available(name, few, form)
    if not isinstance(parts, Learner):
        pytest.skip("this form takes no mini-batches")
    if isinstance(parts, JAXSteps):
        pytest.skip("it takes no full batches, and learns like JAX in one call")
    assert parts.learn(task.images, task.labels) == pytest.approx(whole.step(), rel=1e-6)
    for ours, theirs in zip(whole.parameters(), parts.parameters()):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    mlp = MLP((25, 6, 10))
    for mine, theirs in zip(mlp.parameters, whole.parameters()):
        mine[...] = theirs
    prepared = Shards(task.parallel_map, get_backend("numpy"), task.images, task.labels, mlp.dtype)
    assert whole.accuracy() == pytest.approx(prepared.evaluate(mlp)[1], abs=1e-6)


@pytest.fixture
def without_frameworks(monkeypatch):
    """As if PyTorch and JAX were not installed."""

    def import_module(name):
        raise ImportError(name)

    monkeypatch.setattr("bench.peers.task.importlib", SimpleNamespace(import_module=import_module))


@pytest.mark.slow
@pytest.mark.usefixtures("without_frameworks")
def test_head_to_head_reports_missing_packages(tmp_path):
    result = head_to_head.measure(noisy_patterns(784, train=600), quick=True)
    assert {"PyTorch", "PyTorch by hand", "torch.compile", "JAX", "PyTorch CSR", "MKL CSR"} <= set(result.skipped)
    assert result.skipped["JAX"] == "jax is not installed: make bench-peers installs it"
    assert result.categories["dense"] == ["numpy", "numba", "scikit-learn"]
    assert {"sparse", "SciPy CSR"} <= set(result.categories["sparse"])
    assert result.steps.ratio("sparse", "SciPy CSR").ratio > 0
    assert result.compile_seconds["numba"] > 0
    assert result.compile_seconds["numpy"] is None
    head_to_head.draw([result], "", tmp_path / "head_to_head.png")


class Clock:
    """A clock that advances only in `sleep`."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_interleave_takes_turns_and_times_nothing_else(monkeypatch):
    clock, calls = Clock(), []
    monkeypatch.setattr(interleave, "time", clock)

    def takes(name, seconds):
        def call():
            calls.append(name)
            clock.sleep(seconds * len(calls))  # the machine gets slower

        return call

    timed = interleave.interleave({"a": takes("a", 1), "b": takes("b", 2), "c": takes("c", 3)}, 5, rest=100)
    rounds = list(zip(*[iter(calls)] * 3))
    assert len(rounds) == 2 + 5
    assert all(set(turn) == set("abc") for turn in rounds)
    assert len(set(rounds)) > 1
    for name, seconds in (("a", 1), ("b", 2), ("c", 3)):
        expected = [seconds * (3 * order + turn.index(name) + 1) for order, turn in enumerate(rounds)]
        np.testing.assert_allclose(timed[name], expected[2:])


def test_the_first_of_several_steps_in_a_turn_is_not_counted(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(interleave, "time", clock)
    taken = itertools.cycle([50, 2, 3, 4])
    timed = interleave.interleave({"a": lambda: clock.sleep(next(taken))}, 2, warmup=1, rest=100, steps=4)
    np.testing.assert_allclose(timed["a"], [3, 3])


def test_setup_comes_before_each_turn_and_is_not_timed(monkeypatch):
    clock, calls = Clock(), []
    monkeypatch.setattr(interleave, "time", clock)

    def takes(seconds, note):
        def call():
            calls.append(note)
            clock.sleep(seconds)

        return call

    timed = interleave.interleave({"a": takes(2, "a")}, 3, warmup=1, setup={"a": takes(50, "setup")})
    assert calls == ["setup", "a"] * 4
    np.testing.assert_allclose(timed["a"], [2, 2, 2])


def test_machine_drift_cancels_in_ratios():
    rng = np.random.default_rng(1)
    drift = rng.uniform(1, 4, 40)
    noise = rng.normal(1, 0.01, (3, 40))
    seconds = {"half": 0.5 * drift * noise[0], "same": drift * noise[1], "base": drift * noise[2]}
    comparison = Comparison.of("", seconds)
    half = comparison.ratio("half", "base")
    low, high = half.interval
    assert low <= 0.5 <= high
    assert high - low < 0.05  # the drift from 1 to 4 would make it ten times as wide
    verdicts = [comparison.ratio(*pair).verdict for pair in (("half", "base"), ("same", "base"), ("base", "half"))]
    assert verdicts == ["faster", "equal", "slower"]
    assert half.ratio == pytest.approx(comparison.median("half") / half.base_seconds)


class Hungry(Competitor):
    """Holds 20 MB, and 60 MB during a step."""

    def __init__(self):
        self.kept = np.ones(20_000_000, np.uint8)

    def step(self):
        return float(np.ones(40_000_000, np.uint8)[-1])

    def parameters(self):
        return []


@pytest.mark.skipif(not memory.PROCESS.exists(), reason="only Linux reports peak memory")
def test_peak_memory():
    assert memory.in_fresh_process(memory.peak_bytes, Hungry, MALLOC_ARENA_MAX="1") == pytest.approx(60e6, rel=0.05)


def test_peak_memory_on_an_unsupported_system(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "PROCESS", tmp_path / "missing")
    with pytest.raises(UnavailableError, match="cannot measure the peak memory"):
        memory.peak_bytes(Hungry)


def test_the_recipe_is_the_fastest_that_always_reaches_the_target():
    trials = [Trial(Recipe(1, 1, 1), None, None), Trial(Recipe(2, 1, 1), 3.0, 5), Trial(Recipe(3, 1, 1), 2.0, 9)]
    assert time_to_accuracy.fastest(trials) == Recipe(3, 1, 1)
    with pytest.raises(UnavailableError, match="no recipe"):
        time_to_accuracy.fastest(trials[:1])


def test_held_out_images_are_not_trained_on():
    dataset = noisy_patterns(4, train=12, test=3)
    held_out = time_to_accuracy.held_out(dataset)
    assert [len(array) for array in held_out[1:]] == [10, 10, 2, 2]
    for part, whole in ((slice(1, 5, 2), dataset.train_images), (slice(2, 5, 2), dataset.train_labels)):
        np.testing.assert_array_equal(np.concatenate(held_out[part]), whole)


class Scripted(Learner):
    """Its accuracies come from a list; each step and each evaluation takes one second."""

    def __init__(self, clock, accuracies):
        self.clock, self.accuracies, self.seen = clock, iter(accuracies), []

    def learn(self, images, labels):
        self.clock.sleep(1)
        self.seen += images[:, 0].tolist()
        return 1.0

    def accuracy(self):
        self.clock.sleep(1)
        return next(self.accuracies)

    def step(self):
        raise NotImplementedError

    def learn_rows(self, rows):
        raise NotImplementedError

    def parameters(self):
        raise NotImplementedError


@pytest.mark.parametrize(("accuracies", "evaluations"), [([0.5, 0.93, 1], 2), (itertools.repeat(0.9), 4)])
def test_training_ends_at_the_target_or_is_given_up(monkeypatch, accuracies, evaluations):
    clock = Clock()
    learner = Scripted(clock, accuracies)
    for name, value in {
        "EVALUATE_EVERY": 5,
        "GIVE_UP_AFTER": 20,
        "time": clock,
        "competitor": lambda name, task, form: learner,
    }.items():
        monkeypatch.setattr(time_to_accuracy, name, value)
    images = np.arange(10, dtype=np.uint8)[:, None]
    dataset = Dataset("numbers", images, images[:, 0], images, images[:, 0])
    curve = time_to_accuracy.reach("numpy", dataset, Recipe(2, 0.1, 1), 0, None)
    assert [point.images for point in curve] == [6, 10, 16, 20][:evaluations]
    assert [point.seconds for point in curve] == [4, 7, 11, 14][:evaluations]
    assert sorted(learner.seen[:10]) == list(range(10))
    assert learner.seen[:10] != list(range(10))
    assert (curve[-1].accuracy >= time_to_accuracy.TARGET) == (evaluations == 2)


def test_time_to_accuracy_is_drawn(tmp_path):
    result = reached_in({"sparse": [2.0, 1.9, 2.2], "PyTorch": [3.0, 2.9, 3.1]})
    time_to_accuracy.draw(result, "", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("sparse", "numba", "title"),
    [
        ([1.0, 2.0], [2.5, 3.0], "92.21 % test accuracy in 1.5 s: sparse"),
        ([1.0, 2.0], [1.9, 9.0], "Seconds to 92.21 % test accuracy: sparse's range overlaps with that of numba"),
    ],
)
def test_overlapping_ranges_are_not_ranked(tmp_path, monkeypatch, sparse, numba, title):
    assert drawn_title(tmp_path, monkeypatch, {"sparse": sparse, "numba": numba}) == title


def test_overlapping_ranges_are_listed(tmp_path, monkeypatch):
    times = {name: [second, 9.0] for second, name in enumerate(("sparse", "numba", "numpy", "JAX"), 1)}
    title = drawn_title(tmp_path, monkeypatch, times)
    assert title.endswith("sparse's range overlaps with that of numba, numpy and JAX")


def drawn_title(folder, monkeypatch, seconds):
    """The title of the figure, in one line, of competitors' seconds to the target."""
    titles = []
    monkeypatch.setattr("matplotlib.figure.Figure.suptitle", lambda self, text, **look: titles.append(text))
    time_to_accuracy.draw(reached_in(seconds), "", folder / "figure.png")
    return " ".join(titles).replace("\n", " ")


def reached_in(seconds):
    """A result with these seconds to the target, by competitor."""
    curve = [Evaluation(1.0, 2500, 0.9), Evaluation(2.0, 5000, 0.93)]
    return time_to_accuracy.Result(
        target=0.9221,
        trials={},
        recipes={name: Recipe(32, 0.5, 2) for name in ("naive", *seconds)},
        times=Comparison("", seconds),
        curves={name: [curve] for name in seconds},
        naive=[curve],
        skipped={},
    )


def test_bfloat16_is_another_category_with_its_error(tmp_path, monkeypatch):
    words = []
    monkeypatch.setattr(head_to_head, "label", lambda axes, text, *place: words.append(text))
    steps = Comparison(
        "", {"numpy": [3.0], "sparse": [1.0], "PyTorch bfloat16": [0.5], head_to_head.BIG_PRODUCTS: [2.0]}
    )
    categories = {"dense": ["numpy"], "sparse": ["sparse"], "bfloat16": ["PyTorch bfloat16"]}
    tried = {"PyTorch bfloat16": {"autocast": Form(error=0.0017)}}
    result = head_to_head.Result(categories, steps, tried)
    head_to_head.draw([result], "", tmp_path / "figure.png")
    assert words[-1] == "dense in bfloat16: another category, updates off by 1.7e-03 of their norm"


def test_mini_batches_are_drawn(tmp_path):
    sizes = {size: Comparison("", {"sparse": [1e-5 * size], "PyTorch": [2e-5 * size]}) for size in (32, 2048)}
    result = mini_batches.Result({1: sizes, 2: sizes}, {}, {}, {})
    mini_batches.draw([result, result], "", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
