"""What the benchmarks measured: read, and drawn."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.measure.interleave import summary
from bench.publish.style import bound, in_seconds, label, ordered, plain_ticks, short, small_print
from bench.studies.head_to_head import FRAMEWORKS
from model.extras.figure import OTHER_COLOURS, colour, figure_file, print_small, title
from model.published import history


class Timing(NamedTuple):
    """What was measured, and the median seconds of its rounds with a 95 % confidence interval."""

    info: dict[str, Any]
    seconds: float
    low: float
    high: float

    @property
    def gflop_per_second(self) -> float:
        """Floating-point operations of the dense form per second, in 10⁹."""
        return self.info["flop"] / self.seconds / 1e9

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % confidence interval."""
        return self.info["flop"] / self.high / 1e9, self.info["flop"] / self.low / 1e9


class Rung(NamedTuple):
    """A step of the ladder on so many threads, and BLAS on as many, measured in turn."""

    timing: Timing
    blas: float
    """GFLOP/s of BLAS."""
    of_blas: float
    """Speed as a share of BLAS's: median over the rounds."""


class Ladder(NamedTuple):
    """The steps of one product."""

    rungs: dict[tuple[str, int], Rung]
    """By step and number of threads."""

    @property
    def steps(self) -> list[str]:
        """Names, from the first step to the last."""
        return list(dict.fromkeys(step for step, _ in self.rungs))

    def blas(self, threads: int) -> float:
        """GFLOP/s of BLAS."""
        return float(np.median([rung.blas for (_, count), rung in self.rungs.items() if count == threads]))


class Results(NamedTuple):
    """A run of the benchmarks."""

    kernels: dict[str, dict[str, Timing]]
    """By kernel and backend, on one thread."""
    epochs: dict[str, Timing]
    """By backend, on all threads; of pure Python, scaled up from the images that it measured."""
    peak: dict[int, float]
    """BLAS at 2048³ in GFLOP/s, by number of threads."""
    ladders: dict[str, Ladder]
    """By product."""
    multiply_adds: dict[int, float]
    """What the multiply-add units can do, in GFLOP/s, by number of threads."""
    found: dict[str, Any]
    """What the studies found, by name."""
    dataset: str
    threads: int
    small_print: str

    @property
    def dense_floor(self) -> float:
        """Seconds that the two big products of an epoch take at BLAS's best rate."""
        info = next(iter(self.epochs.values())).info
        return info["flop_of_big_products"] / self.peak[self.threads] / 1e9


def load(file: Path) -> Results:
    """Read the JSON that the benchmarks wrote."""
    content = json.loads(file.read_text())
    kernels: dict[str, dict[str, Timing]] = {}
    epochs: dict[str, Timing] = {}
    peak: dict[int, float] = {}
    ladders: dict[str, Ladder] = {}
    multiply_adds: dict[int, float] = {}
    dataset, threads = "", 1
    for benchmark in content["benchmarks"]:
        info = benchmark["extra_info"]
        if "kernel" in info:
            kernels.setdefault(info["kernel"], {})[info["backend"]] = _timing(benchmark)
        elif "images" in info:
            factor = (info["extrapolated_to"] or info["images"]) / info["images"]
            epochs[info["backend"]] = _timing(benchmark, factor)
        elif "step" in info:
            ladders.setdefault(info["product"], Ladder({})).rungs[info["step"], info["threads"]] = _rung(benchmark)
        elif "peak" in info:
            multiply_adds[info["threads"]] = _timing(benchmark).gflop_per_second
        else:
            peak[info["threads"]] = _timing(benchmark).gflop_per_second
        dataset, threads = info.get("dataset", dataset), max(threads, info["threads"])
    origin = small_print(content["machine_info"], content["datetime"], dataset, content["quick"])
    found = {name: section["found"] for name, section in content.get("studies", {}).items()}
    return Results(kernels, epochs, peak, ladders, multiply_adds, found, dataset, threads, origin)


def _timing(benchmark: dict[str, Any], factor: float = 1.0) -> Timing:
    seconds = summary(factor * np.array(benchmark["stats"]["data"]))
    return Timing(benchmark["extra_info"], seconds["median"], seconds["low"], seconds["high"])


def _rung(benchmark: dict[str, Any]) -> Rung:
    timing = _timing(benchmark)
    blas = timing.info["blas_flop"] / np.array(timing.info["blas_seconds"]) / 1e9
    speed = timing.info["flop"] / np.array(benchmark["stats"]["data"]) / 1e9
    return Rung(timing, float(np.median(blas)), float(np.median(speed / blas)))


def draw_benchmarks(file: Path, folder: Path) -> list[Path]:
    """Draw every figure that the benchmarks in `file` have results for into `folder`; return the files drawn."""
    results = load(file)
    drawn = []
    if results.epochs and results.peak:
        drawn.append(folder / "overview.png")
        draw_overview(results, drawn[-1])
    if results.kernels and results.peak:
        drawn.append(folder / "kernels.png")
        draw_kernels(results, drawn[-1])
    if results.ladders and results.multiply_adds:
        drawn.append(folder / "ladder.png")
        draw_ladder(results, drawn[-1])
    return drawn


IDEAS = {
    "naive": "Python loops",
    "numpy": "whole arrays, products by BLAS",
    "numba": "tiles in vector registers",
    "sparse": "the same, zeros left out",
}


def draw_overview(results: Results, file: Path) -> None:
    """Seconds per epoch from the slowest to the fastest, what made the difference, and the accuracy reached."""
    rows = dict(sorted({**results.epochs, **_interleaved(results)}.items(), key=lambda row: -row[1].seconds))
    accuracies = _accuracies(results.found.get("reproduction"))
    with figure_file(file, figsize=(8, 1.9 + 0.42 * len(rows))) as figure:
        axes = figure.subplots()
        for row, (name, epoch) in enumerate(rows.items()):
            extrapolated = epoch.info.get("extrapolated_to")
            shade = colour(name) if name in results.epochs else "#BBBBBB"
            axes.barh(row, epoch.seconds, color=shade, hatch="//" if extrapolated else None, edgecolor="white")
            axes.plot([epoch.low, epoch.high], [row, row], color="black", linewidth=1.5)
            notes = [IDEAS.get(name), f"extrapolated from {epoch.info['images']} images" if extrapolated else ""]
            text = f"{in_seconds(epoch.seconds)}   {', '.join(filter(None, notes))}"
            inside = epoch.seconds > 100 * results.dense_floor
            label(axes, text, epoch.seconds if inside else epoch.high, row, side=-1 if inside else 1)
            axes.text(
                1.16, row, accuracies.get(name, ""), transform=axes.get_yaxis_transform(), ha="right", va="center"
            )
        if accuracies:
            axes.text(1.16, -1, "test accuracy", transform=axes.get_yaxis_transform(), ha="right", va="center")
        axes.set(xscale="log", xlabel="seconds per epoch (log scale)", yticks=range(len(rows)))
        axes.set(ylim=(len(rows) - 0.4, -1.4), yticklabels=rows)
        times = [epoch.seconds for epoch in rows.values()]
        axes.set_xlim(min(times) / 5, max(times) * 1.5)
        plain_ticks(axes.xaxis)
        floor = in_seconds(results.dense_floor)
        bound(axes, results.dense_floor, f"dense floor: {floor}, the two big products at BLAS's best rate", -1)
        title(figure, _overview_title(rows))
        print_small(figure, "\n".join(filter(None, (_equal(results), results.small_print))))


def draw_kernels(results: Results, file: Path) -> None:
    """Throughput of each kernel on each backend, on one thread."""
    names = ordered({name for timings in results.kernels.values() for name in timings})
    height = 0.8 / len(names)
    with figure_file(file, figsize=(8, 1.4 + 0.15 * len(names) * len(results.kernels))) as figure:
        axes = figure.subplots()
        for row, timings in enumerate(results.kernels.values()):
            for order, name in enumerate(name for name in names if name in timings):
                timing = timings[name]
                slowest, fastest = timing.interval
                rate = timing.gflop_per_second
                y = row + (order - (len(names) - 1) / 2) * height
                axes.barh(y, rate, height, color=colour(name))
                axes.plot([slowest, fastest], [y, y], color="black", linewidth=1)
                label(axes, short(rate) + (f"  {name}" if row == 0 else ""), fastest, y, fontsize=7)
        axes.set(xscale="log", xlabel="GFLOP/s of the dense form, one thread (log scale)")
        axes.set(yticks=range(len(results.kernels)), ylim=(len(results.kernels) - 0.4, -1))
        axes.set_yticklabels(results.kernels)
        axes.margins(x=0.2)
        plain_ticks(axes.xaxis)
        bound(axes, results.peak[1], f"BLAS at 2048³: {results.peak[1]:.0f}", -0.75)
        title(figure, _kernels_title(results.kernels))
        print_small(figure, results.small_print)


def draw_ladder(results: Results, file: Path) -> None:
    """Throughput of each step of the ladder on one and on all threads, BLAS's, and what the machine could do."""
    # Colours that no backend has.
    looks = {
        1: (OTHER_COLOURS[1], "o", "one thread"),
        results.threads: (OTHER_COLOURS[0], "D", "all threads"),
    }
    with figure_file(file, figsize=(8, 4)) as figure:
        panels = figure.subplots(1, len(results.ladders), sharex=True, sharey=True, squeeze=False)[0]
        for axes, (product, ladder) in zip(panels, results.ladders.items()):
            for threads, (shade, marker, words) in looks.items():
                points = [
                    (rung.timing.gflop_per_second, ladder.steps.index(step))
                    for (step, count), rung in ladder.rungs.items()
                    if count == threads
                ]
                axes.plot(*zip(*points), marker, color=shade, markersize=5, label=f"step, {words}", zorder=4)
                for (step, count), rung in ladder.rungs.items():
                    if count == threads:
                        row = ladder.steps.index(step)
                        axes.plot(rung.timing.interval, [row, row], color="black", linewidth=1, zorder=6)
                axes.axvline(ladder.blas(threads), color=shade, linestyle="--", linewidth=1, label=f"BLAS, {words}")
                axes.axvline(results.multiply_adds[threads], color=shade, linewidth=1, label=f"peak, {words}")
            for row, step in enumerate(ladder.steps):
                rates = sorted(rung.timing.gflop_per_second for (name, _), rung in ladder.rungs.items() if name == step)
                for rate in rates:
                    label(axes, short(rate), rate, row, fontsize=7, side=1 if rate == rates[-1] else -1)
            axes.set(xscale="log", xlabel=f"GFLOP/s at {product} (log scale)")
            axes.set(yticks=range(len(ladder.steps)), ylim=(len(ladder.steps) - 0.5, -0.5))
            axes.set_yticklabels(ladder.steps)
        panels[0].margins(x=0.25)
        for axes in panels:
            plain_ticks(axes.xaxis)
        panels[0].legend(loc="lower left", frameon=False, fontsize=7)
        title(figure, _ladder_title(results))
        print_small(figure, results.small_print)


def _ladder_title(results: Results) -> str:
    shares, gains = [], []
    for product, ladder in results.ladders.items():
        rungs = [rung for (_, threads), rung in ladder.rungs.items() if threads == 1]
        shares.append(f"{100 * rungs[-1].of_blas:.0f} % ({product})")
        gains.append(rungs[-1].timing.gflop_per_second / rungs[0].timing.gflop_per_second)
    return f"One thread reaches {' and '.join(shares)} of BLAS, at least {short(min(gains))} × the Python loops"


def _interleaved(results: Results) -> dict[str, Timing]:
    """Seconds per epoch of competitors that were measured in turn, other packages among them."""
    seconds = results.found["head_to_head"]["seconds"] if "head_to_head" in results.found else {}
    return {name: Timing({}, *times) for form in ("dense", "sparse") for name, times in seconds.get(form, {}).items()}


def _accuracies(found: dict[str, Any] | None) -> dict[str, str]:
    """Test accuracy of each backend in percent, after the published experiment or pure Python's mini-batches."""
    histories = {name: history(run) for name, run in found["runs"].items()} if found else {}
    return {name: f"{run.epochs[-1].test_accuracy:.2%}".replace("%", " %") for name, run in histories.items()}


def _equal(results: Results) -> str:
    found, parts = results.found, []
    if "reproduction" in found:
        parts.append("Accuracy after 250 epochs; naive, after one in mini-batches.")
    if "scaling" in found:
        threads = " and ".join(map(str, found["scaling"]["equal_bits_on_threads"]))
        parts.append(f"Each compiled backend ends at the same bits on {threads} threads.")
    return " ".join(parts)


def _overview_title(epochs: dict[str, Timing]) -> str:
    first, *slower = sorted(epochs, key=lambda name: epochs[name].seconds)
    framework = [name for name in slower if name in FRAMEWORKS][:1]
    others = [name for name in ("numpy", *framework, "naive") if name in slower]
    speeds = [f"{short(epochs[name].seconds / epochs[first].seconds)} × as fast as {name}" for name in others]
    return f"{first} trains " + (", ".join(speeds) if speeds else f"an epoch in {in_seconds(epochs[first].seconds)}")


def _kernels_title(kernels: dict[str, dict[str, Timing]]) -> str:
    forward = {name: timing.gflop_per_second for name, timing in kernels["forward product"].items()}
    fastest = max(forward, key=lambda name: forward[name])
    slowest = min(forward, key=lambda name: forward[name])
    return (
        f"{fastest} multiplies {short(forward[fastest] / forward[slowest])} × as fast as {slowest}: "
        f"{short(forward[fastest])} against {short(forward[slowest])} GFLOP/s in the forward product"
    )
