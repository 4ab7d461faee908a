"""The page and the table of a comparison: every row, site and reason, whoever loses in red; nothing from elsewhere."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedloom.cells import Cell
from fedloom.outcomes import Comparison, summarised
from fedloom.report import comparison_table
from fedloom.report.compared import better_alone, compared_page, costs, difference, told, write_comparison

SITES = ("lung, mediastinum, pleura", "<b>&")


def cell(values: tuple[float, float], sent: int, held_out: tuple[float, ...] = (0.2, 0.5)) -> Cell:
    low, mean = min(values), sum(values) / 2
    spread = {"mean": mean, "weighted_mean": mean, "std": 0.1, "worst": low, "worst_fifth": low}
    figures = {f"personal.accuracy.{name}": value for name, value in spread.items()}
    rounds = [{"round": i, "bytes": sent * i, "held_out": {"accuracy": x}} for i, x in enumerate(held_out, 1)]
    sites = {"personal": dict(zip(SITES, values, strict=True))}
    return Cell({**figures, "bytes_up": sent, "bytes_down": sent}, sites, rounds, 3.0)


@pytest.fixture
def compared() -> Comparison:
    found: dict[str, dict[int, Cell | str]] = {
        "local": {0: cell((0.50, 0.60), 100), 1: cell((0.52, 0.61), 100)},
        "fedavg": {0: cell((0.70, 0.55), 9000), 1: cell((0.71, 0.58), 9000)},
        "frozen": {0: cell((0.10, 0.10), 100), 1: cell((0.10, 0.10), 100)},
        "shared": dict.fromkeys((0, 1), "cannot run: a shared head needs <one> task"),
    }
    return summarised(found, (0, 1), "fedavg")


def content(compared: Comparison) -> dict[str, Any]:
    return json.loads(json.dumps({"fedloom": "0.1.0", "recipe": "ab" * 32, **vars(compared)}))


def test_a_site_that_loses_is_named_and_red(compared: Comparison) -> None:
    assert better_alone(content(compared)) == {"fedavg": ["<b>&"]}  # frozen sends nothing: it does not federate
    html = compared_page(content(compared), "squares")
    assert '<li>fedavg: <span class="loss">&lt;b&gt;&amp;</span></li>' in html
    red = re.findall(r'<span class="loss" title="([^"]*)"', html)
    assert red == ["&lt;b&gt;&amp;: better alone"]
    assert "! better alone than under fedavg: <b>&" in comparison_table(compared)


def test_what_sites_make_of_labels_that_they_know_is_a_block_of_its_own() -> None:
    def asked(all_labels: float, own: float) -> Cell:
        one = cell((0.5, 0.6), 100)
        more = {"global.accuracy.mean": all_labels, "global.accuracy.worst": 0.0, "global.accuracy.own_labels": own}
        return Cell({**one.figures, **more}, one.sites, one.rounds, one.seconds)

    rows: dict[str, dict[int, Cell | str]] = {"local": {0: asked(0.2, 0.4)}, "fedavg": {0: asked(0.3, 0.65)}}
    compared = summarised(rows, (0,))
    text = re.sub(" +", " ", comparison_table(compared))
    assert "global.accuracy.own_labels\n local 40.0 (one seed: no interval)\n fedavg 65.0" in text
    assert "local - fedavg -25.0 (one seed: no interval)" in text.partition("own_labels")[2]
    html = compared_page(content(compared), "squares")
    assert re.findall("<h2>(.*) view(.*)</h2>", html) == [("Personal", ""), ("Global", ""), ("Global", ", own labels")]
    block = html.partition("view, own labels</h2>")[2].partition("</table>")[0]
    assert re.findall('<th scope="col" class="n long">(.*?)</th>', block) == ["mean", "vs local-only"]
    assert re.findall('<td class="n.*?>(.*?)</td>', block) == ["40.0", "", "65.0", "+25.0"]


def test_the_legend_names_the_rows_that_have_a_line() -> None:
    still = Cell(cell((0.5, 0.6), 0).figures, {}, [])  # pooled training has no rounds
    html = compared_page(content(summarised({"local": {0: cell((0.5, 0.6), 100)}, "pooled": {0: still}}, (0,))), "s")
    legends = re.findall('<p class="legend">(.*?)</p>', html, re.DOTALL)
    assert [re.findall("</svg>(.*?)</span>", legend) for legend in legends if "key" in legend] == [["local-only"]] * 2


def test_nobody_is_red_where_there_is_nothing_to_lose_against(compared: Comparison) -> None:
    rows: dict[str, dict[int, Cell | str]] = {"fedavg": {0: cell((0.70, 0.55), 9000)}}
    alone = summarised(rows, (0,))
    assert better_alone(content(alone)) == {}
    assert 'class="loss"' not in compared_page(content(alone), "squares")


def test_a_row_is_judged_against_training_its_own_adapter_alone() -> None:
    wide, low, head = ({"kind": kind} for kind in ("bottleneck", "lora", "head"))
    adapters = {"local": wide, "local-lora": low, "fedavg": wide, "fedavg-lora": low, "probe": head, "frozen": None}
    found: dict[str, dict[int, Cell | str]] = {
        "local": {0: cell((0.50, 0.60), 100)},
        "local-lora": {0: cell((0.20, 0.80), 100)},
        "fedavg": {0: cell((0.40, 0.70), 9000)},
        "fedavg-lora": {0: cell((0.40, 0.70), 9000)},
        "probe": {0: cell((0.40, 0.70), 9000)},
        "frozen": {0: cell((0.10, 0.10), 100)},
    }
    known = {
        row: {"adapter": adapter, "alone": "local-lora" if row == "fedavg-lora" else "local"}
        for row, adapter in adapters.items()
    }
    comparison = summarised(found, (0,), known=known)
    own = content(comparison)
    sites = {row: one["sites"]["personal"] for row, one in own["rows"].items()}
    assert [one["gain"]["mean"] for one in sites["fedavg"].values()] == pytest.approx([-0.1, 0.1])
    assert [one["gain"]["mean"] for one in sites["fedavg-lora"].values()] == pytest.approx([0.2, -0.1])
    assert [one["gain"]["mean"] for one in sites["local-lora"].values()] == pytest.approx([-0.3, 0.2])
    assert sites["local"][SITES[0]]["gain"] is None
    worse, better = SITES
    assert better_alone(own) == {"fedavg": [worse], "fedavg-lora": [better], "probe": [worse]}
    table, html = comparison_table(comparison), compared_page(own, "squares")
    gains = {line.split()[0]: line.split()[-1] for line in table.splitlines() if line[-4:-2] in ("+0", "-5", "+5")}
    assert (gains["fedavg"], gains["fedavg-lora"]) == ("+0.0", "+5.0")
    for note in (
        "judged against local-lora, which trains the same adapter alone: fedavg-lora",
        "judged against local, which trains another adapter: local-lora and probe",
    ):
        assert f"* {note}" in table
        assert f"{note}." in html
    assert "<figcaption>fedavg-lora beside local-lora</figcaption>" in html
    assert "<figcaption>fedavg</figcaption>" in html
    own["rows"] |= {f"more-{i}": {"summary": {}, "missing": {}} for i in range(9)}
    assert {(one["of"], one["minus"]) for one in told(own)} >= {("fedavg-lora", "local-lora"), ("fedavg", "local")}
    assert ("fedavg-lora", "local") not in {(one["of"], one["minus"]) for one in told(own)}


def test_the_page_is_whole_and_loads_nothing(compared: Comparison) -> None:
    html = compared_page(content(compared), "squares")
    parser = HTMLParser()
    opened: list[str] = []
    parser.handle_starttag = lambda tag, attributes: opened.append(tag) if tag != "meta" else None  # type: ignore
    parser.handle_endtag = lambda tag: assert_equal(opened.pop(), tag)  # type: ignore[method-assign]
    parser.handle_startendtag = lambda tag, attributes: None  # type: ignore[method-assign]
    parser.feed(html.replace("<br>", ""))
    assert opened == []
    assert not re.findall(r"(?:src|href)=|url\(|@import|https?:|<script", html)
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def assert_equal(one: object, other: object) -> None:
    assert one == other


def test_every_row_figure_and_reason_is_on_the_page(compared: Comparison) -> None:
    html = compared_page(content(compared), "squares")
    for row in ("local-only", "fedavg", "frozen", "shared"):
        assert row in html
    assert "cannot run: a shared head needs &lt;one&gt; task" in html
    assert "63.5" in html  # the mean of fedavg
    assert html.count("<polyline") == 3 * 2 * 2  # rows that ran, by rounds and by bytes, on wide and narrow screens
    assert "+7.8<small>" in html  # 63.5 - 55.75 in the matrix, and the other way round
    assert "−7.8<small>" in html


def test_differences_are_found_whichever_way_round(compared: Comparison) -> None:
    own = content(compared)
    one = difference(own, "local", "fedavg", "personal.accuracy.mean")
    other = difference(own, "fedavg", "local", "personal.accuracy.mean")
    assert one is not None
    assert other is not None
    assert (one["mean"], one["low"], one["high"]) == (-other["mean"], -other["high"], -other["low"])
    assert difference(own, "fedavg", "shared", "personal.accuracy.mean") is None


def test_the_table_tells_spread_cost_and_rounds(compared: Comparison) -> None:
    lines = comparison_table(compared).splitlines()
    assert lines[1] == "p: sign-flip test of one pair by itself, not corrected for how many there are"
    (spread,) = (line.split() for line in lines if line.startswith("fedavg ") and "kB" not in line)
    assert spread[1:] == ["63.5", "63.5", "10.0", "56.5", "56.5", "+7.8"]
    (cost,) = (line.split() for line in lines if line.startswith("fedavg ") and "kB" in line)
    assert cost[1:] == ["9.0", "kB", "9.0", "kB", "3", "s", "2", "(2/2)"]
    assert "shared, seed 1: cannot run: a shared head needs <one> task" in lines


def test_no_time_is_told_of_what_has_no_rounds(compared: Comparison) -> None:
    compared.rows["fedavg"]["seconds"]["mean"] = 0.0  # as pooled training has it
    assert {row: own["time"] for row, own in costs(content(compared)).items()} == {
        "local": "3 s",
        "fedavg": "",
        "frozen": "3 s",
    }


def test_a_comparison_of_before_these_figures_is_shown_too(compared: Comparison, tmp_path: Path) -> None:
    own = content(compared)
    for row in own["rows"].values():
        for name in ("sites", "held_out", "reached", "seconds"):
            del row[name]
    for one in own["differences"]:
        del one["p"]
    (tmp_path / "comparison.json").write_text(json.dumps(own))
    write_comparison(tmp_path)
    assert "63.5" in (tmp_path / "comparison.html").read_text()
    table = comparison_table(Comparison(own["rows"], own["differences"], own["seeds"]))
    assert "63.5" in table
    assert "sign-flip" not in table  # it has no p


def test_of_many_rows_the_differences_to_local_only_and_to_the_best_are_told(compared: Comparison) -> None:
    own = content(compared)
    assert told(own) == own["differences"]
    own["rows"] |= {f"more-{i}": {"summary": {}, "missing": {}} for i in range(9)}
    few = told(own)
    assert {(one["of"], one["minus"]) for one in few if not one["figure"].endswith(".mean")} == {
        ("fedavg", "local"),
        ("frozen", "local"),
    }
    assert {(one["of"], one["minus"]) for one in few if one["figure"] == "personal.accuracy.mean"} == {
        ("fedavg", "local"),
        ("frozen", "local"),
        ("fedavg", "frozen"),
    }
    assert len(few) == len({(one["of"], one["minus"], one["figure"]) for one in few})
    (one,) = (
        one
        for one in few
        if (one["of"], one["minus"]) == ("fedavg", "local") and one["figure"] == "personal.accuracy.mean"
    )
    assert one["mean"] == pytest.approx(0.635 - 0.5575)


def test_a_row_of_fewer_seeds_is_marked() -> None:
    whole: dict[int, Cell | str] = {0: cell((0.50, 0.60), 100), 1: cell((0.52, 0.61), 100)}
    half: dict[int, Cell | str] = {1: cell((0.40, 0.70), 9000)}
    comparison = summarised({"local": whole, "fedavg": half, "ditto": half, "gone": {}}, (0, 1))
    said = "1 of the 2 seeds, and paired on those: fedavg and ditto"
    assert f"* {said}" in comparison_table(comparison)
    assert said in compared_page(content(comparison), "squares")
    assert "of the 2 seeds" not in comparison_table(summarised({"local": whole, "fedavg": whole}, (0, 1)))


def test_a_row_that_no_federation_may_have_is_marked(compared: Comparison) -> None:
    own = content(compared)
    assert "which no federation may do" not in comparison_table(compared)
    own["rows"]["pooled"] = own["rows"].pop("frozen")
    own["differences"] = []
    comparison = Comparison(own["rows"], (), own["seeds"])
    assert "* pooled: the data of all sites at one place, which no federation may do" in comparison_table(comparison)
    assert "pooled: the data of all sites at one place, which no federation may do." in compared_page(own, "squares")
