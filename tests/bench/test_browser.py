"""The report in headless Chromium, without a network."""

import json
import os
import re
import shutil
import subprocess

import pytest

from bench.publish.figures import draw_all
from bench.publish.report import write_report
from bench.publish.tables import PUBLISHED_RESULTS, main_folder

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: install it to test the report in a browser"),
]

# Runs after the page's own script, sorts the claims by their ratios, and tells the surrounding page what a reader sees.
PROBE = """
<script>
const column = (table, n) => [...table.tBodies[0].rows].map(row => row.cells[n].textContent);
const claims = document.querySelector("table"), buttons = claims.querySelectorAll("th button");
const seen = {width: innerWidth, content: document.documentElement.scrollWidth, rows: claims.tBodies[0].rows.length};
seen.images = [...document.images].map(image => [image.naturalWidth, image.getBoundingClientRect().width]);
buttons[1].click(); seen.up = column(claims, 1);
buttons[1].click(); seen.down = column(claims, 1);
buttons[0].click(); seen.names = column(claims, 0);
seen.sorted = claims.querySelectorAll("th[aria-sort]").length;
parent.postMessage(JSON.stringify(seen), "*");
</script>
"""

# Chromium's window has a minimum width; a frame has not.
PHONE = """<!doctype html><pre id="seen"></pre>
<script>addEventListener("message", message => document.querySelector("pre").textContent = message.data)</script>
<iframe src="probed.html" style="width: %dpx; height: 900px; border: 0"></iframe>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    published = main_folder(PUBLISHED_RESULTS)
    report = write_report(published, draw_all(published, folder, print), folder, {})
    probed = folder / "probed.html"
    probed.write_text(report.read_text().replace("</body>", f"{PROBE}</body>"))
    return probed


def chromium(page, *options):
    command = [CHROMIUM, "--headless", "--disable-gpu", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--no-sandbox")  # Chromium refuses to run as root otherwise
    command += [f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_overflows_and_tables_sort(page, width):
    """On a phone and on a desktop. On a phone, figures keep a legible width and scroll in a box of their own."""
    framed = page.with_name(f"framed-{width}.html")
    framed.write_text(PHONE % width)
    text = chromium(framed, "--window-size=1300,1000", "--virtual-time-budget=10000", "--dump-dom")
    seen = json.loads(re.search(r'<pre id="seen">(.*?)</pre>', text, re.DOTALL)[1])
    assert seen["width"] == width
    assert seen["content"] <= width
    assert len(seen["images"]) > 2
    assert all(natural > 0 for natural, _ in seen["images"])
    assert all(shown == 800 if width < 640 else shown <= width for _, shown in seen["images"])
    ratios = [float(text.split()[0]) for text in seen["up"]]
    assert ratios == sorted(ratios)
    assert len(ratios) == seen["rows"] > 5
    down = [float(text.split()[0]) for text in seen["down"]]
    assert down == sorted(ratios, reverse=True)
    competitors = [name.split()[0] for name in seen["names"]]
    assert competitors == sorted(competitors)
    assert seen["sorted"] == 1


def test_it_prints(page, tmp_path):
    """On several pages, with every figure."""
    file = tmp_path / "report.pdf"
    chromium(page, f"--print-to-pdf={file}")
    pdf = file.read_bytes()
    assert pdf.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 5
    assert len(re.findall(rb"/Subtype\s*/Image\b", pdf)) >= len(list(page.parent.glob("*.png")))
