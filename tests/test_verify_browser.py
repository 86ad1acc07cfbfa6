"""The page of a report in a real browser: light, dark, phone, wide, paper.

A probe page loads reports in frames of several widths and writes what it measures into its own
document, which the browser prints.
"""

import html as html_module
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dora_export.verification.page import page
from tests import reports

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason=f"no browser found ({', '.join(BROWSERS)})"),
    pytest.mark.skipif(sys.platform != "linux", reason="the flags are those of Chromium on Linux"),
]
WIDTHS = (360, 390, 768, 1400, 2200)
GROUND = {"right": (232, 245, 240), "wrong": (253, 236, 239), "unchecked": (255, 246, 224)}
DARK_GROUND = {"right": (16, 41, 31), "wrong": (54, 22, 32), "unchecked": (46, 38, 16)}
PROBE = """<!DOCTYPE html><meta charset="utf-8"><body><pre id="out">pending</pre><script>
const cases = %s, found = [];
const color = (e, name) => getComputedStyle(e)[name];
function measure(name, width, frame) {
  const view = frame.contentWindow, doc = frame.contentDocument, root = doc.documentElement;
  const all = (css) => [...doc.querySelectorAll(css)];
  const seen = (e) => { const r = e.getBoundingClientRect(); return r.width > 0 && r.height > 0; };
  const table = doc.querySelector("table.sortable");
  const names = () => table ? [...table.tBodies[0].rows].map((r) => r.cells[0].textContent) : [];
  const before = names();
  const heading = table && table.tHead.rows[0].cells[0];
  const button = heading && heading.querySelector("button");
  if (button) { button.click(); button.click(); }
  return {
    name, width,
    overflow: root.scrollWidth - view.innerWidth,
    inner: view.innerWidth,
    resources: view.performance.getEntriesByType("resource").map((r) => r.name),
    verdict: doc.querySelector("header.verdict h1").textContent,
    ground: view.getComputedStyle(doc.querySelector("header.verdict")).backgroundColor,
    body: view.getComputedStyle(doc.body).backgroundColor,
    ink: view.getComputedStyle(doc.body).color,
    marks: all(".mark").filter(seen).length,
    boxes: all("rect.box").filter(seen).length,
    heat: all("figure rect.heat").filter(seen).length,
    cut: all("figure svg text").filter((t) => {
      const r = t.getBoundingClientRect(), s = t.closest("svg").getBoundingClientRect();
      return r.left < s.left - 1 || r.right > s.right + 1;
    }).map((t) => t.textContent),
    wideText: all("main > p, main > header, .numbers, .pairs, .finding").filter((e) =>
      e.getBoundingClientRect().right > view.innerWidth + 1).length,
    handlers: all("*").filter((e) => [...e.attributes].some((a) => /^on/.test(a.name))).length,
    scripts: doc.scripts.length,
    sorted: [before, names()],
    sort: heading && heading.getAttribute("aria-sort"),
    reachable: all(".scroll").every((e) => e.tabIndex === 0),
  };
}
let left = cases.length;
for (const [name, width] of cases) {
  const frame = document.createElement("iframe");
  frame.width = width; frame.height = 900; frame.src = name + ".html";
  frame.onload = () => {
    found.push(measure(name, width, frame));
    if (--left === 0) document.getElementById("out").textContent = JSON.stringify(found);
  };
  document.body.append(frame);
}
</script>"""


def browse(folder, *arguments):
    """Run the browser and return its output; fails if the page logged anything."""
    result = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--disable-dev-shm-usage", "--disable-extensions",
            "--enable-logging=stderr",
            "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}", *arguments,
        ],
        capture_output=True, timeout=120, check=False, cwd=folder,
    )  # fmt: skip
    log = result.stderr.decode(errors="replace")
    assert result.returncode == 0, log
    assert [line for line in log.splitlines() if "CONSOLE" in line] == []
    return result.stdout.decode(errors="replace")


def probe(folder, cases, *arguments):
    """What the browser measured: (name, width) -> figures."""
    (folder / "probe.html").write_text(PROBE % json.dumps(cases), encoding="utf-8")
    dom = browse(folder, "--dump-dom", "--virtual-time-budget=20000", "--window-size=2300,1000",
                 *arguments, (folder / "probe.html").as_uri())  # fmt: skip
    found = re.search(r'<pre id="out">(.*?)</pre>', dom, re.S).group(1)
    assert found != "pending"
    return {(f["name"], f["width"]): f for f in json.loads(html_module.unescape(found))}


def pixels(path):
    """A picture as an array (height, width, 3)."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def part(image, colour):
    """Share of a picture's pixels that have a colour."""
    return float((np.abs(image.astype(int) - colour).max(axis=-1) <= 1).mean())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, make in reports.ALL.items():
        (folder / f"{name}.html").write_text(page(make()), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def light(folder):
    return probe(folder, [(name, width) for name in reports.ALL for width in WIDTHS])


@pytest.fixture(scope="module")
def dark(folder):
    cases = [(name, 1400) for name in ("right", "wrong", "unchecked")]
    return probe(folder, cases, "--blink-settings=preferredColorScheme=0")


def test_pages_fit_phones_and_wide_screens(light):
    assert len(light) == len(reports.ALL) * len(WIDTHS)
    for (name, width), found in light.items():
        assert found["inner"] == width
        assert (found["overflow"], found["wideText"]) == (0, 0), (name, width)


def test_pages_ask_for_nothing(light):
    assert {tuple(found["resources"]) for found in light.values()} == {()}


def test_labels_of_charts_are_not_cut(light):
    cut = {text for (name, _), f in light.items() if name != "hostile" for text in f["cut"]}
    assert cut == set()


def test_charts_are_drawn(light):
    for width in WIDTHS:
        found = light["right", width]
        assert found["marks"] >= 210
        assert found["boxes"] == 210
        assert found["heat"] == 210 + 8


def test_scripts_from_names_do_not_run(light):
    found = light["hostile", 1400]
    assert (found["scripts"], found["handlers"]) == (1, 0)


def test_tables_sort_and_can_be_reached_by_keys(light):
    before, after = light["right", 1400]["sorted"]
    assert sorted(before) == sorted(after)
    assert before != after
    assert light["right", 1400]["sort"] == "ascending"
    natural = [[int(n) if n.isdecimal() else n for n in name.split(".")] for name in after]
    assert natural == sorted(natural)
    assert all(found["reachable"] for found in light.values())


@pytest.mark.parametrize("verdict", GROUND)
def test_verdict_has_its_colour_in_light_and_dark(light, dark, verdict):
    for found, grounds in ((light, GROUND), (dark, DARK_GROUND)):
        case = found[verdict, 1400]
        assert case["ground"] == "rgb({}, {}, {})".format(*grounds[verdict])
    assert light[verdict, 1400]["body"] == "rgb(252, 252, 251)"
    assert dark[verdict, 1400]["body"] == "rgb(20, 23, 26)"
    assert light[verdict, 1400]["ink"] != dark[verdict, 1400]["ink"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_picture_shows_verdict_and_charts(folder, scheme):
    picture = folder / f"{scheme}.png"
    settings = ["--blink-settings=preferredColorScheme=0"] * (scheme == "dark")
    browse(folder, f"--screenshot={picture}", "--window-size=1200,2200", *settings,
           (folder / "wrong.html").as_uri())  # fmt: skip
    image = pixels(picture)
    assert image.shape == (2200, 1200, 3)
    grounds, body, heat, red = {
        "light": (GROUND, (252, 252, 251), (8, 54, 114), (184, 18, 58)),
        "dark": (DARK_GROUND, (20, 23, 26), (208, 231, 248), (255, 122, 144)),
    }[scheme]
    assert part(image, body) > 0.4
    assert part(image[:400], grounds["wrong"]) > 0.2
    assert part(image, grounds["right"]) == 0
    assert part(image[:400], red) > 0.001  # the sign and the headline
    assert part(image[600:1000], red) > 1e-5  # crosses in the chart
    assert part(image, heat) > 1e-5  # the strongest shade of the heat map


def test_page_prints(folder):
    paper = folder / "paper.pdf"
    browse(folder, f"--print-to-pdf={paper}", "--no-pdf-header-footer",
           (folder / "right.html").as_uri())  # fmt: skip
    content = paper.read_bytes()
    assert content.startswith(b"%PDF-")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 9
