"""The pictures of a report, mark by mark: each shows its own tensor's numbers, in its own place."""

from dataclasses import replace

import pytest

from dora_export.verification import charts, tables
from dora_export.verification.check import Checked
from dora_export.verification.grid import arrange
from dora_export.verification.model import Finding, TensorResult
from dora_export.verification.oracle import _tier
from dora_export.verification.page import page
from dora_export.verification.statement import groups as groups_of
from dora_export.verification.statement import precision, tier_state
from tests import reports

PLAIN = TensorResult("w", "exact", "BF16", (4, 3), 12, 0.5, 1e-5, 2e-3, 1.0, 0.1,
                     (0.8, 0.9, 1.0, 1.1, 1.2))  # fmt: skip


def some(*changes):
    """Tensors of layers 0, 1, ... of one kind."""
    return [replace(PLAIN, **{"name": f"layers.{i}.q.weight"} | c) for i, c in enumerate(changes)]


def groups(svg, tag="g"):
    """Each mark: first line of its title -> (the title, the element)."""
    found = [g for g in svg.iter(tag) if g.find("title") is not None]
    return {g.find("title").text.split("\n")[0]: g for g in found}


def place(group):
    """Class, x and y of a tensor's mark."""
    shape = next(e for e in group if (e.get("class") or "").startswith("mark"))
    kind = shape.get("class").removeprefix("mark ")
    if kind == "exact":
        return kind, float(shape.get("cx")), float(shape.get("cy"))
    numbers = shape.get("points") or shape.get("d").replace("M", " ").replace("L", " ")
    return kind, shape.tag, numbers


def test_distances_are_each_tensors_own_and_larger_ones_stand_higher():
    tensors = some({"max_ulp": 0.5}, {"max_ulp": 0.6}, {"max_ulp": 0.9, "misrounded": 0.02})
    svg = charts.error_chart(arrange(tensors))
    found = groups(svg)
    where = [place(found[t.name]) for t in tensors]
    assert [w[0] for w in where] == ["exact"] * 3
    assert where[0][1] < where[1][1] < where[2][1]
    assert where[0][2] > where[1][2] > where[2][2]
    titles = [found[t.name].find("title").text for t in tensors]
    assert titles[2] == "layers.2.q.weight\n0.900 ulp of BF16, 2.0% not correctly rounded\nexact"
    lines = {e.get("class"): float(e.get("y1")) for e in svg.iter("line")}
    assert where[0][2] == pytest.approx(lines["level half"], abs=0.11)
    assert lines["level one"] < where[2][2]


@pytest.mark.parametrize("worst", [3.0, 900.0, float("inf")])
def test_scales_hold_what_is_far_off_and_the_line_at_one(worst):
    wrong = {"max_ulp": worst, "status": "wrong", "diagnosis": "not-applied"}
    tensors = some({"max_ulp": 0.5}, wrong, {"max_ulp": 1.0})
    svg = charts.error_chart(arrange(tensors))
    heights = {t.name: place(groups(svg)[t.name]) for t in tensors if t.status == "exact"}
    line = next(float(e.get("y1")) for e in svg.iter("line") if e.get("class") == "level one")
    assert heights["layers.2.q.weight"][2] == pytest.approx(line, abs=0.11)
    assert heights["layers.0.q.weight"][2] > line
    strip = next(e for e in svg.iter("rect") if e.get("class") == "strip")
    top = float(strip.get("y"))
    for e in svg.iter("line"):
        assert top <= float(e.get("y1")) <= top + float(strip.get("height"))
    title = groups(svg)["layers.1.q.weight"].find("title").text
    assert title.endswith("wrong: not-applied")
    assert title.split("\n")[1].startswith("∞ ulp" if worst == float("inf") else f"{worst:g}")


def test_what_is_further_off_stands_higher_however_far():
    wrong = [{"status": "wrong", "max_ulp": u} for u in (1e6, 90.0, 3.0)]
    found = groups(charts.error_chart(arrange(some(*wrong))))
    places = [g.find("path").get("d").split()[1] for g in found.values()]
    tops = [float(p.partition("L")[0]) for p in places]
    assert tops[0] < tops[1] < tops[2]
    near = charts.error_chart(arrange(some({"max_ulp": 3.0, "status": "rounded"})))
    labels = [e.text for e in near.iter("text") if e.get("class") == "value"]
    assert labels == ["1", "½"]  # a scale without powers of ten
    far = charts.error_chart(arrange(some({"max_ulp": 3000.0, "status": "wrong"})))
    labels = [e.text for e in far.iter("text") if e.get("class") == "value"]
    assert labels == ["1", "10³"]


def test_long_names_are_cut_in_the_middle_of_labels_and_at_the_end_of_titles():
    name = "layers.0." + "long." * 100 + "up\x1b_proj.weight"
    svg = charts.error_chart(arrange([replace(PLAIN, name=name)]))
    (label,) = (e for e in svg.iter("text") if e.get("class") == "kind")
    assert label.text.startswith("long.long.…")
    assert label.text.endswith(r".up\x1b_proj")  # its end tells most
    assert len(label.text) == charts.LABEL_CHARACTERS
    (title,) = (g.find("title").text for g in svg.iter("g"))
    assert len(title.split("\n")[0]) == 120


def test_every_status_has_its_shape():
    tensors = some(*({"status": s} for s in ("exact", "rounded", "wrong", "unchecked")))
    found = groups(charts.error_chart(arrange(tensors)))
    shapes = [next(e for e in found[t.name] if e.tag != "title") for t in tensors]
    assert [(e.tag, e.get("class")) for e in shapes] == [
        ("circle", "mark exact"), ("polygon", "mark rounded"), ("path", "mark wrong"),
        ("path", "mark unchecked"),
    ]  # fmt: skip
    assert shapes[2].get("d") != shapes[3].get("d")
    title = found[tensors[3].name].find("title").text
    assert title.split("\n")[1] == "could not be compared"


def test_tensors_that_share_a_place_are_shown_by_the_gravest_and_furthest():
    one = {"name": "layers.0.experts.{}.up.weight"}
    ulps = (0.5, 7.0, 0.4, 2.0)
    states = ("exact", "rounded", "wrong", "wrong")
    tensors = [replace(PLAIN, name=one["name"].format(i), max_ulp=u, status=s)
               for i, (u, s) in enumerate(zip(ulps, states, strict=True))]  # fmt: skip
    (title,) = (g.find("title").text for g in charts.error_chart(arrange(tensors)).iter("g"))
    assert title.split("\n")[0] == "4 tensors, the worst: layers.0.experts.3.up.weight"
    assert "2.00 ulp" in title
    svg = charts.error_chart(arrange(tensors))
    (group,) = svg.iter("g")
    assert group.find("path").get("class") == "mark wrong"
    span = next(e for e in group if e.get("class") == "range")
    assert float(span.get("y1")) < float(span.get("y2"))  # from the furthest to the nearest


def test_wrong_marks_lie_on_top():
    tensors = some({"status": "wrong"}, {}, {"status": "rounded"})
    marks = [e.get("class") for e in charts.error_chart(arrange(tensors)).iter()
             if (e.get("class") or "").startswith("mark")]  # fmt: skip
    assert marks[-1] == "mark wrong"


def test_boxes_are_each_tensors_own_quantiles():
    far = (0.5, 0.95, 1.05, 1.1, 1.5)
    tensors = some({}, {"magnitude_ratio": far}, {"magnitude_ratio": None})
    svg = charts.magnitude_chart(arrange(tensors))
    found = groups(svg)
    assert set(found) == {"layers.0.q.weight", "layers.1.q.weight"}
    assert found["layers.1.q.weight"].find("title").text.split("\n")[1] == (
        "m / ‖W‖: median 1.050, half of them 0.9500 to 1.100, all 0.5000 to 1.500"
    )
    line = next(float(e.get("y1")) for e in svg.iter("line") if e.get("class") == "level one")

    def heights(name):
        group = found[name]
        box, whisker, median = group.find("rect"), *group.findall("line")
        top = float(box.get("y"))
        return [float(whisker.get("y2")), top + float(box.get("height")), float(median.get("y1")),
                top, float(whisker.get("y1"))]  # fmt: skip

    own, other = heights("layers.0.q.weight"), heights("layers.1.q.weight")
    assert own == sorted(own, reverse=True)
    assert other == sorted(other, reverse=True)
    assert own[2] == pytest.approx(line, abs=0.11)
    assert other[2] < line
    steps = [
        (a - line) / (1 - r) for a, r in zip(own, PLAIN.magnitude_ratio, strict=True) if r != 1
    ]
    steps += [(a - line) / (1 - r) for a, r in zip(other, far, strict=True)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=0.05)  # one scale, and linear


def test_a_few_rows_far_off_end_in_arrows_and_leave_the_boxes_their_room():
    wild = (0.01, 0.95, 1.0, 1.05, 90.0)
    tensors = some(*({} for _ in range(60)), {"magnitude_ratio": wild})
    found = groups(charts.magnitude_chart(arrange(tensors)))
    assert len(found["layers.60.q.weight"].findall("polygon")) == 2
    assert len(found["layers.3.q.weight"].findall("polygon")) == 0
    assert float(found["layers.3.q.weight"].find("rect").get("height")) > 5


STRANGE = [(1.0,) * 5, (-1.0, 0.9, 1.0, 1.1, 20.0), (0.0, 0.9, 1.0, 1.1, 20.0),
           (float("nan"), 1.0, 1.0, 1.0, 1.0)]  # fmt: skip


@pytest.mark.parametrize("ratio", STRANGE)
def test_magnitudes_of_any_value_have_a_picture(ratio):
    tensors = some({}, {"magnitude_ratio": ratio})
    svg = charts.magnitude_chart(arrange(tensors))
    assert "nan" not in " ".join(v for e in svg.iter() for v in e.attrib.values())
    assert ("layers.1.q.weight" in groups(svg)) == (ratio[0] == ratio[0])
    only = charts.magnitude_chart(arrange(some({"magnitude_ratio": (1.0,) * 5})))
    assert len(groups(only)) == 1


def test_magnitudes_of_tensors_in_one_place_are_put_together():
    ratios = [
        (0.8, 0.9, 1.0, 1.1, 1.2),
        (0.7, 0.92, 1.02, 1.12, 1.25),
        (0.75, 0.94, 1.04, 1.14, 1.4),
    ]
    tensors = [replace(PLAIN, name=f"layers.0.e.{i}.up.weight", magnitude_ratio=r)
               for i, r in enumerate(ratios)]  # fmt: skip
    (group,) = groups(charts.magnitude_chart(arrange(tensors))).values()
    assert group.find("title").text == (
        "3 tensors, e.g. layers.0.e.0.up.weight\nm / ‖W‖: median 1.020, half of them 0.9200 to "
        "1.120, all 0.7000 to 1.400"
    )


def shade(svg, name):
    return groups(svg, "rect")[name].get("class")


@pytest.mark.parametrize("sizes", [(0.1, 0.22, 0.3), (0.001, 0.05, 1.0)], ids=["even", "log"])
def test_larger_updates_are_darker(sizes):
    tensors = some(*({"update_size": s} for s in (*sizes, 0.0)))
    grid = arrange(tensors)
    svg = charts.update_chart(grid)
    shades = [shade(svg, t.name) for t in tensors]
    assert shades == ["heat h0", "heat h4", "heat h7", "heat zero"]
    title = groups(svg, "rect")[tensors[1].name].find("title").text
    assert title == f"layers.1.q.weight\n‖W′ − W‖ / ‖W‖ = {charts.number(sizes[1])}"
    legend = charts.heat_legend(charts.heat_scale(grid))
    bounds = [e.text for e in legend.iter("text")]
    assert (bounds[0], bounds[-1]) == (charts.number(sizes[0], 2), charts.number(sizes[2], 2))
    low, high = sizes[0], sizes[2]
    middle = (low * high) ** 0.5 if high > 4 * low else (low + high) / 2
    assert bounds[4] == charts.number(middle, 2)
    assert [e.get("class") for e in legend.iter("rect")] == [f"heat h{i}" for i in range(8)]


def test_an_update_that_is_not_finite_leaves_the_scale_alone():
    tensors = some({"update_size": 0.1}, {"update_size": float("inf")}, {"update_size": 0.2})
    scale = charts.heat_scale(arrange(tensors))
    assert (scale.low, scale.high) == (0.1, 0.2)


def test_what_stands_in_no_layer_comes_first_and_wrong_kinds_keep_their_row():
    tensors = [*some({}, {}), replace(PLAIN, name="head.weight")]
    assert [c.label for c in arrange(tensors).columns] == ["–", "0", "1"]
    many = [replace(PLAIN, name=f"layers.0.k{i}.weight", max_ulp=1.0) for i in range(60)]
    grid = arrange([*many, replace(PLAIN, name="layers.0.bad.weight", status="wrong", max_ulp=0.0)])
    assert "bad" in grid.kinds
    assert grid.left_out == 61 - len(grid.kinds)


# --- tables


def test_rows_hold_their_tensors_numbers():
    one = replace(PLAIN, status="rounded", arithmetic="F16", max_ulp=3.25, misrounded=0.4,
                  relative_error=0.0021, error_ratio=1.75, update_size=0.125, diagnosis="rounded",
                  magnitude_ratio=(0.1, 0.2, 0.3, 0.4, 0.5))  # fmt: skip
    cells = [" ".join("".join(td.itertext()).split()) for td in tables._row(one)]
    assert cells == ["w", "rounded (in F16)", "BF16 4 × 3", "3.25", "40%", "0.00210", "1.75",
                     "0.125", "0.3000"]  # fmt: skip
    wrong = replace(one, status="wrong", diagnosis="not-applied", max_ulp=float("inf"))
    row = tables._row(wrong)
    assert "wrong: not-applied" in "".join(row[1].itertext())
    assert row[1].find("a").get("href") == "#not-applied"
    assert [td.get("data-v") for td in row][3] == "Infinity"
    open_ = [td.get("data-v") for td in tables._row(replace(one, status="unchecked"))]
    assert open_[3:7] == ["-1"] * 4


def test_wrong_tensors_come_before_those_that_are_further_off():
    tensors = some({"max_ulp": 9.0}, {"status": "wrong", "max_ulp": 0.0}, {"max_ulp": 20.0},
                   {"status": "wrong", "max_ulp": 5.0})  # fmt: skip
    order = [tensors.index(t) for t in tables.worst_first(tensors)]
    assert order == [3, 1, 2, 0]


def test_of_very_many_findings_all_places_and_the_first_are_listed(monkeypatch):
    monkeypatch.setattr(tables, "MAX_SAID", 20)
    found = [Finding("not-applied", f"layers.{i}.q.weight", f"number {i}") for i in range(30)]
    (group,) = groups_of(found)
    text = " ".join(" ".join(tables.finding(group).itertext()).split())
    assert "The first 20 with what was found" in text
    assert "number 19" in text
    assert "number 20" not in text
    assert "Where: layers.{0-29}.q.weight" in text
    assert "more; verify --json" not in text
    monkeypatch.setattr(tables, "MAX_PLACES", 25)
    text = " ".join(" ".join(tables.finding(group).itertext()).split())
    assert text.endswith(
        "Where: layers.{0-24}.q.weight and 5 places more; verify --json lists them all"
    )
    (group,) = groups_of(found[:20])
    assert "All 20 with what was found" in "".join(tables.finding(group).itertext())


def test_objects_with_other_keys_share_a_table():
    rows = [{"a": 1}, {"a": 2, "b": True}, {"b": None, "c": ["x"] * 130}]
    (table,) = (b for b in tables.figures({"rows": rows}))
    text = " ".join(" ".join(table.itertext()).split())
    assert text.startswith("rows a b c 1 – – 2 yes – – – x, x")
    assert text.endswith("and 30 more")


def test_tensors_that_were_not_compared_have_no_say_in_the_numbers():
    nan = float("nan")
    one = replace(PLAIN, name="a", status="unchecked", elements=0, max_ulp=nan, misrounded=nan,
                  relative_error=nan, error_ratio=nan, update_size=nan)  # fmt: skip
    exact = replace(PLAIN, name="b", max_ulp=0.5), replace(PLAIN, name="c", max_ulp=0.75)
    tensors = (one, *exact)
    found = precision(tensors)
    assert (found.tensors, found.elements, found.worst.name) == (2, 24, "c")
    assert found.misrounded == pytest.approx(1e-5)
    report = reports.right(tensors=tensors)
    assert report.worst.name == "c"
    assert Checked("full", (), tensors, ()).worst.name == "c"
    html = page(report)
    numbers = html[html.index('<dl class="numbers">') :].partition("</dl>")[0]
    assert "–" not in numbers
    assert "0.750 ulp" in numbers
    tier = _tier(tensors, "full", 0.0, 0)
    assert tier.summary.endswith("2 exact, 1 unchecked; worst 0.750 ulp in c")
    assert tier.figures["misrounded"] == pytest.approx(1e-5)
    alone = _tier((one,), "full", 0.0, 0)
    assert alone.summary == "1 changed tensor, every element: 1 unchecked"
    assert (alone.figures["misrounded"], alone.figures["worst_tensor"]) == (0.0, None)
    assert reports.right(tensors=(one,)).worst is None


def test_the_page_of_a_part_says_what_it_is():
    html = page(reports.right(level="fast"))
    assert "fast: all names, sampled values" in html
    two = reports.right(adapters=(reports.Path("a"), reports.Path("b")))
    assert ">a</span>" in page(two)
    assert ">b (DoRA)</span>" in page(two)
    assert "most</small>" in html


def test_a_tiers_state_is_that_of_its_own_findings():
    def states(*codes):
        report = reports.right(findings=tuple(Finding(c, "w", "x") for c in codes))
        return [tier_state(report, tier) for tier in report.tiers]

    assert states() == ["right", "right", "right"]
    assert states("bytes-differ") == ["wrong", "right", "right"]
    assert states("adapter-left") == ["warning", "right", "right"]
    assert states("adapter-left", "not-applied") == ["warning", "wrong", "right"]
