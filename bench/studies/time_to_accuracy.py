"""Study: seconds from the images in memory to the published test accuracy, in mini-batches.

Each backend uses the batch size and learning rate that were fastest for it on images held out of the training set. The
test images are used for the report alone. The time includes shuffling, preparing, steps, and an evaluation on all test
images after every 2,500 training images. It excludes loading and compilation. Pure Python is extrapolated: it takes
NumPy's steps, at the time per image that it needed for a few.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from bench.measure.interleave import interleave
from bench.measure.records import Comparison, Rounds
from bench.peers import REST, competitor
from bench.peers.task import Learner, Task, UnavailableError
from bench.publish.style import in_seconds, label
from model.data import Dataset
from model.extras.figure import BOUND_COLOUR, colour, figure_file, print_small, title
from model.mlp import MLP
from model.published import PUBLISHED
from model.threads import available_cores, thread_pool

TARGET = max(test for _, test in PUBLISHED.values()) / 100
EVALUATE_EVERY = 2500
GIVE_UP_AFTER = 60_000
BATCH_SIZES = (32, 64, 128)
LEARNING_RATES = (0.3, 0.5, 0.7, 1.0)
NAMES = ("numpy", "numba", "sparse", "PyTorch", "PyTorch by hand", "torch.compile", "JAX")
FIRST_TRIALS = 2
TRIALS = 7
PROMISING = 3
DRAWN = 15
NAIVE_IMAGES = 16


class Recipe(NamedTuple):
    """How to train."""

    batch_size: int
    learning_rate: float
    threads: int


class Evaluation(NamedTuple):
    """A point of an accuracy curve."""

    seconds: float
    images: int
    accuracy: float


Curve = list[Evaluation]


class Trial(NamedTuple):
    """What a recipe took on the held-out images, in the median.

    None where it did not always reach the target, or was not among the most promising ones after its first trials.
    """

    recipe: Recipe
    seconds: float | None
    images: float | None


@dataclass(frozen=True)
class Result:
    """The study's record."""

    target: float
    """Accuracy."""
    trials: dict[str, list[Trial]]
    """The recipes tried, by competitor."""
    recipes: dict[str, Recipe]
    """The one chosen."""
    times: Comparison
    """Seconds to the target, of those who always reached it."""
    curves: dict[str, list[Curve]]
    """Some of the runs behind them, by competitor."""
    naive: list[Curve]
    """NumPy's curves at the pace of pure Python: extrapolated, and no part of the comparison."""
    skipped: dict[str, str]
    """Why a competitor was not timed."""
    kind: Literal["time_to_accuracy"] = "time_to_accuracy"


def measure(dataset: Dataset, quick: bool) -> Result:
    """Choose a recipe for each competitor, and time them all on it, interleaved; takes two minutes, or half of one."""
    rounds = 2 if quick else 12
    trials: dict[str, list[Trial]] = {}
    recipes: dict[str, Recipe] = {}
    skipped: dict[str, str] = {}
    with thread_pool(available_cores()) as run:
        for name in track(NAMES, "choosing recipes", transient=True):
            candidates = recipes_of(name, quick)
            if name == "torch.compile" and "PyTorch" in recipes:  # each batch size would be compiled anew
                candidates = [recipes["PyTorch"]]
            try:
                trials[name] = try_recipes(name, held_out(dataset), run, candidates)
                recipes[name] = fastest(trials[name])
            except UnavailableError as reason:
                skipped[name] = str(reason)
        curves: dict[str, list[Curve]] = {name: [] for name in recipes}
        runners = {name: _run_after_run(name, dataset, recipes[name], run, curves[name]) for name in recipes}
        seconds = interleave(runners, rounds, rest=REST)
        recipes["naive"] = min(trials["numpy"], key=lambda trial: trial.images or np.inf).recipe
        naive = naive_curves(dataset, recipes["naive"], run)
    for name, drawn in curves.items():
        if missed := sum(curve[-1].accuracy < TARGET for curve in drawn):
            skipped[name] = f"{missed} of {len(drawn)} runs did not reach {TARGET:.2%} with {GIVE_UP_AFTER:,} images"
            del seconds[name]
    return Result(
        target=TARGET,
        trials=trials,
        recipes=recipes,
        times=Comparison.of(f"time to {TARGET:.2%}", seconds),
        curves={name: drawn[-min(rounds, DRAWN) :] for name, drawn in curves.items()},
        naive=naive,
        skipped=skipped,
    )


def reach(name: str, dataset: Dataset, recipe: Recipe, seed: int, run: Callable) -> Curve:
    """Train until the test images of `dataset` are classified as well as the target says, or for 60,000 images."""
    start = time.perf_counter()
    task = Task(MLP(seed=seed), dataset.test_images, dataset.test_labels, recipe.learning_rate, recipe.threads, run)
    learner = competitor(name, task)
    assert isinstance(learner, Learner)
    curve: Curve = []
    images = 0
    for batch in _batches(len(dataset.train_images), recipe.batch_size, np.random.default_rng(seed)):
        learner.learn(dataset.train_images[batch], dataset.train_labels[batch])
        images += len(batch)
        if images // EVALUATE_EVERY > (images - len(batch)) // EVALUATE_EVERY:
            accuracy = learner.accuracy()
            curve.append(Evaluation(time.perf_counter() - start, images, accuracy))
            if accuracy >= TARGET or images >= GIVE_UP_AFTER:
                break
    return curve


def _batches(count: int, batch_size: int, rng: np.random.Generator) -> Iterator[NDArray]:
    while True:
        order = rng.permutation(count)
        yield from (order[first : first + batch_size] for first in range(0, count, batch_size))


def held_out(dataset: Dataset) -> Dataset:
    """The last sixth of the training images (10,000 of MNIST) in place of the test images."""
    count = len(dataset.train_images) * 5 // 6
    images, labels = dataset.train_images, dataset.train_labels
    return Dataset(dataset.name, images[:count], labels[:count], images[count:], labels[count:])


def recipes_of(name: str, quick: bool) -> list[Recipe]:
    """What is tried for a backend. Ours compute a small batch on one thread; for PyTorch, that is to be found out."""
    threads = {1, available_cores()} if name in ("PyTorch", "PyTorch by hand") else {available_cores()}
    pairs = itertools.product(
        BATCH_SIZES[1:2] if quick else BATCH_SIZES, LEARNING_RATES[1:3] if quick else LEARNING_RATES
    )
    return [Recipe(batch_size, rate, count) for batch_size, rate in pairs for count in sorted(threads)]


def try_recipes(name: str, dataset: Dataset, run: Callable, recipes: list[Recipe]) -> list[Trial]:
    """Try every recipe from two random starts, interleaved, and the most promising ones from `TRIALS`."""
    for size in {recipe.batch_size: recipe for recipe in recipes}.values():
        reach(name, dataset, size, 0, run)  # compiles
    curves: dict[Recipe, list[Curve]] = {recipe: [] for recipe in recipes}

    def train(tried: list[Recipe], seeds: range) -> None:
        for seed in seeds:
            for recipe in tried:
                curves[recipe].append(reach(name, dataset, recipe, seed, run))

    train(recipes, range(FIRST_TRIALS))
    best = sorted(recipes, key=lambda recipe: max(_seconds(curve) for curve in curves[recipe]))[:PROMISING]
    train(best, range(FIRST_TRIALS, TRIALS))
    trials = []
    for recipe, runs in curves.items():
        ends = [curve[-1] for curve in runs]
        if recipe in best and all(end.accuracy >= TARGET for end in ends):
            trials.append(Trial(recipe, *(float(np.median([end[field] for end in ends])) for field in (0, 1))))
        else:
            trials.append(Trial(recipe, None, None))
    return trials


def _seconds(curve: Curve) -> float:
    return curve[-1].seconds if curve[-1].accuracy >= TARGET else np.inf


def fastest(trials: list[Trial]) -> Recipe:
    """The recipe that took the fewest seconds.

    Raises
    ------
    UnavailableError
        If none reached the target.
    """
    trial = min(trials, key=lambda trial: trial.seconds or np.inf)
    if trial.seconds is None:
        raise UnavailableError(f"no recipe always reached {TARGET:.2%} on the held-out images")
    return trial.recipe


def _run_after_run(name: str, dataset: Dataset, recipe: Recipe, run: Callable, curves: list[Curve]) -> Callable:
    """A function that adds the curve of the next random start to `curves`."""
    return lambda: curves.append(reach(name, dataset, recipe, len(curves), run))


def naive_curves(dataset: Dataset, recipe: Recipe, run: Callable) -> list[Curve]:
    """NumPy's curves at the pace of pure Python, measured on a few images."""
    few = slice(NAIVE_IMAGES)
    images, labels = dataset.train_images[few], dataset.train_labels[few]
    learner = competitor("naive", Task(MLP(), images, labels, recipe.learning_rate, available_cores(), run))
    assert isinstance(learner, Learner)
    start = time.perf_counter()
    learner.learn(images, labels)
    middle = time.perf_counter()
    learner.accuracy()
    per_image = (middle - start) / NAIVE_IMAGES
    per_evaluation = (time.perf_counter() - middle) / NAIVE_IMAGES * len(dataset.test_images)
    return [
        [
            point._replace(seconds=per_image * point.images + per_evaluation * (order + 1))
            for order, point in enumerate(reach("numpy", dataset, recipe, seed, run))
        ]
        for seed in range(TRIALS)
    ]


def draw(result: Result, small_print: str, file: Path) -> None:
    """Accuracy against seconds, the median one of some runs and the ends of all these; below, seconds to the target."""
    times = dict(result.times.rounds)
    if result.naive:
        times["naive"] = Rounds([curve[-1].seconds for curve in result.naive])
    names = sorted(times, key=lambda name: -times[name].median)
    every_curve = {**result.curves, "naive": result.naive}
    target = 100 * result.target
    with figure_file(file, figsize=(8, 5.5)) as figure:
        above, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
        for name in names:
            curves = sorted(every_curve[name], key=lambda curve: curve[-1].seconds)
            seconds, _, accuracies = np.array(curves[len(curves) // 2]).T
            above.plot(seconds, 100 * accuracies, "--" if name == "naive" else "-", color=colour(name))
            for end in [curve[-1] for curve in curves]:
                above.plot(end.seconds, 100 * end.accuracy, "o", color=colour(name), markersize=3)
        above.axhline(target, color=BOUND_COLOUR, linestyle="--", linewidth=1)
        above.set(ylabel="test accuracy (%)", ylim=(80, 95))
        above.annotate(f"{target:.2f} %", (0.01, target), xycoords=("axes fraction", "data"), va="bottom")
        for row, name in enumerate(names):
            first, last = min(times[name].seconds), max(times[name].seconds)
            below.plot([first, last], [row, row], color=colour(name), linewidth=2)
            below.plot(times[name].median, row, "o", color=colour(name))
            recipe = result.recipes[name]
            note = f"batches of {recipe.batch_size}, rate {recipe.learning_rate:g}"
            extrapolated = ", extrapolated" if name == "naive" else ""
            side = -1 if name == "naive" else 1
            label(
                below,
                f"{in_seconds(times[name].median)}  ({note}{extrapolated})",
                first if name == "naive" else last,
                row,
                7.5,
                side,
            )
        below.set(xscale="log", yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5))
        below.set(xlabel=f"seconds, preparation and evaluations included (log scale); below: to {target:.2f} %")
        below.set_yticklabels(names)
        title(figure, _title(result))
        print_small(figure, f"Below: median and range over the random starts.\n{small_print}")


def _title(result: Result) -> str:
    """Competitors whose ranges over the random starts overlap share the first place."""
    seconds = result.times.seconds
    first = min(seconds, key=result.times.median)
    level = [name for name in seconds if min(seconds[name]) <= max(seconds[first])]
    if level == [first]:
        return f"{result.target:.2%} test accuracy in {in_seconds(result.times.median(first))}: {first}"
    return f"To {result.target:.2%} test accuracy, the ranges of {', '.join(level)} overlap"
