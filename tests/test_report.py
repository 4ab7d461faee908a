"""What a run shows when it has ended: every site, the worst as the worst, nothing hidden, nothing from elsewhere."""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.report import diagnostics, metrics_table, page, picture, probabilities, table, write_report
from fedloom.report.charts import bars, ticks
from fedloom.report.figures import between, duration, percent, points, rounds, size
from fedloom.report.result import Row, sites

NAMES = ("lung, mediastinum, pleura", "<b>&", "site-03", "Zürich")
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
VOID = {"meta", "br"}

fractions = st.floats(0, 1, allow_nan=False)
names = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=40)


def view(values: Mapping[str, float | None], metric: str = "accuracy") -> dict[str, Any]:
    have = [value for value in values.values() if value is not None]
    return {
        "sites": {
            name: {"metric": metric, "value": x, "examples": 20 + i} for i, (name, x) in enumerate(values.items())
        },
        "by_task": {"classification": spread(have)} if have else {},
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    mean = sum(values) / len(values)
    return {"mean": mean, "weighted_mean": mean, "std": 0.1, "worst": min(values), "worst_fifth": min(values)}


def summary_of(
    own: Mapping[str, float | None],
    references: Mapping[str, Mapping[str, float | None]] | None = None,
    silent: Mapping[int, Mapping[str, str]] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    roster = []
    for round in range(4):
        missed = (silent or {}).get(round, {})
        roster.append({"round": round, "answered": [n for n in own if n not in missed], "silent": dict(missed)})
    return {
        "fedloom": "0.1.0",
        "recipe": "7a805af1" * 8,
        "method": "fedavg",
        "seed": 0,
        "rounds": 4,
        "views": {"personal": view(own), "global": view(own), "newcomer": None},
        "references": {
            name: {"personal": view(values), "global": view(values), "newcomer": None}
            for name, values in (references or {}).items()
        },
        "left_out": {"newcomer": "every site took part."},
        "bytes_up": 2241360,
        "bytes_down": 1000,
        "bytes_site": 1250000,
        "seconds": 130.4,
        "roster": roster,
        **changes,
    }


SUMMARY = summary_of(
    {"lung, mediastinum, pleura": 0.52, "<b>&": 0.35, "site-03": 0.60, "Zürich": 0.45},
    {
        "frozen": {"lung, mediastinum, pleura": 0.40, "<b>&": 0.41, "site-03": 0.5, "Zürich": 0.31},
        "local": {"lung, mediastinum, pleura": 0.55, "<b>&": 0.20, "site-03": 0.58, "Zürich": 0.43},
    },
    {1: {"site-03": "its loss was not finite"}, 2: {"site-03": "no answer in 600 s"}},
)
LINES = [
    {
        "round": r,
        "sites": {
            name: {"answered": True, "task": "accuracy", "metric": 0.2 + 0.1 * r + 0.01 * i}
            for i, name in enumerate(NAMES)
        },
    }
    for r in range(4)
]
RECIPE = """
[method]
adapter = {kind = "lora", rank = 8}
[data]
source = "pack:photos"
partition = {kind = "iid", sites = 4}
[backbone]
name = "https://example.org/a/clip"
"""


class Parsed(HTMLParser):
    """Text, attributes and tags; an end that does not fit its beginning is an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def line_of(text: str, name: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(name + "  ")]
    return line


def test_the_table_gives_each_site_its_numbers_and_gains() -> None:
    line = line_of(table(SUMMARY), "lung, mediastinum, pleura")
    assert line.split()[3:] == ["20", "40.0", "55.0", "52.0", "+12.0", "-3.0", "!"]
    assert line_of(table(SUMMARY), "<b>&").split()[-1] == "*"


def test_the_table_names_the_worst_and_those_better_alone_in_words() -> None:
    text = table(SUMMARY)
    assert "* worst: <b>&" in text
    assert "! better alone (1 of 4 sites; local-only does better): lung," in text
    assert line_of(text, "mean").split() == ["mean", "40.5", "44.0", "48.0", "+7.5", "+4.0"]
    assert line_of(text, "std").split() == ["std", "10.0", "10.0", "10.0"]


def test_silence_cost_and_views_that_are_not_there_are_said() -> None:
    text = " ".join(table(SUMMARY).split())
    assert "site-03 was silent in rounds 2-3: no answer in 600 s" in text
    assert "4 rounds in 2 min 10 s; 2.2 MB up, 1.0 kB down" in text
    assert "newcomer view left out: every site took part." in text
    assert "mean, global view 40.5 44.0 48.0" in text
    assert "own labels" not in text
    views = SUMMARY["views"] | {"global": view({"a": 0.2})}
    views["global"]["by_task"]["classification"]["own_labels"] = 0.7
    known = {**SUMMARY, "views": views}
    shown = " ".join(table(known).split())
    assert "mean, global view 40.5 44.0 20.0 -20.5 -24.0 mean, own labels - - 70.0" in shown
    assert re.search(r"global, own labels<br>.*of labels that it knows.*70\.0", page(known), re.DOTALL)


@given(st.dictionaries(names, st.tuples(fractions, fractions), min_size=1, max_size=60), names)
def test_the_table_holds_every_site_in_eighty_columns_without_control_characters(
    values: dict[str, tuple[float, float]], method: str
) -> None:
    local = {"local": {name: other for name, (_, other) in values.items()}}
    text = table(summary_of({name: own for name, (own, _) in values.items()}, local, method=method))
    assert max(map(len, text.splitlines())) <= 80
    assert not CONTROL.search(text)
    joined = re.sub(r"\s", "", text)
    assert all(name in joined or len(name) > 17 for name in values)


@given(st.dictionaries(names, fractions, min_size=1, max_size=20))
def test_the_worst_is_worst_and_only_the_worst(values: dict[str, float]) -> None:
    rows = sites(summary_of(values))
    assert [row.label for row in rows] == list(values)
    least, most = min(values.values()), max(values.values())
    assert {row.label for row in rows if row.worst} == {n for n, x in values.items() if x == least and least < most}


@given(fractions, fractions)
def test_better_alone_is_a_loss_that_the_table_shows(own: float, alone: float) -> None:
    row = Row("a", own, {"local": alone})
    assert row.better_alone == points(own - alone).startswith("-")
    if own >= alone:
        assert not row.better_alone


def test_sites_of_unlike_metrics_are_not_compared() -> None:
    mixed = summary_of({"a": 0.9, "b": 0.8, "c": 0.1, "d": 0.2})
    for name, metric in zip("abcd", ["accuracy", "accuracy", "auroc", "auroc"], strict=True):
        mixed["views"]["personal"]["sites"][name]["metric"] = metric
    assert [row.label for row in sites(mixed) if row.worst] == ["b", "c"]
    assert line_of(table(mixed), "c").split()[1] == "auroc"
    mixed["views"]["global"]["by_task"] = {"questions": spread([0.3]), "labels": spread([0.2])}
    assert line_of(table(mixed), "mean, global view, questions").split()[-1] == "30.0"
    assert line_of(table(mixed), "mean, global view, labels").split()[-1] == "20.0"
    mixed["references"] = {"frozen": summary_of({"a": 0.5, "c": 0.5})["views"]}
    assert [row.gain("frozen") is None for row in sites(mixed)] == [False, True, True, True]


@pytest.mark.parametrize("missing", ["references", "views", "roster", "left_out"])
def test_what_is_missing_is_said_or_left_out_and_stops_nothing(missing: str) -> None:
    summary = {**SUMMARY, missing: {}}
    shown = table(summary) + Parsed(page(summary, LINES, (), RECIPE)).text + picture(summary)
    assert ("better alone" in shown) == (missing not in ("references", "views"))
    assert ("left out" in shown) is True


def test_a_site_without_a_number_is_named() -> None:
    summary = summary_of({"a": 0.5, "b": None, "c": float("nan")}, {"local": {"a": 0.4, "b": 0.3, "c": None}})
    for shown in (table(summary), Parsed(page(summary)).text):
        assert "b was not measured" in shown
        assert "c was not measured" in shown
        assert "nan" not in shown
    del summary["views"]["personal"]["sites"]["c"]  # it took part, and has no test example
    assert "c was not measured" in table(summary)


def test_what_a_site_sends_cannot_steer_a_terminal_or_a_page() -> None:
    summary = summary_of({"a\x1b[2J": 0.5, "[red]b": 0.4}, silent={0: {"a\x1b[2J": "<script>x</script>\x07\n[bold]"}})
    assert not CONTROL.search(table(summary))
    assert "[red]b" in table(summary)
    parsed = Parsed(page(summary))
    assert "<script>x</script>" in parsed.text
    assert "script" not in {tag for tag, _ in parsed.tags}


def test_with_every_reference_no_column_is_lost() -> None:
    others = ("majority", "frozen", "local", "pooled")
    own = {"lung, mediastinum, pleura": 0.5, "other": 0.4}
    shown = table(summary_of(own, {name: dict.fromkeys(own, 0.45) for name in others}))
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert line_of(shown, "other").split() == ["other", "21", *["45.0"] * 4, "40.0", "-5.0", "-5.0", "*!"]


def test_a_loss_is_red_where_there_is_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    red = re.findall(r"\x1b\[31m([^\x1b]*)\x1b", table(SUMMARY))
    assert {text.strip() for text in red} >= {"-3.0", "-6.0", "!"}
    assert "+12.0" not in red


def test_the_page_holds_every_site_and_says_what_was_done() -> None:
    text = Parsed(page(SUMMARY, LINES, LINES, RECIPE)).text.replace("\N{NO-BREAK SPACE}", " ")
    assert all(text.count(name) >= 2 for name in NAMES)  # what it gained, and when it took part
    assert (
        "4 sites fine-tuned https://example.org/a/clip together on photos: 4 rounds of fedavg with lora of rank 8"
        in text
    )
    assert "the mean accuracy of the sites is 48.0 %, 7.5 points above the frozen model and 4.0 points above" in text
    assert "the worst, <b>&, has 35.0 %, and 1 of 4 sites would do better alone." in text
    assert "newcomer" in text
    assert "every site took part." in text


def test_the_page_is_whole_and_loads_nothing() -> None:
    html = page(SUMMARY, LINES, LINES, RECIPE)
    parsed = Parsed(html)
    assert parsed.open == []
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in parsed.tags}
    assert not {"src", "href", "xlink:href", "srcset"} & {key for _, attributes in parsed.tags for key in attributes}
    assert "url(" not in html
    assert "@import" not in html
    assert len(html.encode()) < 60_000


def test_the_page_puts_the_worst_site_first() -> None:
    text = Parsed(page(SUMMARY, LINES)).text
    body = text[text.index("vs local-only") :]
    assert sorted(NAMES, key=body.index) == ["<b>&", "Zürich", "lung, mediastinum, pleura", "site-03"]


def test_each_silence_is_a_cell_with_a_word_and_its_reason() -> None:
    html = page(SUMMARY, LINES)
    assert html.count('class="cell silent"') == 2
    assert html.count('class="cell answered"') == 14
    assert html.count(">silent</text>") == 2
    assert "<title>its loss was not finite</title>" in html
    assert "was silent in rounds 2–3: no answer in 600 s" in html


def test_a_site_that_was_not_asked_has_an_empty_cell() -> None:
    summary = summary_of({"a": 0.5, "b": 0.4})
    summary["roster"][0]["answered"].remove("b")
    html = page(summary)
    assert html.count('class="cell answered"') == 7
    assert "3 of 3" in html


def evaluated(round: int, **sites: float | None) -> dict[str, Any]:
    """A line of rounds.jsonl."""
    return {"round": round, "sites": {name: {"task": "accuracy", "metric": x} for name, x in sites.items()}}


def test_each_task_has_a_curve_of_its_own() -> None:
    lines = [evaluated(round, a=0.2, b=0.4, c=0.8) for round in range(2)]
    for line in lines:
        line["sites"]["c"]["task"] = "labels"
    html = page(SUMMARY, lines, lines)
    assert html.count('class="line method"') == html.count('class="line local"') == 2 * 2  # a wide and a narrow picture
    assert html.count(">labels</text>") == 2
    assert html.count(">accuracy</text>") == 2


def test_the_curve_is_the_mean_over_the_sites_that_were_evaluated() -> None:
    lines = [evaluated(0, a=0.2, b=0.4), evaluated(1, a=None, b=0.4)]
    (points,) = re.findall(r'class="line method" points="([^"]*)"', page(SUMMARY, lines))[:1]
    heights = [float(point.split(",")[1]) for point in points.split()]
    zero, full = (
        float(y) for y in re.findall(r'class="grid" x1="[\d.]+" x2="[\d.]+" y1="([\d.]+)"', page(SUMMARY, lines))[:5:4]
    )
    assert ticks([0.2, 0.4, 0.3]) == (0.2, 0.25, 0.3, 0.35, 0.4)
    assert heights == pytest.approx([(zero + full) / 2, full], abs=0.02)


def test_a_run_that_was_never_evaluated_has_no_curve_and_says_so() -> None:
    assert "no round was evaluated" in page(SUMMARY, [evaluated(0, a=None)])


def told(round: int, **sites: float) -> dict[str, Any]:
    """A line whose server and sites told something."""
    method = {"norm": 2.0 + round, "server/moved/a.10.block": 0.5, "server/moved/a.9.block": 0.25 * round}
    return {
        "round": round,
        "method": method,
        "sites": {
            name: {"metric": None, "method": {"beta": x, "rank/a.1": x, "rank/a.2": None}} for name, x in sites.items()
        },
    }


def test_what_a_method_tells_becomes_maps_and_numbers() -> None:
    lines = [told(0, ada=1.0, bob=3.0), told(1, ada=5.0)]
    (moved,) = diagnostics.maps(lines)  # a group of one row is no map
    assert list(moved.rows) == ["a.9.block", "a.10.block"]
    assert moved.rows["a.9.block"] == {0: 0.0, 1: 0.25}
    assert (moved.low, moved.high, moved.shade(0.25)) == (0, 0.5, 0.5)
    numbers = diagnostics.numbers(lines)  # of sites: the mean
    assert list(numbers.values()) == [(2.0, 3.0), (2.0, 5.0)]
    assert next(iter(numbers)) == "Norm of the global adapter"
    assert diagnostics.maps([]) == []
    alike = diagnostics.Map("", 1, {"a": {0: 0.3}, "b": {0: 0.3}})
    assert alike.shade(0.3) == 0


def test_the_page_draws_what_a_method_told() -> None:
    html = page(summary_of({"ada": 0.5}), [told(0, ada=1.0), told(1, ada=5.0)])
    assert "Share of units that moved, at the server, by round: from 0 (empty) to 0.5 (full)." in html
    assert html.index("a.9.block") < html.index("a.10.block")
    assert html.count('class="shade"') == 4
    assert "<title>round 2: 0.25</title>" in html
    still = [{"round": 0, "sites": {}, "method": {"server/moved/a.1": 0.0, "server/moved/a.2": 0.0}}]
    assert "Share of units that moved, at the server: 0 everywhere, in every round." in page(
        summary_of({"a": 0.5}), still
    )
    assert 'class="map"' not in page(summary_of({"ada": 0.5}), [{"round": 0, "sites": {}, "method": {}}])


def test_the_picture_is_an_svg_whose_bars_are_as_long_as_their_numbers() -> None:
    root = ElementTree.fromstring(picture(SUMMARY))
    space = "{http://www.w3.org/2000/svg}"
    assert {"<b>&", "Zürich", "site-03"} <= {text.text for text in root.iter(space + "text")}
    drawn = [float(rect.attrib["width"]) for rect in root.iter(space + "rect") if rect.get("class") == "bar"][1:]
    assert [x / drawn[-1] for x in drawn] == pytest.approx([0.35 / 0.6, 0.45 / 0.6, 0.52 / 0.6, 1], abs=1e-3)
    assert not [key for element in root.iter() for key in element.attrib if "href" in key]


@pytest.mark.parametrize("n", [1, 60])
def test_few_and_many_sites(n: int) -> None:
    own = {f"site-{i:02}": 0.5 for i in range(n)}
    summary = summary_of(own, {"frozen": own, "local": own})
    tables = table(summary)
    assert all(name in shown for shown in (tables, page(summary), picture(summary)) for name in own)
    assert "worst:" not in tables  # they are all alike


@given(st.lists(st.floats(-1, 1, allow_nan=False), min_size=1))
def test_ticks_are_few_and_hold_every_value(values: list[float]) -> None:
    found = ticks(values)
    assert found[0] <= min(values) + 1e-6
    assert found[-1] >= max(values) - 1e-6
    assert 2 <= len(found) <= 7
    scale = bars(values)
    assert all(-0.01 <= scale(value) <= 100.01 for value in [0.0, *values])


def test_the_report_is_written_beside_what_it_is_made_from(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    local = tmp_path / "references" / "local"
    local.mkdir(parents=True)
    (local / "rounds.jsonl").write_text(json.dumps(LINES[0]) + "\n")
    write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == page(SUMMARY, LINES, LINES[:1], RECIPE)


def test_metrics_of_every_site_and_their_mean() -> None:
    found = {"a": {"accuracy": 0.5, "loss": 1.25, "examples": 30.0}, "b": {"accuracy": 0.25, "examples": 12.0}}
    lines = [line.split() for line in metrics_table(found).splitlines()]
    assert lines[0] == ["site", "examples", "accuracy", "%", "loss"]
    assert lines[1:3] == [["a", "30", "50.0", "1.250"], ["b", "12", "25.0", "-"]]
    assert lines[-1] == ["mean", "37.5", "1.250"]
    assert "mean" not in metrics_table(found, mean=False)
    assert metrics_table({}) == "No site has an example in this split."


def test_figures() -> None:
    assert [percent(x) for x in (0.4125, 1.0, -0.00001, None)] == ["41.2", "100.0", "0.0", "-"]
    assert [points(x) for x in (0.012, -0.0001, -0.3, None)] == ["+1.2", "+0.0", "-30.0", ""]
    assert [size(n) for n in (0, 999, 1000, 2241360, 999_999, 3.2e12)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "2.2 MB",
        "1.0 MB",
        "3.2 TB",
    ]
    assert [between((0.358, 0.604)), between((-0.038, 0.11), signed=True), between(None)] == ["36–60", "-4…+11", ""]
    assert [duration(s) for s in (0.4, 59.6, 130.4, 3661)] == ["0 s", "1 min 00 s", "2 min 10 s", "1 h 01 min"]
    assert [rounds(n) for n in ([0], [4, 3, 0, 5], [0, 2])] == ["round 1", "rounds 1 and 4-6", "rounds 1 and 3"]


def sure(summary: dict[str, Any]) -> dict[str, Any]:
    """The same summary with what the end of a run adds: intervals, calibration, lineage."""
    summary = json.loads(json.dumps(summary))
    for name, row in summary["views"]["personal"]["sites"].items():
        row |= {"low": row["value"] - 0.1, "high": row["value"] + 0.2, "ece": 0.111}
        for views in summary["references"].values():
            views["personal"]["sites"][name] |= {"gain": {"low": -0.07, "high": 0.13}, "ece": 0.222}
        summary.setdefault("details", {})[name] = {"reliability": [[30, 0.5, 0.4], [10, 0.9, 1.0]]}
    summary["lineage"] = {"backbone": "ba" * 32, "data": "da" * 32, "plan": "float32", "versions": {"torch": "9.9"}}
    return summary


def test_every_figure_stands_with_its_interval_and_every_gain_with_its_own() -> None:
    text = Parsed(page(sure(SUMMARY), LINES, LINES, RECIPE)).text
    assert "42–72" in text  # of 52.0
    assert text.count("−7…+13") == 2 * len(NAMES)
    assert "95 % bootstrap interval" in text
    assert "bootstrap" not in Parsed(page(SUMMARY, LINES, LINES, RECIPE)).text  # a run of an earlier version
    assert page(sure(SUMMARY)).count('class="whisker"') == 3 * len(NAMES)


def test_probabilities_are_pooled_over_sites_and_drawn_on_the_diagonal() -> None:
    summary = sure(SUMMARY)
    summary["details"]["site-03"]["reliability"] = [[10, 0.5, 0.0]]
    (diagram,) = probabilities.diagrams(summary).values()
    assert [(point.n, point.said) for point in diagram.points] == [(100, pytest.approx(0.5)), (30, pytest.approx(0.9))]
    assert [point.true for point in diagram.points] == pytest.approx([0.36, 1.0])
    assert diagram.points[0].radius > diagram.points[1].radius
    ideal = [diagram.x.end - diagram.x(0.3), diagram.y(0.3) - diagram.y.end]
    assert ideal[0] / (diagram.x.end - diagram.x.start) == pytest.approx(0.7)
    assert ideal[1] / (diagram.y.start - diagram.y.end) == pytest.approx(0.7)
    text = Parsed(page(summary)).text
    assert text.count("11.1") == len(NAMES)
    assert text.count("22.2") == 2 * len(NAMES)
    assert "Reliability" not in page(SUMMARY)


def test_labels_are_told_where_they_are_defined_and_named_where_not() -> None:
    summary = sure(SUMMARY)
    full = {"positives": 3.0, "sensitivity": 0.2, "specificity": 0.9, "auroc": 0.7, "auprc": 0.4}
    summary["details"]["Zürich"]["labels"] = {"<b>flu": full, "cold": {"positives": 0.0, "specificity": 0.5}}
    summary["details"]["<b>&"]["labels"] = {"<b>flu": {**full, "sensitivity": 0.4}, "cold": full}
    assert probabilities.by_label(summary)["<b>flu"]["sensitivity"] == pytest.approx(0.3)
    assert probabilities.by_label(summary)["cold"]["sites"] == 1
    assert probabilities.by_site(summary)["Zürich"]["specificity"] == pytest.approx(0.7)
    parsed = Parsed(page(summary))
    assert "Zürich: never or always there, and in not all of its means: cold." in parsed.text
    assert "<b>flu" in parsed.text
    assert parsed.open == []


def test_the_page_says_where_it_comes_from() -> None:
    text = Parsed(page(sure(SUMMARY), LINES, LINES, RECIPE)).text
    assert all(told in text for told in ("ba" * 32, "da" * 32, "7a805af1" * 8, "torch 9.9"))
