"""How sure a figure is: intervals over what was tested, probabilities beside what came of them, and lineage."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

import fedloom as package
from fedloom.backbones import Adaptable
from fedloom.data import Dataset, Example, Pixels
from fedloom.lineage import fingerprint, weights
from fedloom.metrics import by_label, calibration_error
from fedloom.statistics import bootstrap
from fedloom.tasks import VQA, Classification, Detection, Ranking, Task
from fedloom.tested import Answered
from fedloom.views import summarised

COLOURS = ("red", "green", "blue")
TASKS = (Classification(COLOURS, head="linear"), VQA(COLOURS), Ranking(COLOURS), Detection(COLOURS))


def said(task: Task, n: int = 12, groups: int | None = None) -> Answered:
    rows = tuple(
        Example(
            (COLOURS[i % 3],) if isinstance(task, Detection) else COLOURS[i % 3], f"{i}.png", None, None, None, group
        )
        for i in range(n)
        for group in [f"patient {i % groups}" if groups else None]
    )
    logits = torch.randn(n, 3, generator=torch.Generator().manual_seed(n))
    return Answered(task, Dataset(rows), logits)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_the_metric_is_the_ratio_of_its_parts(task: Task) -> None:
    own = said(task)
    parts = task.parts(own.logits, own.targets)
    assert parts.shape == (12, 2)
    expected = task.metrics(own.logits, own.targets)[task.metric]
    assert float(parts[:, 0].sum() / parts[:, 1].sum()) == pytest.approx(expected)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_what_is_judged_is_probabilities_and_what_came_of_them(task: Task) -> None:
    own = said(task)
    p, y = task.judged(own.logits, own.targets)
    assert p.shape == y.shape
    assert bool(((p >= 0) & (p <= 1) & (y >= 0) & (y <= 1)).all())
    row, details = own.row(), own.details()
    assert sum(n for n, _, _ in details["reliability"]) == len(p)
    by_bins = sum(n * abs(mean - true) for n, mean, true in details["reliability"]) / len(p)
    assert row["ece"] == pytest.approx(by_bins) == pytest.approx(calibration_error(p, y))


def test_the_calibration_error_of_a_choice_is_that_of_the_largest_probability() -> None:
    task = Classification(COLOURS, head="linear")
    sure = torch.tensor([[9.0, 0, 0], [9.0, 0, 0]])
    p, y = task.judged(sure, torch.tensor([0, 1]))
    assert_close(y, torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert bool((p > 0.99).all())
    assert calibration_error(p, y) == pytest.approx(0.5, abs=1e-3)


def ones(scores: list[float]) -> Any:
    return np.array([[score, 1.0] for score in scores])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_an_interval_holds_its_mean_and_no_more_than_the_values(scores: list[float]) -> None:
    low, high = bootstrap(ones(scores))
    assert low is not None
    assert high is not None
    assert min(scores) - 1e-9 <= low <= high <= max(scores) + 1e-9
    assert bootstrap(ones(scores)) == (low, high)  # the same at every call


def test_the_interval_of_a_mean_is_what_the_normal_distribution_says_of_many() -> None:
    scores = np.random.default_rng(1).random(4000) < 0.3
    low, high = bootstrap(ones(scores.astype(float).tolist()))
    half = 1.96 * (scores.mean() * (1 - scores.mean()) / 4000) ** 0.5
    assert low == pytest.approx(scores.mean() - half, abs=half / 8)
    assert high == pytest.approx(scores.mean() + half, abs=half / 8)


def test_a_difference_is_drawn_in_pairs() -> None:
    own = ones([float(x) for x in np.random.default_rng(2).random(50) < 0.5])
    assert bootstrap(own, own) == (0.0, 0.0)
    apart = bootstrap(own, ones([0.5] * 50))
    assert apart[0] is not None
    assert apart[0] < 0 < apart[1]


def test_sites_of_unlike_sizes_are_summed_up_as_by_hand() -> None:
    values, sizes = (0.9, 0.2, 0.6, 0.5), (10, 30, 20, 40)
    found = summarised({"value": value, "examples": n} for value, n in zip(values, sizes, strict=True))
    assert found == pytest.approx(
        {
            "mean": 2.2 / 4,
            "weighted_mean": (9 + 6 + 12 + 20) / 100,
            "std": (0.35**2 + 0.35**2 + 0.05**2 + 0.05**2) ** 0.5 / 2,  # of these sites: n, not n - 1
            "worst": 0.2,
            "worst_fifth": 0.2,  # one site at least
        }
    )


@pytest.mark.parametrize(("n", "fifth"), [(1, 1), (5, 1), (7, 1), (8, 2), (10, 2), (13, 3)])
def test_the_worst_fifth_and_the_rest_are_numpy_s(n: int, fifth: int) -> None:
    rng = np.random.default_rng(n)
    values, sizes = rng.random(n), rng.integers(1, 99, n)
    found = summarised({"value": float(value), "examples": int(m)} for value, m in zip(values, sizes, strict=True))
    assert found == pytest.approx(
        {
            "mean": values.mean(),
            "weighted_mean": np.average(values, weights=sizes),
            "std": values.std(),
            "worst": values.min(),
            "worst_fifth": np.sort(values)[:fifth].mean(),
        }
    )


def test_an_interval_that_nothing_defines_is_none() -> None:
    assert bootstrap(np.empty((0, 2))) == (None, None)
    assert bootstrap(np.zeros((5, 2))) == (None, None)
    rare = np.zeros((5, 2))
    rare[0] = [2.0, 2.0]  # most draws have a ratio, some have none
    assert bootstrap(rare) == (1.0, 1.0)


def test_examples_of_one_patient_are_drawn_together() -> None:
    """Twelve patients told four times each are no more certain than told once."""
    task = Classification(COLOURS, head="linear")
    once = said(task, 12)
    four = Answered(
        task,
        Dataset(
            tuple(
                Example(row.label, f"{k}/{row.image}", group=row.image)
                for k in range(4)
                for row in once.dataset.examples
            )
        ),
        once.logits.repeat(4, 1),
    )
    torn = Answered(task, Dataset(tuple(Example(row.label, row.image) for row in four.dataset.examples)), four.logits)
    assert (four.row()["low"], four.row()["high"]) == pytest.approx((once.row()["low"], once.row()["high"]))
    assert torn.row()["high"] - torn.row()["low"] < 0.75 * (four.row()["high"] - four.row()["low"])


def test_figures_of_a_label_are_counts_over_counts() -> None:
    p = torch.tensor([[0.9, 0.1, 0.9], [0.8, 0.2, 0.6], [0.3, 0.6, 0.7], [0.7, 0.4, 0.8]])
    there = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 0, 1], [1, 0, 1]])
    one, never, always = by_label(p, there)
    assert one == pytest.approx(
        {"positives": 3, "sensitivity": 2 / 3, "specificity": 0, "auroc": 1 / 3, "auprc": 29 / 36}
    )
    assert never == {"positives": 0, "specificity": 0.75}
    assert always == {"positives": 4, "sensitivity": 1.0}


def test_a_run_keeps_what_its_report_needs(recipe: Path, tmp_path: Path) -> None:
    run = package.run(recipe, tmp_path / "run")
    sites = run.summary["views"]["personal"]["sites"]
    for name, row in sites.items():
        assert row["low"] <= row["value"] <= row["high"]
        own = run.federation.participants[name]
        p, y = own.site.task.judged(*_predicted(run, name))
        assert row["ece"] == pytest.approx(calibration_error(p, y))
        assert sum(n for n, _, _ in run.summary["details"][name]["reliability"]) == row["examples"]
        for reference in ("frozen", "local"):
            beside = run.summary["references"][reference]["personal"]["sites"][name]
            assert beside["gain"]["low"] <= row["value"] - beside["value"] <= beside["gain"]["high"]
    assert json.dumps(run.summary, allow_nan=False)


def _predicted(run: package.Run, name: str) -> tuple[Tensor, Tensor]:
    from fedloom.federation import predict

    own = run.federation.participants[name]
    logits = predict(run.federation.method, own.site, run.private(name), run.shared, own.test)
    return logits, own.site.task.targets([example.label for example in own.test.examples])


def test_a_fingerprint_is_of_contents_and_not_of_places(
    model: Adaptable, dataset: Callable[..., Dataset], tmp_path: Path
) -> None:
    own = dataset(model, Classification(COLOURS, head="linear"), 4)
    (tmp_path / "moved").mkdir()
    for example in own.examples:
        (tmp_path / "moved" / f"a-{example.image}").write_bytes((tmp_path / str(example.image)).read_bytes())
    moved = Dataset(
        tuple(Example(row.label, f"a-{row.image}") for row in own.examples),
        Pixels(tmp_path / "moved", model.network.decode),
    )
    assert fingerprint(own) == fingerprint(moved)
    assert fingerprint(own[:3], own[3:]) != fingerprint(own)
    relabelled = Dataset((Example("blue", own.examples[0].image), *own.examples[1:]), own.pixels)
    assert fingerprint(relabelled) != fingerprint(own)
    Image.new("RGB", (8, 8)).save(tmp_path / str(own.examples[0].image))
    assert fingerprint(own) != fingerprint(moved)


def test_weights_are_told_apart(network: Callable[..., Any]) -> None:
    one, same, other = network(), network(), network()
    with torch.no_grad():
        next(other.module.parameters()).view(-1)[0] += 1e-3
    assert weights(one.module) == weights(same.module) != weights(other.module)
    assert weights(network(dtype=torch.bfloat16).module) != weights(one.module)
