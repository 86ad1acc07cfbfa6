"""The page of a report: well-formed, self-contained, and saying what the report says."""

import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from dora_export.errors import OutputError
from dora_export.verification.catalog import FINDINGS
from dora_export.verification.grid import MAX_CELLS, arrange, place
from dora_export.verification.markup import el, render
from dora_export.verification.model import Finding, TensorResult, TierResult
from dora_export.verification.page import page
from dora_export.writers import page_file
from tests import reports

VOID = {"meta"}
MEGABYTES = 5_000_000


class Page(HTMLParser):
    """A page as a browser's parser meets it: elements, their attributes, text by element."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def pages():
    return {name: page(make()) for name, make in reports.ALL.items()}


@pytest.fixture(params=reports.ALL)
def html(request, pages):
    return pages[request.param]


# --- form


def test_page_is_balanced_html_and_its_body_well_formed_xml(html):
    Page(html)
    main = ET.fromstring(html[html.index("<main>") : html.index("</main>") + len("</main>")])
    pictures = [svg for svg in main.iter("svg") if svg.get("role") == "img"]
    for svg in pictures:
        assert svg.get("aria-label")
        x, y, width, height = map(float, svg.get("viewBox").split())
        assert (x, y) == (0, 0)
        assert 0 < width <= 1200
        assert 0 < height <= 2500


def test_page_needs_nothing_from_anywhere(html):
    found = Page(html)
    assert {tag for tag, _ in found.elements} <= {
        *"html head meta title style body main header footer section h1 h2 h3 p ul li dl dt dd div "
        "span strong small code pre a table caption thead tbody tr th td details summary figure "
        "figcaption svg g rect line circle path polygon text script".split()
    }
    for tag, attributes in found.elements:
        assert not {"src", "srcset", "style", "xlink:href", "background", "action"} & set(
            attributes
        )
        assert [a for a in attributes if a.startswith("on")] == []
        assert tag != "a" or attributes["href"].startswith("#")
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "fetch(" not in html[html.rindex("<script>") :]


def test_only_the_pages_own_style_and_script_may_run(html):
    found = Page(html)
    policy = next(m["content"] for m in found.of("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert html.count("<script") == html.count("<style") == 1


def test_headings_and_tables_are_real(html):
    found = Page(html)
    levels = [int(tag[1]) for tag, _ in found.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert len(found.of("caption")) == len(found.of("table"))
    assert all(th.get("scope") == "col" for th in found.of("th"))
    regions = [d for d in found.of("div") if "scroll" in d.get("class", "")]
    assert all(d["tabindex"] == "0" and d["aria-label"] for d in regions)


def test_page_is_made_for_light_dark_paper_and_phones(html):
    for words in ("prefers-color-scheme: dark", "@media print", "max-width: 600px"):
        assert words in html
    assert 'name="viewport"' in html
    assert '<html lang="en">' in html


def test_links_lead_somewhere(html):
    found = Page(html)
    ids = [a["id"] for _, a in found.elements if "id" in a]
    assert len(set(ids)) == len(ids)
    linked = {a["href"][1:] for a in found.of("a")}
    assert linked <= set(ids)


def test_same_report_gives_the_same_page():
    assert page(reports.tiny()) == page(reports.tiny())


# --- names from strangers


def test_names_from_files_stay_text(pages):
    html = pages["hostile"]
    found = Page(html)
    assert "<script>alert" not in html
    assert "<img" not in html
    assert "\x1b" not in html
    assert "\u202e" not in html
    assert "model.<script>alert(1)</script>.weight" in found.text
    assert 'model."onmouseover="alert(2)".weight' in found.text
    assert r"\x1b[31mred\x00\u202egnp" in found.text
    html.encode("utf-8")  # no lone surrogates


def test_no_text_or_attribute_can_become_markup():
    nasty = "<b>&\"'</b>]]>"
    element = el("p", nasty, el("span", nasty), nasty, title=nasty)
    read = ET.fromstring(render(element))
    assert (read.text, read[0].text, read[0].tail, read.get("title")) == (nasty,) * 4
    with pytest.raises(AssertionError, match="Bug"):
        el("br")


def test_what_no_reader_can_see_is_escaped_wherever_it_comes_from():
    for character in ("\x00", "\x1b", "\u202e", "\u200b", "\udcff"):
        escaped = character.encode("unicode_escape").decode()
        read = ET.fromstring(render(el("p", f"a{character}\nb", title=character)))
        assert (read.text, read.get("title")) == (f"a{escaped}\nb", escaped)


# --- the verdict


@pytest.mark.parametrize(
    ("name", "verdict", "headline"),
    [
        ("right", "right", "The merged model is right and exact"),
        ("rounded", "right", "The merged model is right, with more rounding than necessary"),
        ("wrong", "wrong", "The merged model is wrong"),
        ("unchecked", "unchecked", "The merged model could not be checked"),
    ],
)
def test_verdict_comes_first_in_words(pages, name, verdict, headline):
    html = pages[name]
    found = Page(html)
    assert [a["class"] for a in found.of("header")] == [f"verdict {verdict}"]
    assert html.index("<h1>") == html.index(f"<h1>{headline}</h1>")
    assert html.index("<header") < html.index("<h2>")


def test_right_says_what_was_compared_and_how_near_it_is(pages):
    text = Page(pages["right"]).text
    assert "Every element of 210 changed tensors (106,168,320 values, BF16)" in text
    assert "worst 0.506 ulp" in text
    assert "62 untouched ones byte for byte" in text
    for words in ("models/smollm2-135m", "adapters/smollm2-135m-dora (DoRA)", "dora-export 0.1.0"):
        assert words in text


def test_sampled_rows_are_not_called_every_element():
    text = Page(page(reports.right(level="fast"))).text
    assert "Sampled rows of 210 changed tensors" in text
    assert "every element of" not in text.lower()


def test_wrong_names_what_is_wrong_before_anything_else(pages):
    text = Page(pages["wrong"]).text
    first = text[: text.index("What was compared")]
    assert "The adapter was not applied (7)." in first
    assert "NaN or infinity (1)." in first
    assert "right and exact" not in text


def test_what_was_not_checked_never_looks_right(pages):
    html = pages["unchecked"]
    text = Page(html).text
    assert "not everything was looked at: the forward pass could not be run" in text
    assert "verdict right" not in html
    assert "The merged model is right" not in text


def test_a_report_of_nothing_is_no_success():
    tiers = tuple(replace(t, ran=False, summary="gone") for t in reports.right().tiers)
    nothing = reports.right(tiers=tiers, tensors=())
    assert (nothing.verdict, nothing.exit_code) == ("unchecked", 3)
    assert "Nothing was checked" in Page(page(nothing)).text


def test_a_tensors_own_status_counts_without_a_finding():
    for status, verdict in (("wrong", "wrong"), ("unchecked", "unchecked")):
        tensors = (replace(reports.tensors()[0], status=status), *reports.tensors()[1:])
        assert reports.right(tensors=tensors).verdict == verdict


def test_a_tier_that_did_not_run_is_named():
    tiers = (*reports.right().tiers[:2], replace(reports.right().tiers[2], ran=False))
    text = Page(page(reports.right(tiers=tiers))).text
    assert "Not part of this verdict: forward" in text
    assert "forward – not run" in text


def test_other_tools_rounding_is_set_beside_the_best(pages):
    text = Page(pages["rounded"]).text
    assert re.search(r"as computed in BF16, worst \d+\.\d ulp, 44% not correctly rounded", text)
    assert "best would be ½ ulp and none" in text


# --- findings


def test_every_finding_says_what_it_means_and_what_to_do(pages):
    text = Page(pages["every_finding"]).text
    for m in FINDINGS:
        assert f"{m.title} {m.code}" in text
        assert m.means in text
        assert m.do in text


def test_findings_stand_in_order_of_gravity(pages):
    sections = [a["class"].split()[1] for a in Page(pages["every_finding"]).of("section")]
    ranks = [("wrong", "unchecked", "warning", "note").index(s) for s in sections]
    assert ranks == sorted(ranks)
    assert len(sections) == len(FINDINGS)


def test_many_findings_of_a_kind_are_all_listed_folded(pages):
    text = Page(pages["every_finding"]).text
    assert "model.layers.{0-30}.tensor-missing" in text
    assert "what was found 30" in text


# --- charts


def marks(html, chart):
    """Classes of the shapes in one picture."""
    main = ET.fromstring(html[html.index("<main>") : html.index("</main>") + len("</main>")])
    pictures = [s for s in main.iter("svg") if s.get("role") == "img"]
    svg = [s for s in pictures if chart in s.get("aria-label")]
    assert len(svg) == 1
    return [e.get("class") for e in svg[0].iter() if e.get("class")], svg[0]


def test_every_tensor_is_in_every_chart(pages):
    classes, svg = marks(pages["right"], "distance")
    assert classes.count("mark exact") == 210
    titles = [t.text for t in svg.iter("title")]
    assert any("model.layers.12.mlp.up_proj.weight\n0.50" in t for t in titles)
    assert marks(pages["right"], "Magnitudes")[0].count("box") == 210
    heat = [c for c in marks(pages["right"], "update")[0] if c.startswith("heat")]
    assert len(heat) == 210
    assert {"heat h0", "heat h7"} <= set(heat)


def test_distances_have_their_lines_at_half_and_one(pages):
    classes, svg = marks(pages["right"], "distance")
    assert classes.count("level half") == classes.count("level one") == 7
    lines = {e.get("class"): float(e.get("y1")) for e in reversed(list(svg.iter("line")))}
    dots = [float(e.get("cy")) for e in svg.iter("circle")][:30]
    assert lines["level one"] < min(dots)  # above: further away
    assert abs(lines["level half"] - max(dots)) < 0.5


def test_wrong_tensors_differ_in_shape_and_place(pages):
    classes, svg = marks(pages["wrong"], "distance")
    assert classes.count("mark wrong") == 9
    crosses = {e.tag for e in svg.iter() if e.get("class") == "mark wrong"}
    assert crosses == {"path"}
    titles = " ".join(t.text for t in svg.iter("title"))
    assert "wrong: not-finite" in titles
    assert "∞ ulp" in titles


def test_boxes_stand_in_the_order_of_their_quantiles(pages):
    _, svg = marks(pages["right"], "Magnitudes")
    for group in svg.iter("g"):
        whisker, middle = group.findall("line")
        top = float(group.find("rect").get("y"))
        bottom = top + float(group.find("rect").get("height"))
        assert float(whisker.get("y1")) <= top + 0.11
        assert top - 0.11 <= float(middle.get("y1")) <= bottom + 0.11
        assert bottom <= float(whisker.get("y2")) + 1.3


def test_adapters_without_magnitudes_have_no_chart_of_them(pages):
    assert "m / ‖W‖" not in Page(pages["tiny"]).text
    classes, _ = marks(pages["tiny"], "update")
    assert "heat zero" in classes


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.layers.12.self_attn.q_proj.weight", ("model.layers", 12, "self_attn.q_proj")),
        ("transformer.h.3.mlp.c_fc.weight", ("transformer.h", 3, "mlp.c_fc")),
        ("layers.3.mlp.experts.17.up_proj.weight", ("layers", 3, "mlp.experts.*.up_proj")),
        ("lm_head.weight", ("", None, "lm_head")),
        ("blocks.4.weight", ("blocks", 4, "blocks")),
        ("", ("", None, "")),
    ],
)  # fmt: skip
def test_names_say_where_a_tensor_stands(name, where):
    assert place(name) == where


def test_layers_stand_in_the_order_of_their_numbers():
    names = [f"layers.{i}.q" for i in (10, 2, 0)] + ["head"]
    tensors = [replace(reports.tensors()[0], name=n) for n in names]
    assert [c.label for c in arrange(tensors).columns] == ["–", "0", "2", "10"]


@pytest.mark.parametrize(
    "name",
    [
        "w{i}",
        "w.{j}.k{k}.q",
        *(
            pytest.param(name, marks=pytest.mark.nightly)
            for name in ("w.{i}.q", "w{i}.0.q", "a{j}.{k}.q", "layers.{k}.e.{j}.q")
        ),
    ],
)
def test_charts_stay_small_whatever_the_names(name):
    one = reports.tensors()[0]
    tensors = [
        replace(one, name=name.format(i=i, j=i % 300, k=i // 300), max_ulp=i / 1e4)
        for i in range(20_000)
    ]
    grid = arrange(tensors)
    assert 0 < len(grid.cells) <= MAX_CELLS
    assert len(grid.columns) <= 200
    shown = sum(len(c.tensors) for c in grid.cells)
    assert shown == 20_000 or grid.left_out > 0
    assert max(t.max_ulp for c in grid.cells for t in c.tensors) == 1.9999  # the worst is kept
    if name == "w{i}":  # as many kinds as tensors
        assert len(page(reports.right(tensors=tuple(tensors))).encode()) < MEGABYTES


@pytest.mark.parametrize("layers", [7, pytest.param(26, marks=pytest.mark.nightly)])
def test_many_tensors_fit_with_the_limits_said(layers):
    count = layers * 256 * 3
    html = page(reports.experts(layers, wrong=count))
    assert len(html.encode()) < MEGABYTES
    text = Page(html).text
    assert "Up to 256 tensors (experts, say) share a place" in text
    assert f"The worst 1,000 of {count:,} changed tensors" in text
    assert f"The values are not those of this merge ({count:,})" in text
    assert "verify --json lists them all" in text


# --- tables and figures


def test_tensors_are_listed_with_their_numbers(pages):
    found = Page(pages["wrong"])
    rows = [a for a in found.of("td") if a.get("class") == "n"]
    assert any(a["data-v"] == "Infinity" for a in rows)
    assert "All 210 changed tensors" in found.text
    assert "576 × 1536" in found.text


def test_unchecked_tensors_show_no_numbers_as_if_measured():
    one = TensorResult("w", "unchecked", "U8", (2, 2), 0, 0.0, 0.0, 0.0, 0.0, 0.1, None, None,
                       "quantised")  # fmt: skip
    report = reports.right(tensors=(one,), findings=(Finding("quantised", "w", "packed"),))
    html = page(report)
    body = html[html.index("<tbody>") : html.index("</tbody>")]
    assert ">0<" not in body
    assert "unchecked" in body
    assert "exact" not in Page(html).text.partition("What was compared")[0].replace("exactly", "")


def test_figures_of_every_tier_are_there(pages):
    text = Page(pages["right"]).text
    for words in ("Ledger tier", "untouched bytes 56,700,000", "Forward tier", "same text yes",
                  "model LlamaForCausalLM", "random none",
                  "outputs logits of what is allowed 0.125",
                  "The capital of France is Paris.", "strength 1 and zero-norm"):  # fmt: skip
        assert words in text
    assert "said" not in text


def test_figures_of_the_same_kind_stand_in_one_table(pages):
    text = Page(pages["right"]).text
    assert ("logits of max mean root mean square scale error 0.325 0.0381 0.0498 42.3 "
            "noise 1.29 0.169 0.224 42.3 effect 0.325") in text  # fmt: skip
    assert ("logits of positions top1 agreement KL mean KL max "
            "choices 42 1.00 3.10×10⁻⁶ 5.20×10⁻⁴ choices noise 42") in text  # fmt: skip
    assert "layers, the first 100 of 210 name of what is allowed error max error mean" in text
    assert "prompt 1 1, 5" in text


def test_an_object_alone_of_its_kind_is_a_pair():
    tier = TierResult("oracle", True, "", figures={"tensors": {"exact": 2, "wrong": 0}, "ulp": 0.5})
    html = page(reports.right(tiers=(tier,)))
    assert "tensors exact 2, wrong 0" in Page(html).text
    assert "Figures of the oracle tier" not in html


# --- the file


def test_page_is_written_whole_and_replaces_only_its_like(pages, tmp_path):
    target = tmp_path / "report.html"
    page_file.write(target, pages["right"], force=False)
    page_file.write(target, pages["wrong"], force=False)
    assert target.read_text(encoding="utf-8") == pages["wrong"]
    assert target.stat().st_mode & 0o444 == 0o444
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    "content",
    ["", "my thesis", "<!DOCTYPE html><html></html>",
     '<!DOCTYPE html>\n<meta name="generator" content="Hugo">',
     'thesis on <meta name="generator" content="dora-export 0.1.0">'],
)  # fmt: skip
def test_foreign_files_are_replaced_only_by_force(pages, tmp_path, content):
    target = tmp_path / "report.html"
    target.write_text(content)
    with pytest.raises(OutputError, match=r"no report of this tool.*--force"):
        page_file.write(target, pages["right"], force=False)
    assert target.read_text() == content
    page_file.write(target, pages["right"], force=True)
    assert target.read_text(encoding="utf-8") == pages["right"]


def test_folders_links_and_missing_folders_are_refused_even_by_force(tmp_path):
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "link.html").symlink_to(tmp_path / "elsewhere.html")
    for name in ("folder.html", "link.html"):
        with pytest.raises(OutputError, match="not a regular file"):
            page_file.write(tmp_path / name, "x", force=True)
    with pytest.raises(OutputError, match="no such folder"):
        page_file.write(tmp_path / "none" / "r.html", "x", force=True)


def test_failed_write_leaves_the_earlier_page(pages, tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    page_file.write(target, pages["right"], force=False)

    def full(*_args):
        (beside,) = (p.name for p in tmp_path.iterdir() if p.name != "report.html")
        assert beside.startswith(".report.html.dora_export-")  # whoever finds it knows whose it is
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page_file.os, "fsync", full)
    with pytest.raises(OutputError, match=r"cannot be written: No space left"):
        page_file.write(target, pages["wrong"], force=False)
    assert Path(target).read_text(encoding="utf-8") == pages["right"]
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
