"""How well `fedloom advise` ranks what federating brings: its forecasts beside the published gains.

    python benchmarks/advise.py                     # every setting and row that is published and federates
    python benchmarks/advise.py vqamed-modality --rows fedavg,fedpia

A forecast is made at a development seed, on held-out examples; the gain it is held against is that of a published
comparison over local-only training, on test examples of its own seeds. Sites of a seeded partition are others at
another seed, so only natural sites are compared one by one; elsewhere the mean over sites is.

Writes benchmarks/results/advise.json and docs/results/advise.md: every pair, and Spearman's rank correlation with its
95 % bootstrap interval, as it is.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from publish import lineage
from scipy.stats import spearmanr

from fedloom.advise import ALONE, advise
from fedloom.errors import FedloomError
from fedloom.suites import Setting, settings

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SEED = 100  # a development seed of benchmarks/suite.toml
Pair = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="published ones; else all")
    parser.add_argument("--rows", default="", help="only these")
    arguments = parser.parse_args()
    published = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    compared = {name: own for name, own in published.items() if "local" in own.get("rows", {})}
    chosen = settings(ROOT / "benchmarks" / "suite.toml", arguments.settings or list(compared))
    rows = [row for row in arguments.rows.split(",") if row]
    sites, means = [], []
    for setting in chosen:
        for row in (row for row in compared[setting.name]["rows"] if not rows or row in rows):
            own = list(pairs(setting, row, compared[setting.name]["rows"]))
            sites += [pair for pair in own if "site" in pair]
            means += [pair for pair in own if "site" not in pair]
    asked = " ".join(
        ["python benchmarks/advise.py", *arguments.settings, *(["--rows", arguments.rows] if rows else [])]
    )
    found = {"command": asked, "seed": SEED, **lineage(), "sites": sites, "means": means}
    found |= {f"rank_of_{name}": ranked(own) for name, own in (("sites", sites), ("means", means))}
    (RESULTS / "advise.json").write_text(json.dumps(found, indent=1) + "\n")
    (ROOT / "docs" / "results" / "advise.md").write_text(page(found))
    print(page(found))


def pairs(setting: Setting, row: str, published: dict[str, Any]) -> Iterator[Pair]:
    """The forecast and the gain of every natural site, and of the mean over sites, under one row."""
    personal = published[row].get("sites", {}).get("personal", {})
    gains = {site: own["gain"]["mean"] for site, own in personal.items() if own["gain"]}
    try:
        recipe = setting.recipe.row(row).altered({"federation.seed": SEED})
        if not gains or recipe.method_name in ALONE:
            return
        forecast = {one.site: one.gain for one in advise(recipe)}
    except FedloomError as e:
        print(f"{setting.name}, {row}: {e}")
        return
    both = [site for site in forecast if site in gains]
    where = {"setting": setting.name, "row": row}
    if recipe.data is not None and recipe.data.partition.kind == "natural":
        for site in both:
            yield {**where, "site": site, "forecast": forecast[site], "gain": gains[site]}
    mean_of = {
        **where,
        "forecast": float(np.mean(list(forecast.values()))),
        "gain": float(np.mean(list(gains.values()))),
    }
    print(f"{setting.name}, {row}: forecast {100 * mean_of['forecast']:+.1f}, gain {100 * mean_of['gain']:+.1f}")
    yield mean_of


def ranked(own: Sequence[Pair]) -> dict[str, Any]:
    """Spearman's rank correlation of forecasts and gains; its interval by drawing the pairs anew."""
    if len(own) < 3:
        return {"n": len(own), "rho": None, "low": None, "high": None}
    both = np.array([[pair["forecast"], pair["gain"]] for pair in own])
    rng = np.random.default_rng(0)
    drawn = [both[rng.integers(len(both), size=len(both))] for _ in range(2000)]
    rhos = [spearmanr(*some.T).statistic for some in drawn if all(len(set(column)) > 1 for column in some.T)]
    low, high = np.quantile(rhos, [0.025, 0.975])
    return {"n": len(own), "rho": float(spearmanr(*both.T).statistic), "low": float(low), "high": float(high)}


def page(found: dict[str, Any]) -> str:
    """The page of docs/results."""
    lines = [
        "# advise: the forecast of one round, beside the gain at the end",
        "",
        f"`{found['command']}`, seed {found['seed']}, commit {found['commit'][:10]}, {found['machine']}. Made from "
        "`benchmarks/results/advise.json` by `benchmarks/advise.py`. Gains over local-only training, in points.",
        "",
    ]
    for name, what in (("sites", "natural sites, one by one"), ("means", "means over the sites of a setting and row")):
        own = found[f"rank_of_{name}"]
        rho = "too few pairs" if own["rho"] is None else f"{own['rho']:.2f} [{own['low']:.2f}, {own['high']:.2f}]"
        lines.append(f"- Spearman's rank correlation over {own['n']} {what}: {rho}")
    for name in ("means", "sites"):
        lines += ["", "| setting | row | site | forecast | gain |", "| --- | --- | --- | ---: | ---: |"]
        lines += [
            f"| {pair['setting']} | {pair['row']} | {pair.get('site', 'mean')} | {100 * pair['forecast']:+.1f} | "
            f"{100 * pair['gain']:+.1f} |"
            for pair in found[name]
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
