"""Records, folders of results, claims, figures and the report."""

import dataclasses
import errno
import os
import re
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.axes import Axes
from pydantic import TypeAdapter

from bench import commands
from bench.measure.machine import blas_threads, caches, kernels_changed, machine
from bench.measure.records import Cache, Comparison, Conditions, RecordError, Rounds, Run, Section, read, write
from bench.peers import Form, pytorch
from bench.publish import claims, tables
from bench.publish.figures import draw_all
from bench.publish.folder import Folder, check_machine, existing_run, numbered, read_all, read_folder, save
from bench.publish.report import CAPTIONS, write_report
from bench.publish.style import beside_numpy, over_runs, ratio_over_runs, small_print
from bench.publish.tables import (
    PUBLISHED_RESULTS,
    ROOT,
    STEPS,
    claim_table,
    competitor_table,
    folders,
    form_table,
    main_folder,
    refresh,
)
from bench.studies import (
    STUDIES,
    epochs,
    head_to_head,
    ladder,
    memory,
    mini_batches,
    products,
    roofline,
    study,
    time_to_accuracy,
)
from model.environment import Environment
from tests.support.claims import CLAIMED
from tests.support.systems import forks, needs_posix

ENVIRONMENT = Environment("a CPU", 2, "Linux x86_64", "3", [], "20.0.0", {}, {}, "abc")
CONDITIONS = Conditions("2026-01-01T00:00:00", "MNIST", False, "abc", 0.1, 0.0, 1.0, None, ENVIRONMENT)


def run_of(**seconds):
    result = epochs.Result(Comparison("an epoch", seconds), 60_000, {}, 2)
    return Run({"epochs": Section(CONDITIONS, result)})


def run_text(**seconds):
    """The content of its file."""
    return TypeAdapter(Run).dump_json(run_of(**seconds)).decode()


def test_records_survive_a_round_trip(tmp_path):
    run = run_of(numpy=[1.0, 2.0], numba=[0.5, 0.25])
    save(tmp_path, machine(), run)
    assert read_folder(tmp_path).runs == [run]
    assert read_folder(tmp_path).machine == machine()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        '{"kind": "machine"}',
        '{"kind": "run", "sections": {"epochs": {}}}',
        run_text(numpy=[]),
        run_text(numpy=[1.0, 0.0]),
        run_text(numpy=[1.0, -1.0]),
        run_text(numpy=[2.5]).replace("2.5", "NaN"),
        run_text(numpy=[2.5]).replace("2.5", "Infinity"),
        run_text(numpy=[2.5]).replace('"packages":{},', ""),
        '{"kind": "run", "sec',
    ],
)
def test_a_damaged_file_is_reported_before_any_work(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RecordError, match=r"run.json is not a valid run"):
        existing_run(tmp_path)
    assert (tmp_path / "run.json").read_text() == text


def test_the_table_of_a_step_needs_its_parts(tmp_path):
    """Without the study, the text stays."""
    text = "<!-- steps -->\nold\n<!-- /steps -->"
    seconds = {part: [1e-6 * n] for n, part in enumerate([*mini_batches.PARTS, mini_batches.WHOLE], 1)}
    parts = {size: dict.fromkeys(mini_batches.BACKENDS, Comparison("", seconds)) for size in (32, 512)}
    (tmp_path / "here").mkdir()
    texts = []
    for run in run_of(numpy=[1.0]), Run({"mini_batches": Section(CONDITIONS, mini_batches.Result({}, {}, parts, {}))}):
        save(tmp_path / "here", machine(), run)
        folders.cache_clear()
        texts.append(refresh(text, tmp_path))
    assert texts[0] == text
    table = texts[1].splitlines()
    assert re.findall(r"(\w+), (\d+) images", table[1]) == [(name, str(size)) for size, name in STEPS]
    rows = cells(table[3:])
    assert [row[0] for row in rows] == list(seconds)
    assert [float(row[1]) for row in rows] == list(range(1, len(rows) + 1))


def cells(lines):
    """The cells of the rows of a Markdown table."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_the_competitors_stand_with_their_errors(tmp_path):
    steps = Comparison("", {"numpy": [3.0], "PyTorch bfloat16": [0.5], head_to_head.BIG_PRODUCTS: [2.0]})
    tried = {
        "numpy": {"ours": Form(error=1.2e-7)},
        "PyTorch bfloat16": {"slow": Form(error=0.1), "autocast": Form(error=0.0017)},
    }
    categories = {"dense": ["numpy"], "bfloat16": ["PyTorch bfloat16"]}
    chosen = {"numpy": "ours", "PyTorch bfloat16": "autocast"}
    sections = {
        "head_to_head": Section(CONDITIONS, head_to_head.Result(categories, steps, tried, chosen)),
        "memory": Section(CONDITIONS, memory.Result({"numpy": 195_000_000}, {})),
    }
    (tmp_path / "here").mkdir()
    save(tmp_path / "here", machine(), Run(sections))
    header, _, *rows = cells(competitor_table(tmp_path).splitlines())
    error = header.index("error")
    assert {row[0]: (row[1], row[error]) for row in rows} == {
        "numpy": ("dense", "1.2e-07"),
        "PyTorch bfloat16": ("bfloat16: autocast", "1.7e-03"),
        head_to_head.BIG_PRODUCTS: ("reference", ""),
    }


def test_every_form_stands_relative_to_the_fastest_in_its_run(tmp_path):
    """A peer with one form has no row."""
    (tmp_path / "here").mkdir()
    write(tmp_path / "here" / "machine.json", machine())
    for number, seconds in enumerate(((2.0, 1.0), (4.0, 6.0)), 1):
        forms = {form: Form(seconds=time) for form, time in zip(("MKL", "oneDNN"), seconds, strict=True)}
        tried = {
            "numpy": {"ours": Form()},
            "PyTorch": {**forms, "other": Form(skipped="no such CPU")},
            "JAX": {"scan": Form(), "call": Form(skipped="no memory")},
        }
        result = head_to_head.Result({}, Comparison("", {"PyTorch": [1.0]}), tried)
        batches = mini_batches.Result({}, {}, {}, {1: {128: {"PyTorch": forms}}})
        sections = {"head_to_head": Section(CONDITIONS, result), "mini_batches": Section(CONDITIONS, batches)}
        write(tmp_path / "here" / f"run-{number}.json", Run(sections))
    assert cells(form_table(tmp_path).splitlines())[2:] == [
        ["PyTorch", "MKL", *["1.00 to 2.00", "1 of 2 runs"] * 2],
        ["PyTorch", "oneDNN", *["1.00 to 1.50", "1 of 2 runs"] * 2],
        ["PyTorch", "other", "skipped: no such CPU", "", "", ""],
        ["JAX", "scan", "the only one that runs", "", "", ""],
        ["JAX", "call", "skipped: no memory", "", "", ""],
    ]


def test_an_unknown_study_is_refused(tmp_path):
    write(tmp_path / "run.json", run_of(numpy=[1.0]))
    text = (tmp_path / "run.json").read_text().replace('"epochs": {', '"no_study": {', 1)
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RecordError, match="no study no_study"):
        read(Run, tmp_path / "run.json")


def test_no_interval_from_few_rounds():
    assert Rounds([1.0, 2.0, 3.0, 4.0, 5.0]).interval is None
    low, high = Rounds([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).interval
    assert 1 <= low <= 3.5 <= high <= 6


def test_ratio_is_of_medians():
    ratio = Comparison("", {"a": [2.0] * 6, "b": [4.0, 4.0, 4.0, 4.0, 4.0, 40.0]}).ratio("a", "b")
    assert (ratio.ratio, ratio.base_seconds, ratio.verdict) == (0.5, 4.0, "faster")


@pytest.mark.parametrize(
    ("numba", "verdict"), [((0.5, 0.9), "faster"), ((0.5, 1.1), "undecided"), ((1.2, 1.1), "slower")]
)
def test_a_verdict_needs_all_runs(tmp_path, numba, verdict):
    folder = Folder(tmp_path, machine(), [run_of(numpy=[1.0] * 6, numba=[time] * 6) for time in numba])
    cell = claims.cell(claims.BY_KEY["numba-numpy"], folder)
    assert (cell.low, cell.high, cell.verdict) == (min(numba), max(numba), verdict)
    words = claims.where(claims.BY_KEY["numba-numpy"], [folder])
    assert words == ("on " if verdict == "faster" else "not on ") + folder.machine.name


@pytest.mark.parametrize(
    ("ours", "verdict"), [([0.5] * 6, "faster"), ([0.5] * 5 + [1.2], "undecided"), ([1.4] * 6, "slower")]
)
def test_no_ranking_where_ranges_over_random_starts_overlap(tmp_path, ours, verdict):
    """Though the medians differ by half."""
    times = Comparison("", {"numba": ours, "numpy": [1.0] * 5 + [1.3]})
    section = Section(CONDITIONS, time_to_accuracy.Result(0.9221, {}, {}, times, {}, [], {}))
    folder = Folder(tmp_path, machine(), [Run({"time_to_accuracy": section})])
    assert claims.cell(claims.BY_KEY["time-numba"], folder).verdict == verdict


def busy(run):
    """The same run on a busy machine."""
    conditions = dataclasses.replace(CONDITIONS, busy="other processes kept 0.4 cores busy")
    return Run({name: Section(conditions, section.result) for name, section in run.sections.items()})


def test_a_cell_says_what_weakens_its_evidence(tmp_path):
    claim = claims.BY_KEY["numba-numpy"]
    few, many = ({"numpy": [1.0] * rounds, "numba": [0.5] * rounds} for rounds in (5, 6))
    texts = {
        (): "✓ 0.50 × 1.0 s",
        ("busy",): "✓ 0.50 × 1.0 s, 1 of 2 busy",
        ("few",): "✓ 0.50 × 1.0 s, no interval",
    }
    for weak, text in texts.items():
        run = run_of(**few if "few" in weak else many)
        folder = Folder(tmp_path, machine(), [busy(run) if "busy" in weak else run, run])
        assert claims.cell_text(claims.cell(claim, folder), claim.base) == text
    alone = Folder(tmp_path, machine(), [busy(run_of(**few))])
    assert claims.cell_text(claims.cell(claim, alone), claim.base) == "✓ 0.50 × 1.0 s, 1 run, no interval, busy"


def test_figures_come_from_an_idle_machine_if_possible(tmp_path):
    disturbed, idle, later = busy(run_of(numpy=[1.0])), run_of(numpy=[2.0]), run_of(numpy=[3.0])
    assert Folder(tmp_path, machine(), [disturbed, idle, later]).section("epochs") == idle.sections["epochs"]
    assert Folder(tmp_path, machine(), [disturbed]).section("epochs") == disturbed.sections["epochs"]


@pytest.mark.parametrize(("threads_per_core", "word"), [(1, "2 cores"), (2, "2 threads"), (None, "2 threads")])
def test_the_small_print_says_what_is_known(threads_per_core, word):
    here = dataclasses.replace(machine(), name="Zen 3", cpu="EPYC", threads_per_core=threads_per_core)
    (section,) = busy(run_of(numpy=[1.0])).sections.values()
    first, _ = small_print(section, here).splitlines()
    assert first == f"busy machine: other processes kept 0.4 cores busy; MNIST; Zen 3 (EPYC), {word}; float32"


def test_machines_of_one_name_stay_apart(tmp_path):
    """One column each, and a claim that holds on one of them."""
    for name, numba in (("zen-3-2", 0.5), ("zen-3-64", 2.0)):
        (tmp_path / name).mkdir()
        save(tmp_path / name, dataclasses.replace(machine(), name="Zen 3"), run_of(numpy=[1.0] * 6, numba=[numba] * 6))
    every = read_all(tmp_path)
    claim = claims.BY_KEY["numba-numpy"]
    assert list(claims.cells(claim, every)) == ["Zen 3 (zen-3-2)", "Zen 3 (zen-3-64)"]
    assert claims.where(claim, every) == "on 1 of 2 machines (Zen 3 (zen-3-2))"
    header, _, row = cells(claim_table(tmp_path).splitlines())
    assert header[1:3] == ["Zen 3 (zen-3-2), at abc", "Zen 3 (zen-3-64), at abc"]
    assert row[1:] == ["✓ 0.50 × 1.0 s, 1 run", "✗ 2.00 × 1.0 s, 1 run", "1 of 2"]


@pytest.mark.parametrize(
    "other",
    [{"cpu": "Another"}, {"model": 17}, {"cores": 4}, {"caches": [Cache(1, 49152, 1)]}, {"hypervisor": None}],
)
def test_a_folder_takes_the_runs_of_one_machine(tmp_path, other):
    one = dataclasses.replace(
        machine(), cpu="One", family=25, model=1, cores=2, caches=[Cache(1, 32768, 1)], hypervisor="Xen"
    )
    save(tmp_path, one, run_of(numpy=[1.0]))
    check_machine(tmp_path, dataclasses.replace(one, model=None, caches=[]))
    (name,) = other
    with pytest.raises(RecordError, match=f"runs of another machine, whose {name} is"):
        check_machine(tmp_path, dataclasses.replace(one, **other))
    with pytest.raises(RecordError, match="runs of another machine, whose cpu is One"):
        existing_run(tmp_path)


def test_without_history_the_table_of_machines_stays(tmp_path, monkeypatch):
    """In a shallow clone, git cannot tell whether kernels/ has changed."""
    (tmp_path / "here").mkdir()
    save(tmp_path / "here", machine(), run_of(numpy=[1.0]))
    assert kernels_changed("no-such-commit") is None
    text = "<!-- machines -->\nold\n<!-- /machines -->"
    monkeypatch.setattr(tables, "has_history", lambda: False)
    assert refresh(text, tmp_path) == text
    monkeypatch.setattr(tables, "has_history", lambda: True)
    header, _, row = cells(refresh(text, tmp_path).splitlines())
    assert row[header.index("kernels/ since then")] == "unknown commit"
    for changed, word in ((True, "changed"), (False, "unchanged")):
        monkeypatch.setattr(tables, "kernels_changed", lambda commit, changed=changed: changed)
        assert cells(refresh(text, tmp_path).splitlines())[2][header.index("kernels/ since then")] == word


def test_kernels_have_changed_if_they_did_since_any_commit(monkeypatch):
    changes = {"old": 1, "new": 0, "lost": 128}

    def diff(*arguments):
        if code := changes[arguments[2]]:
            raise subprocess.CalledProcessError(code, "git")

    monkeypatch.setattr("bench.measure.machine.git", diff)
    assert kernels_changed("old", "new") is True
    assert kernels_changed("lost", "old", "new") is True
    assert kernels_changed("lost", "new") is None
    assert kernels_changed("new") is False


def test_the_peak_bounds_a_ratio(tmp_path):
    """10 GFLOP/s: a product of 2 · 1024³ operations takes 0.21 s at least. Without a peak, there is no bound."""
    slow = Run({"roofline": Section(CONDITIONS, roofline.Result(10.0, {}, 1, []))})
    claim = claims.BY_KEY["product-1024-openblas-1"]
    assert claim.at_peak(Folder(tmp_path, machine(), [slow])) == pytest.approx(2 * 1024**3 / 1e10)
    assert claim.at_peak(Folder(tmp_path, machine(), [])) is None
    assert claims.BY_KEY["sparse-numpy"].at_peak(Folder(tmp_path, machine(), [slow])) is None


def test_the_ladder_is_claimed_for_both_products_and_all_threads(tmp_path):
    """Step and ratio tell the four places apart. The peak is 2 GFLOP/s per thread."""
    places = {("MLP", 1): 0.5, ("MLP", 4): 0.6, ("1024³", 1): 0.7, ("1024³", 4): 0.8}
    climbs = [
        ladder.Climb(
            product,
            threads,
            Comparison("", {ladder.BLAS: [1.0], "vectors": [share if threads == 1 else 9.0], "threads": [share]}),
            2.0 * threads,
        )
        for (product, threads), share in places.items()
    ]
    folder = Folder(tmp_path, machine(), [Run({"ladder": Section(CONDITIONS, ladder.Result(climbs, {}))})])
    for key, ratio, bound in (
        ("mlp-1", 0.5, 1 / 2),
        ("mlp-all", 0.6, 1 / 8),
        ("1024-1", 0.7, 1 / 2),
        ("1024-all", 0.8, 1 / 8),
    ):
        claim = claims.BY_KEY[f"ladder-{key}"]
        assert (claims.cell(claim, folder).low, claim.at_peak(folder)) == (ratio, bound)


def test_the_bound_of_sparse_counts_non_zeros_only(tmp_path):
    """A fifth of the pixels of 60,000 images are non-zero."""
    dense = 60_000 * claims.FLOP_OF_IMAGE
    placed = [
        roofline.Placed(name, which, dense // share, 1.0, Rounds([1.0]))
        for name, share in (("numba", 1), ("sparse", 5))
        for which in ("forward", "backward")
    ]
    run = Run({"roofline": Section(CONDITIONS, roofline.Result(10.0, {}, dense, placed))})
    folder = Folder(tmp_path, machine(), [run])
    numba, sparse = (claims.BY_KEY[f"batch-{key}-128"].at_peak(folder) for key in ("numba-torch", "sparse-torch"))
    assert numba == pytest.approx(128 * 2 * claims.FLOP_OF_IMAGE / 1e10)
    assert sparse == pytest.approx(numba / 5)


def test_stored_results_are_drawn_without_optional_packages(tmp_path):
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['distributed', 'dask', 'psutil']))\n"
        "from bench.commands import draw\n"
        "from pathlib import Path\n"
        f"draw(Path({str(main_folder(PUBLISHED_RESULTS).path)!r}), Path({str(tmp_path)!r}))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "scaling.png").exists()


def test_every_figure_has_a_caption():
    drawn = [name for name in STUDIES if hasattr(study(name), "draw")]
    assert set(CAPTIONS) == {"claims", *drawn}
    for caption in CAPTIONS.values():
        assert [len(re.findall(r"[.?!](?=\s|$)", text)) for text in caption] == [1, 1], caption


def test_mkl_reports_its_code_path(monkeypatch):
    printed = "MKL_VERBOSE oneMKL 2024.0 for AVX2, Lnx\nMKL_VERBOSE SGEMM(N,N,64)\n"
    monkeypatch.setattr(pytorch.subprocess, "run", lambda *command, **options: SimpleNamespace(stdout=printed))
    assert pytorch.mkl_code_path.__wrapped__() == "oneMKL 2024.0 for AVX2, Lnx"
    printed = ""  # without PyTorch
    assert pytorch.mkl_code_path.__wrapped__() is None


def test_caches_are_read_from_the_system(tmp_path):
    for index, (level, kind, size, cpus) in enumerate(
        [(1, "Data", "48K", "0"), (1, "Instruction", "32K", "0"), (3, "Unified", "32M", "0-3,8")]
    ):
        place = tmp_path / "cache" / f"index{index}"
        place.mkdir(parents=True)
        for name, value in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", cpus)):
            (place / name).write_text(f"{value}\n")
    assert [(c.level, c.bytes, c.shared_by) for c in caches(tmp_path)] == [(1, 48 * 1024, 1), (3, 32 * 2**20, 5)]


class Parser(HTMLParser):
    """Collects the tags and addresses of a page."""

    def __init__(self):
        super().__init__()
        self.opened, self.addresses = [], []

    def handle_starttag(self, tag, attributes):
        self.opened.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]


def test_the_report_is_one_file_and_its_titles_claim_nothing(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr("matplotlib.figure.Figure.suptitle", lambda self, text, **look: titles.append(text))
    said = []
    folder = main_folder(PUBLISHED_RESULTS)
    figures = draw_all(folder, tmp_path, said.append)
    report = write_report(folder, figures, tmp_path, {"ladder": "it was not selected"})
    page = Parser()
    page.feed(report.read_text(encoding="utf-8"))
    assert said == []
    assert page.opened.count("img") == len(list(tmp_path.glob("*.png"))) == page.opened.count("figcaption") > 2
    assert all(address.startswith("data:") for address in page.addresses)
    assert "it was not selected" in report.read_text(encoding="utf-8")
    assert [title for title in titles if CLAIMED.search(title)] == []


def test_the_report_spans_the_intervals_of_all_runs(tmp_path):
    """One run has too few rounds for an interval."""
    runs = [run_of(numpy=[1.0] * rounds, numba=[time] * rounds) for rounds, time in ((6, 0.5), (6, 0.9), (2, 0.1))]
    text = write_report(Folder(tmp_path, machine(), runs), {}, tmp_path, {}).read_text()
    assert "<td>0.10 to 0.90</td>" in text
    assert "<td>0.50 to 0.90</td>" in text


def test_the_report_says_why_a_form_was_skipped(tmp_path):
    tried = {"PyTorch": {"MKL": Form(seconds=0.5), "oneDNN": Form(skipped="oneDNN needs AVX-512")}}
    result = head_to_head.Result({"dense": ["PyTorch"]}, Comparison("", {"PyTorch": [1.0]}), tried)
    run = Run({"head_to_head": Section(CONDITIONS, result)})
    text = write_report(Folder(tmp_path, machine(), [run]), {}, tmp_path, {}).read_text()
    assert "<td>head_to_head: PyTorch, oneDNN</td><td>oneDNN needs AVX-512</td>" in text
    assert "PyTorch, MKL" not in text


def test_figures_show_the_range_over_idle_runs(tmp_path, monkeypatch):
    titles, notes = [], []
    monkeypatch.setattr("matplotlib.figure.Figure.suptitle", lambda self, text, **look: titles.append(text))
    monkeypatch.setattr(epochs, "print_small", lambda figure, text: notes.append(text))
    runs = [run_of(numpy=[1.0] * 6, numba=[seconds] * 6) for seconds in (0.88, 0.77, 0.82)]
    disturbed = busy(run_of(numpy=[1.0], numba=[3.0]))
    draw_all(Folder(tmp_path, machine(), [disturbed, *runs]), tmp_path, pytest.fail)
    assert titles[-1].endswith("time relative to numpy: numba 0.77–0.88")
    assert "medians of 3 runs with their range" in notes[-1]
    draw_all(Folder(tmp_path, machine(), runs[:1]), tmp_path, pytest.fail)
    assert titles[-1].endswith("time relative to numpy: numba 0.88")
    assert "95 % intervals" in notes[-1]


@pytest.mark.parametrize(("numba", "hollow"), [((0.5, 0.6), False), ((0.5, 1.1), True)])
def test_undecided_claims_are_hollow(tmp_path, monkeypatch, numba, hollow):
    faces = []
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda *place, **look: faces.append(look.get("markerfacecolor")) or plot(*place, **look)
    )
    runs = [run_of(numpy=[1.0] * 6, numba=[seconds] * 6) for seconds in numba]
    claims.draw([Folder(tmp_path, machine(), runs)], tmp_path / "claims.png")
    assert ("white" in faces) == hollow
    assert any(faces)


def test_a_span_is_of_medians_over_runs():
    runs = [Comparison("", {"numpy": [2.0] * 5 + [9.0], "numba": [s] * 5 + [50.0]}) for s in (1.0, 4.0, 3.0)]
    runs.append(Comparison("", {"numpy": [2.0]}))
    assert over_runs(runs, "numba") == (3.0, 1.0, 4.0)
    assert ratio_over_runs(runs, "numba", "numpy") == (1.5, 0.5, 2.0)
    alone = runs[0].rounds["numba"]
    assert over_runs(runs[:1], "numba") == (1.0, alone.low, alone.high)
    assert alone.low < alone.high


def test_titles_compare_the_backends_and_the_fastest_package_with_numpy():
    seconds = [{"numpy": 2.0, "numba": 1.0, "JAX": 3.0, "PyTorch": 9.0}, {"numpy": 2.0, "numba": 1.5, "JAX": 3.0}]
    runs = [Comparison("", {name: [median] * 6 for name, median in each.items()}) for each in seconds]
    words = beside_numpy(runs, ["numba", "numpy"], ["PyTorch", "JAX"])
    assert words == "time relative to numpy: numba 0.50–0.75, JAX 1.50"


def test_names_of_any_length_and_script_are_drawn(tmp_path):
    seconds = {"numpy": [1.0], "稀疏后端": [0.5], "x" * 100: [2.0]}
    said = []
    draw_all(Folder(tmp_path, machine(), [run_of(**seconds)]), tmp_path, said.append)
    assert said == []
    assert {file.name for file in tmp_path.glob("*.png")} == {"epochs.png"}


def test_a_failing_figure_is_an_error_after_the_report(tmp_path, monkeypatch, capsys):
    save(tmp_path, machine(), run_of(numpy=[1.0]))
    (tmp_path / "ladder.png").touch()  # an older one
    monkeypatch.setattr("sys.argv", ["bench", "draw", str(tmp_path), "--output", str(tmp_path)])
    drawn, failed = f"{tmp_path / 'epochs.png'}", "epochs.png was not drawn: TypeError"
    for draw, code, shown in (epochs.draw, 0, drawn), (lambda: None, 1, failed):
        monkeypatch.setattr(epochs, "draw", draw)
        with pytest.raises(SystemExit) as raised:
            commands.main()
        first, last = capsys.readouterr().out.splitlines()
        assert (raised.value.code or 0, first.startswith(shown)) == (code, True)
        assert last == f"report: {tmp_path / 'report.html'}"


def test_a_failing_figure_is_one_line(tmp_path, monkeypatch):
    def fail(*arguments):
        raise ValueError("no ink")

    monkeypatch.setattr(epochs, "draw", fail)
    said = []
    drawn = draw_all(Folder(tmp_path, machine(), [run_of(numpy=[1.0], numba=[2.0])]), tmp_path, said.append)
    assert said == ["epochs.png was not drawn: ValueError: no ink"]
    assert list(drawn) == ["claims"]


@pytest.mark.parametrize("error", [ValueError("no ink"), KeyboardInterrupt()])
def test_a_figure_that_is_not_finished_stays_as_it_was(tmp_path, monkeypatch, error):
    """Though part of the new one has been written."""

    def draw(runs, small_print, file):
        file.write_bytes(b"half")
        raise error

    old = tmp_path / "epochs.png"
    old.write_bytes(b"old")
    monkeypatch.setattr(epochs, "draw", draw)
    with pytest.raises(KeyboardInterrupt) if isinstance(error, KeyboardInterrupt) else nullcontext():
        draw_all(Folder(tmp_path, machine(), [run_of(numpy=[1.0])]), tmp_path, str)
    assert old.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [old]


def test_a_figure_without_data_is_removed(tmp_path):
    """The claims need two competitors, and a sweep the products' figure."""
    for name in "claims", "products":
        (tmp_path / f"{name}.png").touch()
    runs = [Run({**run_of(numpy=[1.0]).sections, "products": Section(CONDITIONS, products.Result([]))})]
    assert list(draw_all(Folder(tmp_path, machine(), runs), tmp_path, pytest.fail)) == ["epochs"]
    assert list(tmp_path.iterdir()) == [tmp_path / "epochs.png"]


@pytest.fixture
def publishing(tmp_path, monkeypatch):
    """A folder with a document and the results of two machines, and the command that publishes them."""
    for name in "one", "two":
        (tmp_path / "results" / name).mkdir(parents=True)
        save(tmp_path / "results" / name, dataclasses.replace(machine(), name=name), run_of(numpy=[1.0], numba=[0.5]))
    (tmp_path / "README.md").write_text("<!-- claims -->\nold\n<!-- /claims -->\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "PUBLISHED_RESULTS", tmp_path / "results")
    monkeypatch.setattr(tables, "DOCUMENTS", ["README.md"])
    monkeypatch.setattr("sys.argv", ["bench", "publish"])
    return tmp_path


def test_publishing_draws_the_claims_of_all_machines_once(publishing, monkeypatch):
    compared, draw = [], claims.draw
    monkeypatch.setattr(
        claims, "draw", lambda folders, file: compared.append([each.label for each in folders]) or draw(folders, file)
    )
    with pytest.raises(SystemExit) as raised:
        commands.main()
    assert not raised.value.code
    assert compared == [["one", "two"]]
    assert {file.name for file in (publishing / "results").iterdir()} == {"one", "two", "claims.png", "epochs.png"}
    header, _, row, *_ = cells((publishing / "README.md").read_text().splitlines())
    assert header[1:3] == ["one, at abc", "two, at abc"]
    assert row[1:] == ["✓ 0.50 × 1.0 s, 1 run, no interval"] * 2 + ["2 of 2"]


def test_publishing_fails_if_a_figure_did(publishing, monkeypatch, capsys):
    """After the others, and the tables."""
    monkeypatch.setattr(epochs, "draw", lambda: None)
    with pytest.raises(SystemExit) as raised:
        commands.main()
    assert raised.value.code == 1
    assert capsys.readouterr().out.startswith("epochs.png was not drawn: TypeError: ")
    assert (publishing / "results" / "claims.png").exists()
    assert "0.50 × 1.0 s" in (publishing / "README.md").read_text()


def test_nothing_is_published_from_a_damaged_run(publishing, capsys):
    run = publishing / "results" / "two" / "run.json"
    run.write_bytes(run.read_bytes()[:100])
    before = {file: file.read_bytes() for file in publishing.rglob("*") if file.is_file()}
    with pytest.raises(SystemExit) as raised:
        commands.main()
    assert raised.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {run} is not a valid run")
    assert {file: file.read_bytes() for file in publishing.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyboardInterrupt(), "interrupted$"),
        (MemoryError(), r"error: too large for this machine \(out of memory\): "),
        (OverflowError("9 digits"), r"error: too large for this machine \(9 digits\): "),
        (subprocess.CalledProcessError(2, ["python", "-m", "model"]), "error: exit code 2 of python -m model$"),
        (
            subprocess.CalledProcessError(2, ["python"], stderr="a warning\nerror: no space\n"),
            "error: exit code 2 of python: error: no space$",
        ),
        (BrokenProcessPool(), "error: a process that measures ended early"),
    ],
)
def test_what_ends_a_study_is_one_line(tmp_path, monkeypatch, capsys, error, line):
    def measure(dataset, quick):
        raise error

    monkeypatch.setattr(epochs, "measure", measure)
    monkeypatch.setattr(
        "sys.argv", ["bench", "run", "epochs", "--quick", "--dataset", "digits28", "--output", str(tmp_path)]
    )
    with pytest.raises(SystemExit) as raised:
        commands.main()
    assert raised.value.code == (130 if isinstance(error, KeyboardInterrupt) else 2)
    (shown,) = capsys.readouterr().err.splitlines()
    assert re.match(line, shown)


def test_published_runs_have_clean_commits():
    assert len(folders(PUBLISHED_RESULTS)) >= 2
    for folder in folders(PUBLISHED_RESULTS):
        assert folder.machine.name
        commits = [s.conditions.commit for run in folder.runs for s in run.sections.values()]
        assert all(commit and not commit.endswith("-dirty") for commit in commits)
        assert not any(s.conditions.quick for run in folder.runs for s in run.sections.values())


@pytest.mark.parametrize("commit", ["abc-dirty", None])
def test_results_need_a_clean_commit(tmp_path, monkeypatch, commit):
    monkeypatch.setattr(commands, "environment", lambda: SimpleNamespace(commit=commit))
    monkeypatch.setattr(commands, "subprocess", None)  # nothing is measured
    with pytest.raises(RecordError, match=f"need a clean commit, but this is {commit or 'unknown'}: commit first"):
        commands.results(runs=1, output=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_quick_run_stays_out_of_the_published_results(tmp_path, monkeypatch):
    """Nor does it need a clean commit."""

    def measure(command):
        folder = Path(command[command.index("--output") + 1]) / "quick"
        folder.mkdir(parents=True)
        save(folder, machine(), run_of(numpy=[1.0], numba=[0.5]))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "environment", lambda: SimpleNamespace(commit="abc-dirty"))
    monkeypatch.setattr(commands, "load_dataset", lambda name: None)
    monkeypatch.setattr(commands, "subprocess", SimpleNamespace(run=measure))
    published = set(PUBLISHED_RESULTS.rglob("*"))
    with pytest.raises(commands.typer.Exit):  # the other studies have no result
        commands.results(runs=1, quick=True)
    assert set(PUBLISHED_RESULTS.rglob("*")) == published
    (folder,) = read_all(tmp_path / "bench" / "output" / "quick-results")
    assert folder.studies == {"epochs"}


def test_a_new_run_replaces_none_of_the_same_day(tmp_path, monkeypatch):
    """Earlier ones have been removed, somebody has made a copy of a run, and the last use was on another machine."""

    def measure(command):
        folder = Path(command[command.index("--output") + 1]) / "quick"
        existing_run(folder)
        save(folder, machine(), run_of(numpy=[1.0], numba=[0.5]))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "load_dataset", lambda name: None)
    monkeypatch.setattr(commands, "subprocess", SimpleNamespace(run=measure))
    left = tmp_path / "bench" / "output" / "measuring" / "1" / "quick"
    left.mkdir(parents=True)
    save(left, dataclasses.replace(machine(), cpu="Another"), run_of(numpy=[1.0]))
    earlier, *new = (tmp_path / f"run-{CONDITIONS.date[:10]}-{number}.json" for number in (9, 10, 11))
    copy = tmp_path / f"run-{CONDITIONS.date[:10]}-copy.json"
    for file in earlier, copy:
        write(file, run_of(numpy=[3.0]))
    before = earlier.read_bytes()
    with pytest.raises(commands.typer.Exit):  # the other studies have no result
        commands.results(runs=2, quick=True, output=tmp_path)
    assert sorted(tmp_path.glob("run*.json"), key=numbered) == [earlier, *new, copy]
    assert earlier.read_bytes() == before


def bench_command(folder, *arguments):
    """The command for the benchmarks of NumPy on a few images."""
    options = ["--benchmark-only", "--quick", "--dataset", "digits28", "--backend", "numpy", "--output", folder]
    return [sys.executable, *map(str, ("-m", "pytest", "bench/", *options, "-p", "no:cacheprovider", *arguments))]


def bench(folder, *arguments, limit=None, **variables):
    options = {"cwd": ROOT, "env": {**os.environ, **variables}, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(bench_command(folder, *arguments), preexec_fn=limit, **options)


@pytest.mark.slow
def test_a_partial_run_never_replaces_a_complete_one(tmp_path):
    """With a notebook's MPLBACKEND, and the user's own matplotlibrc."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nsavefig.dpi: 30\n")
    save(tmp_path, machine(), run_of(numpy=[1.0]))
    before = (tmp_path / "run.json").read_bytes()
    backend = "module://matplotlib_inline.backend_inline"
    result = bench(tmp_path, "-k", "relu", MPLBACKEND=backend, MATPLOTLIBRC=str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "run.json").read_bytes() == before
    assert set(read(Run, tmp_path / "partial" / "run.json").sections) == {"kernels"}
    report = (tmp_path / "partial" / "report.html").read_text()
    skipped = dict(re.findall(r"<tr><td>(\w+)</td><td>([^<]*)</td></tr>", report))
    assert set(skipped) == set(STUDIES) - {"kernels"}
    assert skipped["epochs"] == "not selected, or the run ended first"
    assert skipped["density"] == "run `make results`, which runs all"
    assert re.search(r"A partial run: saved separately.*\n.*\nReport: .*report.html", result.stdout)


def test_benchmarks_need_their_plugin():
    command = [sys.executable, "-m", "pytest", "bench/", "-p", "no:benchmark", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 4
    assert "drop -p no:benchmark" in result.stderr
    assert "INTERNALERROR" not in result.stdout + result.stderr
    assert len(result.stderr.strip().splitlines()) <= 6


def test_a_file_is_no_folder_for_results(tmp_path):
    file = tmp_path / "file"
    file.touch()
    result = bench(file)
    assert result.returncode == 4
    assert "INTERNALERROR" not in result.stdout + result.stderr
    assert len(result.stderr.strip().splitlines()) <= 6


def test_benchmarks_need_images_of_mnists_size(tmp_path):
    result = bench(tmp_path, "--dataset", "idx")
    assert result.returncode == 4
    assert "argument --dataset: invalid choice: 'idx'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "no_study"], "no such study: no_study; choose from epochs, kernels, "),
        (["run", "epochs", "--dataset", "idx"], "the studies do not run on 'idx': choose one of mnist, digits28, auto"),
        (["results", "--runs", "0"], "Invalid value for '--runs'"),
        (["draw"], "Missing argument"),
        (["draw", "no/such/folder"], "no/such/folder is not a folder of results"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as raised:
        commands.main()
    assert raised.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(("blas", "threads"), [("openblas", [1, 8]), ("Accelerate", [1])])
def test_accelerate_is_timed_on_one_thread_only(monkeypatch, blas, threads):
    monkeypatch.setattr("bench.measure.machine.numpy_blas", lambda: [{"internal_api": blas}])
    monkeypatch.setattr("bench.measure.machine.available_cores", lambda: 8)
    assert blas_threads() == threads


def test_results_of_restricted_kernels_need_a_folder_of_their_own(monkeypatch, capsys):
    monkeypatch.setenv("NUMBA_CPU_NAME", "haswell")
    monkeypatch.delenv("NUMBA_CPU_FEATURES", raising=False)
    monkeypatch.setattr("sys.argv", ["bench", "results", "--quick"])
    monkeypatch.setattr(commands, "machine", lambda: pytest.fail("it was not refused"))
    with pytest.raises(SystemExit) as raised:
        commands.main()
    assert raised.value.code == 2
    assert re.fullmatch(r"error: runs with NUMBA_CPU_NAME do not .* --output\n", capsys.readouterr().err)


@pytest.mark.slow
def test_without_the_compiler_a_study_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    options = ["--quick", "--dataset", "digits28", "--output", str(tmp_path)]
    command = [sys.executable, "-m", "bench", "run", "kernels", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert re.fullmatch(r"error: NUMBA_DISABLE_JIT is set, .*: unset it\n", result.stderr), result.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk_is_one_line(monkeypatch):
    """Python buffers stdout, unless PYTHONUNBUFFERED is set."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "bench", "--help"]
        result = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == 2
    assert re.fullmatch(r"error: .*No space left on device\n", result.stderr), result.stderr


@pytest.fixture
def complete(tmp_path):
    """Yields a folder with a complete run and a quick one; asserts afterwards that both are unchanged."""
    for folder in (tmp_path, tmp_path / "quick"):
        folder.mkdir(exist_ok=True)
        save(folder, machine(), run_of(numpy=[1.0]))
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    before = [file.read_bytes() for file in files]
    yield tmp_path
    assert [file.read_bytes() for file in files] == before


@pytest.mark.slow
@needs_posix
def test_ctrl_c_leaves_the_complete_runs(complete):
    """After the first benchmark, whose result is saved separately."""
    command = bench_command(complete, "-v", "-k", "test_epoch or relu")
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            if "PASSED" in line:
                break
        process.send_signal(signal.SIGINT)
        shown = process.stdout.read()
    assert process.returncode == pytest.ExitCode.INTERRUPTED
    assert "A partial run: saved separately, the last complete run is unchanged." in shown
    assert set(read(Run, complete / "partial" / "run.json").sections) == {"epochs"}


@pytest.mark.slow
@needs_posix
@forks
@pytest.mark.parametrize(("size", "measures"), [(300, False), (4096, True)])
def test_a_full_disk_costs_no_table_and_no_complete_run(complete, size, measures):
    """No file may be larger than `size` bytes; the results are."""

    def limit():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    result = bench(complete, "-k", "relu", limit=limit)
    assert result.returncode == (1 if measures else pytest.ExitCode.USAGE_ERROR), result.stdout + result.stderr
    assert ("Name (time in" in result.stdout) == measures
    message = "Exit: not all results were written: OSError: cannot write" if measures else "ERROR: cannot write in"
    assert re.search(rf"{message} .*: File too large", result.stderr)
    assert not list(complete.rglob(".*"))  # temporary files


@pytest.mark.parametrize("function", ["os.fsync", "pathlib.Path.replace"])
def test_a_full_disk_leaves_the_old_run_intact(tmp_path, monkeypatch, function):
    """The new file has been written, but not yet synced or renamed."""
    save(tmp_path, machine(), run_of(numpy=[1.0]))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(function, fail)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            save(tmp_path, machine(), run_of(numpy=[2.0] * 99))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_an_unusable_folder_is_one_line(tmp_path, monkeypatch):
    """A file, a folder in a file, a symlink loop, and a read-only file system, simulated because root may run this."""
    (tmp_path / "file").touch()
    for name in ("file", "file/folder", *(["loop"] if os.name == "posix" else [])):
        if name == "loop":
            (tmp_path / name).symlink_to(name)
        with pytest.raises(OSError, match=rf"{name.split('/')[0]} is not a folder: choose a folder for the results$"):
            existing_run(tmp_path / name)

    def fail(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for function in ("pathlib.Path.mkdir", "tempfile.NamedTemporaryFile"):
        with monkeypatch.context() as patch:
            patch.setattr(function, fail)
            message = f"^cannot write in {re.escape(str(tmp_path / 'new'))}: {os.strerror(errno.EROFS)}; choose another"
            with pytest.raises(OSError, match=message):
                existing_run(tmp_path / "new")
