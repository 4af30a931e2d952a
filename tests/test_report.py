"""The report: what the text says of a small plan, what the page does with hostile names, and where the knee is."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from lowrank_fx._render import Mark, chart, count, knee, number, percent, scaled, seconds, speed, ticks
from lowrank_fx.latency import PairedTiming
from lowrank_fx.plan import MetricPoint, MetricSearch, Plan, SitePlan, Totals, TradeOff
from lowrank_fx.report import WIDTH, Report, common_prefix
from lowrank_fx.sites import LeftAlone
from lowrank_fx.targets import Keep, Metric, Quantity, Target, Tolerance

TIMING = PairedTiming(speedup=1.4567, baseline_seconds=0.0312, candidate_seconds=0.02142, spread=0.03, rounds=15)

QUERY = SitePlan(
    name="encoder.0.query",
    weight="encoder.0.query.weight",
    form="lowrank",
    rank=16,
    out_features=64,
    in_features=96,
    params=(6144, 2560),
    flops=(12_288_000, 5_120_000),
    error=0.1234,
    bound=0.13,
    effect=0.021,
    reason="",
)
DENSE = replace(
    QUERY,
    name="encoder.0.key",
    weight="encoder.0.key.weight",
    form="dense",
    rank=None,
    params=(6144, 6144),
    flops=(12_288_000, 12_288_000),
    error=0.0,
    bound=0.0,
    effect=0.0,
    reason="Keep(flops=0.75) is met without it; rank 32 would save 17% of its flops for a predicted effect of 0.05",
)
# A curve whose knee is known: x, y in the unit square are (0, 1), (.25, .3), (.5, .2), (1, 0), so 1 - x - y is .45 at
# the second point and .3 at the third.
CURVE = (TradeOff(0.4, 0.2, 0.5), TradeOff(0.55, 0.4, 0.15), TradeOff(0.7, 0.6, 0.1), TradeOff(1.0, 1.0, 0.0))


FLOPS = Keep(flops=0.75)


def plan_for(target: Target = FLOPS, **changes: object) -> Plan:
    plan = Plan(
        target=target,
        planner="budget",
        candidate="effect",
        seed=7,
        sites=(QUERY, DENSE),
        left_alone=(LeftAlone("embedding", "it is a table"), LeftAlone("positions", "it is a table")),
        cleanup=("norm1 folded into conv1",),
        notes=("2 user hooks are not carried over",),
        totals=Totals(
            model_params=(20_000, 16_416),
            model_flops=(30_000_000, 22_832_000),
            site_params=(12_288, 8_704),
            site_flops=(24_576_000, 17_408_000),
        ),
        predicted_error=0.0198,
        select_error=0.0205,
        error=0.0211,
        candidates=(("effect", 0.0205), ("energy", 0.03), ("uniform", 0.0405)),
        curve=CURVE,
    )
    return replace(plan, **changes)  # type: ignore[arg-type]


def lines_of(report: Report) -> list[str]:
    return str(report).splitlines()


def words(line: str) -> list[str]:
    """A line's cells, which at least two spaces keep apart."""
    return re.split(r"\s{2,}", line.strip())


def test_the_text_opens_with_the_target_and_the_outcome() -> None:
    lines = lines_of(Report(plan_for(), TIMING))
    assert lines[0] == "lowrank_fx: Keep(flops=0.75)"
    assert " ".join(lines[1:3]) == (
        "1 of 2 layers are factored: 82.1 % of the parameters and 76.1 % of the FLOPs remain, at a held-out error of "
        "0.0211. It measured 1.46x as fast as the original."
    )


def test_the_text_shows_asked_and_achieved_in_both_scopes() -> None:
    rows = [words(line) for line in lines_of(Report(plan_for(), TIMING))]
    assert ["before", "after", "kept", "asked"] in rows
    assert ["parameters", "of the model", "20,000", "16,416", "82.1 %"] in rows
    assert ["of the sites", "12,288", "8,704", "70.8 %"] in rows
    assert ["FLOPs", "of the model", "30 M", "22.83 M", "76.1 %", "75.0 %"] in rows
    assert ["of the sites", "24.58 M", "17.41 M", "70.8 %"] in rows


def test_a_share_of_the_sites_is_asked_of_the_sites() -> None:
    rows = [words(line) for line in lines_of(Report(plan_for(Keep(params=0.71, of="sites")), TIMING))]
    assert ["of the sites", "12,288", "8,704", "70.8 %", "71.0 %"] in rows


def test_the_text_puts_measured_beside_predicted() -> None:
    text = " ".join(str(Report(plan_for(), TIMING)).split())
    assert "error 0.0211 on held-out data; 0.0205 on the half that chose the plan, 0.0198 predicted" in text
    # 30 over 22.832 MFLOPs
    assert "speed 1.46x measured (31.2 ms to 21.4 ms, interquartile range 0.03 over 15 rounds); 1.31x if time" in text
    assert "effect 0.0205 (chosen), energy 0.0300, uniform 0.0405: error of each" in text
    assert "planner budget, seed 7" in text


def perplexity(model: object) -> float:
    return 8.0


SEARCH = MetricSearch(8.0, 8.25, (MetricPoint(0.6, 0.09, 9.125), MetricPoint(0.761, 0.0205, 8.25)))


@pytest.mark.parametrize(("of", "heading"), [("flops", "FLOPs kept"), ("params", "parameters kept")])
def test_a_metric_is_told_before_and_after_with_every_model_that_was_scored(of: Quantity, heading: str) -> None:
    target = Metric(perplexity, 0.5, of=of, evaluations=9, higher_is_better=False)
    report = Report(plan_for(target, metric=SEARCH), TIMING)
    assert report.quantity == of
    assert "at a held-out error of 0.0211 and a metric of 8.25, before 8. It measured" in report.headline
    text = " ".join(str(report).split())
    assert (
        f"metric 8 to 8.25 by {__name__}.perplexity, a drop of 0.25, asked at most 0.5; evaluated 3 times of at most 9"
    ) in text
    lines = lines_of(report)
    rows = [words(line) for line in lines]
    table = [
        [heading, "error", "metric", "drop"],
        ["100.0 %", "0", "8", "the original"],
        ["60.0 %", "0.0900", "9.125", "1.12", "drops too far"],
        ["76.1 %", "0.0205", "8.25", "0.25", "holds"],
    ]
    start = rows.index(table[0])
    assert lines[start - 1] == "Metric: every model that was scored, in order"
    assert rows[start : start + 4] == table
    page = report.to_html()
    for cell in (heading, *table[2], *table[3], "asked at most 0.5; evaluated 3 times of at most 9"):
        assert cell in page
    assert 'class="limit"' not in page


def test_a_metric_is_not_spoken_of_for_other_targets() -> None:
    report = Report(plan_for(), TIMING)
    assert (report.metric, report.scores) == ("", [])
    assert "metric" not in str(report).lower()
    assert "<h2>Metric</h2>" not in report.to_html()


def test_a_layer_is_a_row_and_a_dense_one_says_why() -> None:
    lines = lines_of(Report(plan_for(), TIMING))
    rows = [words(line) for line in lines]
    header = ["layer", "shape", "form", "rank", "parameters", "kept", "error", "bound", "effect"]
    row = ["encoder.0.query", "64 x 96", "lowrank", "16", "6,144 -> 2,560", "41.7 %", "0.1234", "0.1300", "0.0210"]
    assert header in rows
    assert row in rows
    # Right-aligned numbers end where their heading ends.
    assert len(lines[rows.index(header)]) == len(lines[rows.index(row)])
    start = next(i for i, cells in enumerate(rows) if cells[0] == "encoder.0.key")
    assert words(lines[start])[:3] == ["encoder.0.key", "64 x 96", "dense"]
    assert DENSE.reason in " ".join(" ".join(lines[start : start + 3]).split())


def test_the_factors_of_a_tied_head_are_added() -> None:
    head = replace(QUERY, name="head", params=(0, 2560))
    rows = [words(line) for line in lines_of(Report(plan_for(sites=(head,)), None))]
    assert ["head", "64 x 96", "lowrank", "16", "0 -> 2,560", "added", "0.1234", "0.1300", "0.0210"] in rows


def test_the_same_reason_is_told_once_in_a_row() -> None:
    text = str(Report(plan_for(sites=(DENSE, replace(DENSE, name="encoder.0.value"))), TIMING))
    assert text.count("as above") == 1


def test_the_text_lists_what_was_left_alone_by_reason() -> None:
    many = tuple(LeftAlone(f"table{i}", "it is a table") for i in range(9))
    text = str(Report(plan_for(left_alone=(*many, LeftAlone("gate", "it has one row"))), TIMING))
    assert "Left alone\n  table0, table1, table2, table3, table4, table5 and 3 more: it is a table\n" in text
    assert "\n  gate: it has one row\n" in text
    assert "Folded before layers were looked for\n  norm1 folded into conv1\n" in text
    assert "Notes\n  2 user hooks are not carried over\n" in text


def test_the_text_ends_with_the_curve_the_asked_target_and_the_knee() -> None:
    report = Report(plan_for(), TIMING)
    lines = lines_of(report)
    start = lines.index("Trade-off: what may remain of the model, and the error predicted for it")
    assert [words(line) for line in lines[start + 1 :]] == [
        ["parameters", "FLOPs", "error"],
        ["100.0 %", "100.0 %", "0"],
        ["82.1 %", "76.1 %", "0.0198", "<- asked: Keep(flops=0.75), measured 0.0211"],
        ["70.0 %", "60.0 %", "0.1000"],
        ["55.0 %", "40.0 %", "0.1500", "<- knee of the curve"],
        ["40.0 %", "20.0 %", "0.5000"],
    ]


def test_the_lines_fit_their_width() -> None:
    long = replace(QUERY, name="a_module_with_a_long_name." * 6 + "query", out_features=30_522, in_features=11_008)
    plan = plan_for(sites=(long, replace(DENSE, name="short")), notes=("word " * 80,))
    assert max(map(len, lines_of(Report(plan, TIMING)))) <= WIDTH
    # The end of a name tells layers apart, so the start is what is cut.
    assert any(re.match(r"  \.\.\.\S+query ", line) for line in lines_of(Report(plan, TIMING)))


@pytest.mark.parametrize(
    ("timing", "told"),
    [
        (None, "Its speed was not measured."),
        (replace(TIMING, speedup=0.934), "It measured slower than the original: 0.93x."),
    ],
)
def test_no_speed_and_a_bad_one_are_told(timing: PairedTiming | None, told: str) -> None:
    report = Report(plan_for(), timing)
    assert report.headline.endswith(told)
    assert told in report.to_html()


def test_a_plan_that_factors_nothing_says_so() -> None:
    note = "the factored model measured slower than the original (0.97x), so the original came back"
    plan = plan_for(Tolerance(0.1), sites=(DENSE,), candidate="dense", candidates=(), error=0.0, notes=(note,))
    report = Report(plan, None)
    assert report.headline == (
        "No layer is factored: the model is the original. The factored model measured slower than the original "
        "(0.97x), so the original came back."
    )
    assert "asked at most 0.1" in str(report)
    assert "asked at most 0.1" in report.to_html()


def test_a_plan_without_layers_or_curve_still_reports() -> None:
    plan = plan_for(sites=(), curve=(), candidates=(), cleanup=(), left_alone=(), notes=())
    assert "none that a form could stand for" in str(Report(plan, None))
    assert "none that a form could stand for" in Report(plan, None).to_html()
    assert "Trade-off" not in str(Report(plan, None))


# ---- the page --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Every tag with its attributes, the text, and whether tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "br", "link", "img"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"


def test_the_page_escapes_what_models_say() -> None:
    plan = plan_for(
        sites=(replace(QUERY, name=f"a.{HOSTILE}"), replace(DENSE, reason=HOSTILE)),
        left_alone=(LeftAlone(HOSTILE, HOSTILE),),
        cleanup=(HOSTILE,),
        notes=(HOSTILE,),
        planner=HOSTILE,
        candidate=HOSTILE,
        candidates=((HOSTILE, 0.1),),
    )
    html = Report(plan, TIMING).to_html()
    page = Page(html)
    assert page.open == []
    assert {"script", "img"} & {tag for tag, _ in page.tags} == set()
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    # Name, reason of a layer, weight and reason left alone, cleanup, note, planner, candidate.
    assert page.text.count(HOSTILE) == 8


def test_labels_on_the_chart_are_escaped() -> None:
    assert "<img" not in chart(CURVE, "flops", [Mark("asked", HOSTILE, 0.5, 0.1)])


def test_the_page_needs_nothing_from_elsewhere() -> None:
    html = Report(plan_for(), TIMING).to_html()
    page = Page(html)
    assert {"script", "link", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags} == set()
    assert {"src", "href", "xlink:href", "srcset", "data", "action"} & {n for _, a in page.tags for n in a} == set()
    assert re.findall(r"https?:|//[a-z]|@import|@font-face", html) == []
    assert re.findall(r"url\((.*?)\)", html) == ["#plot"]
    assert "prefers-color-scheme: dark" in html


def test_the_page_says_what_the_text_says() -> None:
    page = Page(Report(plan_for(), TIMING).to_html())
    text = " ".join(page.text.split())
    for piece in (
        "Keep(flops=0.75)",
        Report(plan_for(), TIMING).headline,
        "22.83 M",
        "31.2 ms to 21.4 ms; FLOPs: 1.31x",
        "6,144 → 2,560",
        DENSE.reason,
        "2 user hooks are not carried over",
        "norm1 folded into conv1",
        "it is a table",
    ):
        assert piece in text
    # A bar per layer; that of the factored one is as long as the share kept.
    bars = [attributes["style"] for tag, attributes in page.tags if tag == "i"]
    assert "width:41.7%" in bars


# ---- the curve -------------------------------------------------------------------------------------------------------


def test_the_knee_is_the_point_farthest_below_the_chord() -> None:
    assert knee(CURVE, "flops") == CURVE[1]
    assert knee(CURVE[::-1], "flops") == CURVE[1]


def test_the_knee_follows_the_quantity() -> None:
    # In parameters the second point is at x = .9 and the third at .2: now 1 - x - y is largest at the third.
    curve = (CURVE[0], replace(CURVE[1], params=0.94), replace(CURVE[2], params=0.52), CURVE[3])
    assert knee(curve, "params") == curve[2]
    assert knee(curve, "flops") == curve[1]


def test_points_worse_than_zeros_do_not_move_the_knee() -> None:
    worse = (TradeOff(0.3, 0.1, 40.0), *CURVE)
    assert knee(worse, "flops") == CURVE[1]


@pytest.mark.parametrize(
    "curve",
    [
        (),
        (CURVE[0], CURVE[-1]),
        (CURVE[0], TradeOff(0.7, 0.6, 0.4), CURVE[-1]),  # above the chord
        (CURVE[0], TradeOff(0.7, 0.6, 0.25), CURVE[-1]),  # on it
        (TradeOff(1, 1, 0.5), TradeOff(1, 1, 0.2), TradeOff(1, 1, 0)),  # no width
        (TradeOff(0.2, 0.2, 0), TradeOff(0.5, 0.5, 0), TradeOff(1, 1, 0)),  # no height
    ],
)
def test_curves_without_a_knee(curve: tuple[TradeOff, ...]) -> None:
    assert knee(curve, "flops") is None


def test_the_chart_places_points_on_its_axes() -> None:
    # x runs from .2 to 1 over 60 ... 680, y from 0 to .5 over 300 ... 20: FLOPs .6 at error .25 is in the middle.
    svg = chart(CURVE, "flops", [Mark("asked", "here", 0.6, 0.25)])
    assert '<circle class="mark" cx="370.0" cy="160.0" r="6"/>' in svg
    assert 'points="60.0,20.0 215.0,216.0 370.0,244.0 680.0,300.0 "' in svg


@pytest.mark.parametrize(
    ("target", "line"),
    [
        (Tolerance(0.25), 'x1="60" x2="680" y1="160.0" y2="160.0"'),
        (Keep(flops=0.6), 'x1="370.0" x2="370.0" y1="20" y2="300"'),
        # Of the model remain what is no site's, 30 - 24.576 MFLOPs, and half of the sites' 24.576: 17.712 of 30.
        (Keep(flops=0.5, of="sites"), 'x1="362.6" x2="362.6" y1="20" y2="300"'),
    ],
)
def test_the_chart_draws_what_was_asked(target: Target, line: str) -> None:
    assert f'<line class="limit" {line}/>' in chart(CURVE, "flops", [], Report(plan_for(target), None).limit)


def test_labels_do_not_lie_on_each_other() -> None:
    marks = [Mark("asked", f"target number {i}", 0.5 + 0.01 * i, 0.2) for i in range(5)]
    heights = sorted(float(y) for y in re.findall(r'class="label" x="[^"]+" y="([^"]+)"', chart(CURVE, "flops", marks)))
    assert len(heights) == 5
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 18


def test_a_curve_of_one_point_is_no_chart() -> None:
    assert chart(CURVE[:1], "flops", []) == ""


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.31, 1.0, [0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, 0.037, [0.0, 0.01, 0.02, 0.03, 0.04]),
        (1.0, 1.0, None),
    ],
)
def test_ticks_are_round_and_enclose(low: float, high: float, expected: list[float] | None) -> None:
    made = ticks(low, high, 5)
    assert made[0] <= low
    assert made[-1] >= high
    assert len(made) >= 2
    assert expected is None or made == expected


def test_numbers_read_as_they_should() -> None:
    assert [percent(0.599), percent(1.0), percent(0.99999)] == ["59.9 %", "100.0 %", ">99.9 %"]
    assert [number(0.12341), number(0.0), number(2e-6)] == ["0.1234", "0", "<0.0001"]
    assert [scaled(999), scaled(12_310_000_000), count(22_713_216)] == ["999", "12.31 G", "22,713,216"]
    assert [seconds(2.5), seconds(0.03121), seconds(4.2e-5), seconds(3e-8)] == ["2.5 s", "31.2 ms", "42 us", "30 ns"]
    assert speed(0.99499) == "0.99x"
    assert common_prefix(["a.b.c", "a.b.d"]) == "a.b."
    assert common_prefix(["a.b.c"]) == ""
    assert common_prefix(["ab.c", "a.c"]) == ""
