"""One site, with and without the permutation at the client: what is it worth, and are there two basins?

A few sites train apart and are merged. One of them then takes the merged adapter in, in four ways, and trains on. And
along the straight line between its own adapter and the global one, before and after the global one's units took the
order of its own, the loss is measured: a barrier between them means two basins, its absence one.
"""

from dataclasses import replace

from fedloom.federation import visible
from fedloom.methods import FedPIA
from fedloom.studies.setting import ACCURACY, HELD_OUT, SITES, STARTS, TEST_LOSS, Setting, loss, measured, prepared
from fedloom.studies.study import Options, Part, Result, Row, verdict
from fedloom.studies.units import COSTS, matched, read
from fedloom.tensors import Private, Shared, Tensors, under
from fedloom.transport import carried

QUESTION = "What is the permutation at the client worth at one site, and does it join two basins?"
STEPS = tuple(i / 5 for i in range(6))
PROBE = 16
NETWORK = 3  # sites that are merged
CHANGES = {"data.train": 60, "training.epochs": 4}
WAYS = {  # how the site takes the global adapter in
    "permuted, β = 0.5": {"permute": "client", "beta": (0.5,), "accept": "always"},
    "permuted where it gains, β = 0.5": {"permute": "client", "beta": (0.5,)},
    "as it came, β = 0.5": {"permute": "neither", "beta": (0.5,)},
    "the global alone": {"permute": "neither", "beta": (1.0,)},
    "its own alone": {"permute": "neither", "beta": (0.0,)},
}
ON, OFF, ALONE = "permuted, β = 0.5", "as it came, β = 0.5", "its own alone"
ONE_BASIN = 0.02  # a barrier of less than this share of the loss is none
START = "held-out loss before training"
BARRIER = "barrier of the {} loss"


def study(options: Options) -> Result:
    """The study: its figures, and what they say."""
    benefit: list[Row] = []
    path: list[Row] = []
    barrier: list[Row] = []
    for seed in options.drawn():
        setting = prepared(options, seed, CHANGES, sites=NETWORK)
        for start, init in STARTS.items():
            method = FedPIA(setting.adapter, init=init, gamma=0.0)
            first = setting.last(method, 1)
            private = first.privates[setting.sites[0].name]
            benefit += taken_in(setting, method, start, first.shared, private)
            lines = along(setting, start, private, visible(first.shared))
            path += lines
            barrier += barriers(lines)
    parts = (
        Part("The site after its next round", ("start", "way"), (ACCURACY, TEST_LOSS, HELD_OUT, START), tuple(benefit)),
        *(
            Part(f"The {split} loss from the site's own adapter (0) to the global one (1): {start}", ("global", "t"),
                 (f"{split} loss",), tuple(row for row in path if row["start"] == start), x="t")
            for start in STARTS for split in ("held-out", "training")
        ),
        Part("How far the path rises above the line between its ends", ("start", "global"),
             tuple(BARRIER.format(split) for split in ("held-out", "training")), tuple(barrier)),
    )  # fmt: skip
    return Result(
        "client", QUESTION,
        f"{SITES}; {NETWORK} sites with 60 training images each train for four epochs and are merged at the server "
        f"(γ = 0); then the first of them takes the merged adapter in and trains for four epochs; a probe of {PROBE} "
        "images; one site, so that the figures speak of it alone",
        options.drawn(), parts, tuple(found(parts)),
    )  # fmt: skip


def taken_in(setting: Setting, method: FedPIA, start: str, shared: Shared, private: Private) -> list[Row]:
    """The first site's next round, in each way."""
    rows: list[Row] = []
    site = setting.sites[0]
    test = setting.participants[site.name].test
    for way, changes in WAYS.items():
        now = replace(method, **changes)  # type: ignore[arg-type]
        integrated = replace(now, predict_with="integrated")
        before = measured(integrated, site, private, shared, site.held_out)["loss"]
        _, trained = now.local_round(1, site, visible(shared), private)
        on_test, held_out = (measured(now, site, trained, shared, split) for split in (test, site.held_out))
        figures = {ACCURACY: on_test["accuracy"], TEST_LOSS: on_test["loss"], HELD_OUT: held_out["loss"], START: before}
        rows.append({"start": start, "way": way, "seed": setting.seed, **figures})
    return rows


def along(setting: Setting, start: str, private: Private, current: Tensors) -> list[Row]:
    """The losses on the line between the two adapters, the global one as it came and in the order of the own one."""
    site, own = setting.sites[0], under("local", private)
    reads = read(site, setting.adapter, own, range(PROBE))
    ends = {"as it came": current}
    splits = {"held-out": site.held_out, "training": site.train}
    for name, cost in (
        ("permuted by activations", "activations, correlation"),
        ("permuted by weights", "weights in+out"),
    ):
        plans = matched(setting.adapter, current, own, COSTS[cost], reads)
        ends[name] = carried(current, plans, setting.adapter.symmetry)
    rows: list[Row] = []
    for name, end in ends.items():
        for t in STEPS:
            blend = {leaf: (1 - t) * own[leaf] + t * end[leaf] for leaf in own}
            losses = {f"{split} loss": loss(setting, site, private, blend, data) for split, data in splits.items()}
            rows.append({"start": start, "global": name, "t": t, "seed": setting.seed, **losses})
    return rows


def barriers(lines: list[Row]) -> list[Row]:
    """max_t L(t) - ((1 - t) L(0) + t L(1)), which is 0 where the path never rises."""
    rows: list[Row] = []
    for name in dict.fromkeys(row["global"] for row in lines):
        path = [row for row in lines if row["global"] == name]
        row = {key: path[0][key] for key in ("start", "global", "seed")}
        for split in ("held-out", "training"):
            values = [float(step[f"{split} loss"]) for step in path]
            rises = [v - ((1 - t) * values[0] + t * values[-1]) for t, v in zip(STEPS, values, strict=True)]
            row[BARRIER.format(split)] = max(rises)
        rows.append(row)
    return rows


def found(parts: tuple[Part, ...]) -> list[str]:
    """What the figures say, in sentences."""
    benefit, barrier, told = parts[0], parts[-1], []
    for start in STARTS:
        on, off, alone = ({"start": start, "way": way} for way in (ON, OFF, ALONE))
        for figure in (START, TEST_LOSS, ACCURACY):
            label = f"Trained from {start}: {figure}"
            told.append(verdict(label, "client PIA on", "off", benefit.compared(figure, on, off)))
        label = f"Trained from {start}: {TEST_LOSS}"
        told.append(verdict(label, "client PIA on", "the site alone", benefit.compared(TEST_LOSS, on, alone)))
        for split in ("held-out", "training"):
            came, turned = ({"start": start, "global": name} for name in ("as it came", "permuted by activations"))
            figure = BARRIER.format(split)
            rise, less = barrier.mean(figure, **came), barrier.mean(figure, **turned)
            one = rise < ONE_BASIN * parts[1].mean("held-out loss", **{"global": "as it came"}, t=0.0)
            told.append(
                f"Trained from {start}: between the two adapters as they came the {split} loss rises {rise:.2g} above "
                f"the straight line, aligned by activations {less:.2g}: "
                + (
                    f"below {ONE_BASIN:.0%} of the loss, so that both lie in one basin already."
                    if one
                    else "two basins."
                )
            )
    return told
