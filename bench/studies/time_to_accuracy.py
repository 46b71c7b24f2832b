"""Study: seconds from the images in memory to the published test accuracy, in mini-batches.

Each competitor uses the form that was fastest over mini-batches, and the batch size and learning rate that were fastest
for it on images held out of the training set. The test images serve only for the reported times. These include
shuffling, preparing, steps, and an evaluation on all test images after every 2,500 training images, but not loading or
compilation. Pure Python is extrapolated: NumPy's number of images, at the time per image that pure Python takes for a
few.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from bench.measure.interleave import interleave
from bench.measure.records import Comparison, Rounds
from bench.peers import PEERS, REST, best_form, competitor, expected_parameters
from bench.peers.task import Learner, Task, UnavailableError, shuffled_batches
from bench.publish.style import colour, in_seconds, label
from bench.studies.mini_batches import NAMES
from model.data import Dataset, limited
from model.extras.figure import BOUND_COLOUR, figure_file, print_small, title
from model.mlp import MLP
from model.published import PUBLISHED
from model.threads import available_cores, thread_pool

TARGET = max(test for _, test in PUBLISHED.values()) / 100
EVALUATE_EVERY = 2500
GIVE_UP_AFTER = 60_000
BATCH_SIZES = (32, 64, 128)
LEARNING_RATES = (0.3, 0.5, 0.7, 1.0)
ON_ONE_THREAD_TOO = ("PyTorch", "PyTorch by hand", "torch.compile")
IMAGES_FOR_FORMS = 6_000
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
    form: str | None = None
    """Of a peer; None takes its first one."""


class Evaluation(NamedTuple):
    """A point of an accuracy curve."""

    seconds: float
    images: int
    accuracy: float


Curve = list[Evaluation]


class Trial(NamedTuple):
    """Median time and number of images that a recipe took to reach the target on the held-out images.

    Both are None if it missed the target once, or was not among the most promising ones after its first trials.
    """

    recipe: Recipe
    seconds: float | None
    images: float | None


@dataclass(frozen=True)
class Result:
    """The study's record."""

    target: float
    """Test accuracy to reach."""
    trials: dict[str, list[Trial]]
    """The recipes tried, by competitor: the evidence for the choice."""
    recipes: dict[str, Recipe]
    """The recipe chosen, by competitor."""
    times: Comparison
    """Seconds to the target, for competitors that always reached it."""
    curves: dict[str, list[Curve]]
    """Accuracy curves of some of these runs, by competitor."""
    naive: list[Curve]
    """NumPy's curves at pure Python's time per image: extrapolated, so not part of the comparison."""
    skipped: dict[str, str]
    """Why a competitor was not timed."""
    kind: Literal["time_to_accuracy"] = "time_to_accuracy"


def measure(dataset: Dataset, quick: bool) -> Result:
    """Choose a recipe for each competitor, then time all, interleaved; four minutes, or two if `quick`."""
    rounds = 2 if quick else 12
    trials: dict[str, list[Trial]] = {}
    recipes: dict[str, Recipe] = {}
    skipped: dict[str, str] = {}
    with thread_pool(available_cores()) as parallel_map:
        for name in track(NAMES, "choosing recipes", transient=True):
            try:
                candidates = recipes_of(name, dataset, parallel_map, quick)
                trials[name] = try_recipes(name, held_out(dataset), parallel_map, candidates)
                recipes[name] = fastest(trials[name])
            except UnavailableError as reason:
                skipped[name] = str(reason)
        curves: dict[str, list[Curve]] = {name: [] for name in recipes}
        runners = {name: _run_after_run(name, dataset, recipes[name], parallel_map, curves[name]) for name in recipes}
        seconds = interleave(runners, rounds, rest=REST)
        recipes["naive"] = min(trials["numpy"], key=lambda trial: trial.images or np.inf).recipe
        naive = naive_curves(dataset, recipes["naive"], parallel_map)
    for name, drawn in curves.items():
        if missed := sum(curve[-1].accuracy < TARGET for curve in drawn):
            skipped[name] = (
                f"{missed} of {len(drawn)} runs did not reach {percent(TARGET)} with {GIVE_UP_AFTER:,} images"
            )
            del seconds[name]
    return Result(
        target=TARGET,
        trials=trials,
        recipes=recipes,
        times=Comparison.of(f"time to {percent(TARGET)}", seconds),
        curves={name: drawn[-min(rounds, DRAWN) :] for name, drawn in curves.items()},
        naive=naive,
        skipped=skipped,
    )


def reach(name: str, dataset: Dataset, recipe: Recipe, seed: int, parallel_map: Callable) -> Curve:
    """Train until the accuracy on the test images of `dataset` reaches the target, or for 60,000 images."""
    start = time.perf_counter()
    task = Task(
        MLP(seed=seed), dataset.test_images, dataset.test_labels, recipe.learning_rate, recipe.threads, parallel_map
    )
    learner = competitor(name, task, recipe.form)
    assert isinstance(learner, Learner)
    curve: Curve = []
    batches: list[tuple[NDArray, NDArray]] = []
    images = 0
    for batch in shuffled_batches(len(dataset.train_images), recipe.batch_size, seed):
        batches.append((dataset.train_images[batch], dataset.train_labels[batch]))
        images += len(batch)
        if images // EVALUATE_EVERY > (images - len(batch)) // EVALUATE_EVERY:
            learner.learn_all(batches)
            batches = []
            accuracy = learner.accuracy()
            curve.append(Evaluation(time.perf_counter() - start, images, accuracy))
            if accuracy >= TARGET or images >= GIVE_UP_AFTER:
                break
    return curve


def held_out(dataset: Dataset) -> Dataset:
    """A data set whose test images are the last sixth of the training images (10,000 of MNIST)."""
    count = len(dataset.train_images) * 5 // 6
    images, labels = dataset.train_images, dataset.train_labels
    return Dataset(dataset.name, images[:count], labels[:count], images[count:], labels[count:])


def recipes_of(name: str, dataset: Dataset, parallel_map: Callable, quick: bool) -> list[Recipe]:
    """Recipes to try, with a peer's fastest form on each number of threads.

    Ours always use one thread for a small batch, and JAX all; for PyTorch, one thread and all are tried.

    Raises
    ------
    UnavailableError
        If no form can run here.
    """
    counts = sorted({1, available_cores()} if name in ON_ONE_THREAD_TOO else {available_cores()})
    forms = {count: form_in_batches(name, dataset, count, parallel_map) if name in PEERS else None for count in counts}
    pairs = itertools.product(
        BATCH_SIZES[1:2] if quick else BATCH_SIZES, LEARNING_RATES[1:3] if quick else LEARNING_RATES
    )
    return [Recipe(batch_size, rate, count, forms[count]) for batch_size, rate in pairs for count in counts]


def form_in_batches(name: str, dataset: Dataset, threads: int, parallel_map: Callable) -> str:
    """The verified form of a peer that is fastest over mini-batches."""
    few, size = limited(dataset, min(IMAGES_FOR_FORMS, len(dataset.train_images))), BATCH_SIZES[1]
    task = Task(MLP(), few.train_images, few.train_labels, LEARNING_RATES[0], threads, parallel_map)
    return best_form(name, task, expected_parameters(task, size), size)[1]


def try_recipes(name: str, dataset: Dataset, parallel_map: Callable, recipes: list[Recipe]) -> list[Trial]:
    """Try every recipe from two random starts, interleaved, and the three most promising ones from `TRIALS`."""
    for shape in {(recipe.batch_size, recipe.threads): recipe for recipe in recipes}.values():
        reach(name, dataset, shape, 0, parallel_map)  # compiles
    curves: dict[Recipe, list[Curve]] = {recipe: [] for recipe in recipes}

    def train(tried: list[Recipe], seeds: range) -> None:
        for seed in seeds:
            for recipe in tried:
                curves[recipe].append(reach(name, dataset, recipe, seed, parallel_map))

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
        raise UnavailableError(f"no recipe always reached {percent(TARGET)} on the held-out images")
    return trial.recipe


def _run_after_run(
    name: str, dataset: Dataset, recipe: Recipe, parallel_map: Callable, curves: list[Curve]
) -> Callable:
    """A function that trains from the next random start and appends the curve to `curves`."""
    return lambda: curves.append(reach(name, dataset, recipe, len(curves), parallel_map))


def naive_curves(dataset: Dataset, recipe: Recipe, parallel_map: Callable) -> list[Curve]:
    """NumPy's curves at pure Python's time per image, which is measured on a few images."""
    few = slice(NAIVE_IMAGES)
    images, labels = dataset.train_images[few], dataset.train_labels[few]
    learner = competitor("naive", Task(MLP(), images, labels, recipe.learning_rate, available_cores(), parallel_map))
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
            for order, point in enumerate(reach("numpy", dataset, recipe, seed, parallel_map))
        ]
        for seed in range(TRIALS)
    ]


def draw(result: Result, small_print: str, file: Path) -> None:
    """Above, accuracy against seconds: the median run and the ends of all. Below, seconds to the target."""
    times = {**result.times.rounds, "naive": Rounds([curve[-1].seconds for curve in result.naive])}
    names = sorted(times, key=lambda name: -times[name].median)
    every_curve = {**result.curves, "naive": result.naive}
    target, goal = 100 * result.target, percent(result.target)
    with figure_file(file, figsize=(8, 5.5)) as figure:
        above, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
        for name in names:
            style = "-" if name in result.times else "--"
            curves = sorted(every_curve[name], key=lambda curve: curve[-1].seconds)
            seconds, _, accuracies = np.array(curves[len(curves) // 2]).T
            above.plot(seconds, 100 * accuracies, style, color=colour(name))
            for end in [curve[-1] for curve in curves]:
                above.plot(end.seconds, 100 * end.accuracy, "o", color=colour(name), markersize=3)
        above.axhline(target, color=BOUND_COLOUR, linestyle="--", linewidth=1)
        above.set(ylabel="test accuracy (%)", ylim=(80, 95))
        above.annotate(goal, (0.01, target), xycoords=("axes fraction", "data"), va="bottom")
        for row, name in enumerate(names):
            first, last = min(times[name].seconds), max(times[name].seconds)
            below.plot([first, last], [row, row], color=colour(name), linewidth=2)
            below.plot(times[name].median, row, "o", color=colour(name))
            recipe = result.recipes[name]
            note = f"batches of {recipe.batch_size}, rate {recipe.learning_rate:g}"
            text = f"{in_seconds(times[name].median)}  ({note}"
            if name in result.times:
                label(below, f"{text})", last, row, 7.5)
            else:
                label(below, f"{text}, extrapolated)", first, row, 7.5, side=-1)
        below.set(xscale="log", yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5))
        below.set(xlabel=f"seconds, including preparation and evaluations (log scale); below: to {goal}")
        below.set_yticklabels(names)
        title(figure, _title(result))
        marks = "Above: the run of median duration, and a dot where each run ended. Below: their median and range."
        print_small(figure, f"{marks} Runs differ in their random start.\n{small_print}")


def _title(result: Result) -> str:
    """The competitor with the lowest median, and those whose ranges over random starts overlap with its range."""
    seconds, goal = result.times.seconds, percent(result.target)
    first, *others = sorted(seconds, key=result.times.median)
    level = [name for name in others if min(seconds[name]) <= max(seconds[first])]
    if level:
        *most, last = level
        names = f"{', '.join(most)} and {last}" if most else last
        return f"Seconds to {goal} test accuracy: {first}'s range overlaps with that of {names}"
    return f"{goal} test accuracy in {in_seconds(result.times.median(first))}: {first}"


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"
