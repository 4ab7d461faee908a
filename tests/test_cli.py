"""The command line, as a user meets it."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedloom as package
from fedloom.estimate import estimate
from fedloom.recipe import load
from fedloom.report.figures import measured as figure
from fedloom.report.figures import size
from fedloom.tensors import to_bytes

Fedloom = Callable[..., tuple[int, str, str]]


@pytest.fixture
def done(fedloom: Fedloom, recipe: Path, tmp_path: Path) -> Path:
    """The folder of a finished run."""
    code, _, err = fedloom("run", recipe, "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    return tmp_path / "run"


def test_every_command_has_help_with_an_example(fedloom: Fedloom) -> None:
    for command in ("run", "compare", "evaluate", "predict", "check"):
        code, out, _ = fedloom(command, "--help")
        assert code == 0
        assert f"Example: fedloom {command}" in " ".join(out.split())
    assert fedloom("--version")[1] == f"fedloom {package.__version__}\n"


def test_a_run_leaves_its_folder(done: Path, recipe: Path) -> None:
    lines = [json.loads(line) for line in (done / "rounds.jsonl").read_text().splitlines()]
    summary = json.loads((done / "summary.json").read_text())
    assert [line["round"] for line in lines] == [0, 1]
    assert load(done / "recipe.toml").difference(load(recipe)) == ["backbone.dtype", "backbone.attention"]
    assert set(summary["views"]["personal"]["sites"]) == {"oslo", "rome", "kyiv"} == set(lines[0]["sites"])
    assert set(summary["references"]) == {"frozen", "local"}
    assert summary["left_out"].keys() == {"newcomer"}
    assert summary["views"]["newcomer"] is None
    for line in lines:
        for site in line["sites"].values():
            assert site["answered"]
            assert site["bytes_up"] == site["bytes_down"] > 0
            assert 0 <= site["metric"] <= 1
    assert summary["bytes_up"] == sum(row["bytes_up"] for line in lines for row in line["sites"].values())
    assert (done / "report.html").stat().st_size > 1000
    assert {path.name for path in (done / "sites").iterdir()} == {"oslo", "rome", "kyiv"}


def test_the_table_names_every_site_and_what_it_gained(fedloom: Fedloom, recipe: Path, tmp_path: Path) -> None:
    _, out, _ = fedloom("run", recipe, "--out", tmp_path / "run")
    assert all(site in out for site in ("oslo", "rome", "kyiv"))
    assert "round 2/2" in out
    assert str(tmp_path / "run" / "report.html") in out


def test_the_majority_answer_stands_beside(fedloom: Fedloom, recipe: Path, tmp_path: Path) -> None:
    rows = '["majority", "frozen"]'
    _, out, _ = fedloom("run", recipe, "--out", tmp_path / "run", "--set", f"reference.rows={rows}")
    run = package.Run(tmp_path / "run")
    for name, row in run.summary["references"]["majority"]["personal"]["sites"].items():
        own = run.federation.participants[name]
        counts = Counter(str(example.label) for example in own.site.train.examples)
        often = {label for label, n in counts.items() if n == max(counts.values())}
        test = Counter(str(example.label) for example in own.test.examples)
        assert row["value"] * len(own.test) in [pytest.approx(test[label]) for label in often]
    head = out[: out.index("oslo")].split()
    assert head.count("major-") == 1  # a column, and no gain is told against it
    assert head.count("frozen") == 2


def test_evaluate_says_what_the_summary_says(fedloom: Fedloom, done: Path) -> None:
    found = package.Run(done).evaluate()
    summary = package.Run(done).summary
    for site, row in summary["views"]["personal"]["sites"].items():
        assert found[site]["accuracy"] == row["value"]
    code, out, _ = fedloom("evaluate", done, "--site", "rome", "--split", "held_out")
    assert code == 0
    assert "rome" in out
    assert "oslo" not in out


def test_predict_gives_probabilities_the_likeliest_first(fedloom: Fedloom, done: Path, tmp_path: Path) -> None:
    answers = package.Run(done).predict("kyiv", tmp_path / "2.png")
    assert {label for label, _ in answers} == {"red", "green", "blue"}
    assert sum(probability for _, probability in answers) == pytest.approx(1)
    assert answers == sorted(answers, key=lambda answer: -answer[1])
    code, out, _ = fedloom("predict", done, "--site", "kyiv", "--image", tmp_path / "2.png", "--top", 1)
    assert code == 0
    assert out.split()[-1] == answers[0][0]


def test_set_changes_a_key(fedloom: Fedloom, recipe: Path, tmp_path: Path) -> None:
    assert fedloom("run", recipe, "--set", "federation.rounds=1", "--out", tmp_path / "run")[0] == 0
    assert package.Run(tmp_path / "run").recipe.federation.rounds == 1


def test_a_dry_run_estimates_and_writes_nothing(fedloom: Fedloom, recipe: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = fedloom("run", recipe, "--dry-run", "--out", tmp_path / "run")
    assert code == 0
    assert sorted(tmp_path.rglob("*")) == before
    said = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert said["sites"] == "3"
    fedloom("run", recipe, "--out", tmp_path / "run")
    sent: dict[str, Any] = package.Run(tmp_path / "run").summary
    assert said["up"] == size(sent["bytes_up"])
    expected = estimate(load(recipe))
    assert (expected.bytes_up, expected.bytes_down) == (sent["bytes_up"], sent["bytes_down"])
    kept = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.safetensors"))
    assert expected.disk == pytest.approx(kept, rel=0.05)


def test_a_dry_run_knows_sites_of_other_widths(recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    same = {"method": {"name": "flexlora", "adapter": {"kind": "lora", "rank": 8}}}
    unlike = {**same, "sites.oslo.width": 2}
    expected, alike = (estimate(load(recipe, settings)) for settings in (unlike, same))
    done = package.run(load(recipe, unlike), tmp_path / "run")
    assert (expected.bytes_up, expected.bytes_down) == (done.summary["bytes_up"], done.summary["bytes_down"])
    assert expected.bytes_site == done.summary["bytes_site"]
    assert 2**27 < expected.memory <= done.summary["memory"] < 2**37  # torch alone is more; a machine has less
    assert expected.trained[0] < expected.trained[1] == alike.trained[0] == alike.trained[1]
    assert any(line.startswith("trained ") and " to " in line for line in expected.lines())
    estimate(load(recipe).row("feddlp"))
    assert not caplog.records, "what a dry run leaves out is no concern of the user"


def test_check_names_sites_and_images_that_two_of_them_share(fedloom: Fedloom, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes((tmp_path / "17.png").read_bytes())  # oslo's, and rome's
    code, out, _ = fedloom("check", recipe)
    assert code == 0
    assert "oslo: " in out
    assert "images in two sites or two splits: 1\n" in out
    assert "(bytes)" in out
    for i in range(2, 8):
        (tmp_path / f"{i}.png").write_bytes((tmp_path / f"{i + 16}.png").read_bytes())
    assert "images in two sites or two splits: 7; 5 of them:\n" in fedloom("check", recipe)[1]


def test_newcomers_and_partial_participation(fedloom: Fedloom, recipe: Path, tmp_path: Path) -> None:
    settings = ("--set", "data.newcomer=['rome']", "--set", "federation.participation=0.5")
    code, _, err = fedloom("run", recipe, *settings, "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    summary = package.Run(tmp_path / "run").summary
    assert set(summary["views"]["newcomer"]["sites"]) == {"rome"}
    assert set(summary["views"]["personal"]["sites"]) == {"oslo", "kyiv"}
    assert [len(line["answered"]) for line in summary["roster"]] == [1, 1]


def test_a_newcomer_is_served_after_the_run_too(fedloom: Fedloom, recipe: Path, tmp_path: Path) -> None:
    assert fedloom("run", recipe, "--set", "data.newcomer=['rome']", "--out", tmp_path / "run")[0] == 0
    done = package.Run(tmp_path / "run")
    row = done.summary["views"]["newcomer"]["sites"]["rome"]
    assert done.evaluate(site="rome")["rome"][row["metric"]] == row["value"]
    (kept,) = (tmp_path / "run" / "sites" / "rome").iterdir()
    assert to_bytes(done.private("rome")) == kept.read_bytes()
    assert to_bytes(package.Run(done.folder, done.last).private("rome")) == kept.read_bytes(), "made anew"
    code, out, _ = fedloom("export", done.folder, "--site", "rome", "--to", tmp_path / "to")
    assert (code, out.splitlines()[0]) == (0, f"{tmp_path / 'to' / 'rome'}: peft")
    card = (tmp_path / "to" / "rome" / "README.md").read_text()
    assert figure(row["metric"], row["value"]) in card
    assert "2 rounds and fine-tuning of its own" in card


def test_a_frozen_prefix_may_be_kept(fedloom: Fedloom, recipe: Path, tmp_path: Path) -> None:
    for folder, kept in (("plain", "false"), ("kept", "true")):
        settings = ("--set", f"backbone.cache={kept}", "--set", "method.adapter.last=1")
        assert fedloom("run", recipe, *settings, "--out", tmp_path / folder)[0] == 0
    plain, cached = (package.Run(tmp_path / folder) for folder in ("plain", "kept"))
    assert plain.summary["views"] == cached.summary["views"]


def test_groups_of_sites_with_tasks_of_their_own(fedloom: Fedloom, groups: Path, tmp_path: Path) -> None:
    code, _, err = fedloom("run", groups, "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    done = package.Run(tmp_path / "run")
    colours, cities = ("blue", "green", "red"), ("kyiv", "oslo", "rome")
    for view in ("personal", "global"):
        shown = done.summary["views"][view]
        assert set(shown["by_task"]) == {"colours", "cities"}  # no mean over unlike tasks
        assert set(shown["sites"]) == {f"colours: {city}" for city in cities} | {f"cities: {c}" for c in colours}
        for group, statistics in shown["by_task"].items():
            own = [row["value"] for site, row in shown["sites"].items() if site.startswith(group)]
            assert statistics["mean"] == pytest.approx(sum(own) / 3)
    # A pool is of the sites of one group, which all hold out a quarter of 16 images.
    assert {row["examples"] for row in done.summary["views"]["global"]["sites"].values()} == {12}
    assert {label for label, _ in done.predict("colours: rome", tmp_path / "2.png")} == set(colours)
    assert {label for label, _ in done.predict("cities: red", tmp_path / "2.png")} == set(cities)
    assert not any(name.startswith("head/") for name in done.shared)
    assert any(name.startswith("head/") for name in done.private("cities: red"))


def test_unlike_tasks_share_no_head(fedloom: Fedloom, groups: Path, tmp_path: Path) -> None:
    code, _, err = fedloom("run", groups, "--set", "method.heads=shared", "--out", tmp_path / "run")
    assert code == 2
    assert "a shared head needs one task at all sites" in err
    assert "heads = 'private'" in err


def test_groups_are_checked_and_estimated(fedloom: Fedloom, groups: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for path in (*tmp_path.glob("*.png"), tmp_path / "manifest.jsonl"):
        (tmp_path / "elsewhere" / path.name).write_bytes(path.read_bytes())
    cities = ("--set", f"groups.cities.data.source={tmp_path / 'elsewhere' / 'manifest.jsonl'}")
    code, out, _ = fedloom("check", groups, *cities)
    assert code == 0
    assert "6 sites, 0 newcomers" in out
    assert "images in two sites or two splits: 48" in out  # each lies in two folders
    code, out, _ = fedloom("run", groups, *cities, "--dry-run")
    assert code == 0
    assert out.startswith("sites     6\n")
