"""Sites whose adapters are of unlike widths; and what of unlike depths and of two backbones.

Unlike widths are transported (`transport.Coupling`). An adapter of another depth, or of another backbone, is refused: a
transport moves hidden units and never the residual stream, on which they read and write, and the streams of two layers
or of two backbones of one width have no axis in common. To match layers by their relative depth, too, is to believe
that a layer of one does what a layer of the other does, which nothing in the adapters can test.
"""

from dataclasses import replace
from itertools import cycle

from fedloom.errors import UpdateError
from fedloom.federation import admit, visible
from fedloom.methods import FedAvg, FedPIA, Local, Method
from fedloom.site import Answer, Update
from fedloom.studies.setting import ACCURACY, HELD_OUT, SITES, TEST_LOSS, Setting, prepared
from fedloom.studies.study import Options, Part, Result, Row, verdict
from fedloom.tensors import Shared, Tensors, by_place

QUESTION = "Can sites with adapters of unlike widths, depths or backbones federate?"
WIDTHS = (8, 16, 32)
ROUNDS = 3
CHANGES = {"data.train": 30, "data.test": 30}
UNLIKE, NARROW, ALONE = "FedPIA, widths 8, 16 and 32", "FedPIA, all of width 8", "local-only, widths 8, 16 and 32"
WIDE, AVERAGED = "FedPIA, all of width 32", "FedAvg, all of width 8"


def study(options: Options) -> Result:
    """The study: its figures, and what they say."""
    rows: list[Row] = []
    for seed in options.drawn():
        setting = prepared(options, seed, CHANGES, sites=len(WIDTHS))
        rows += compared(setting)
    parts = (Part("What each site serves", ("sites",), (TEST_LOSS, HELD_OUT, ACCURACY), tuple(rows)),)
    of = (
        f"{SITES}, or of those named; three sites of 30 training images, {ROUNDS} rounds of one epoch, γ = 1, β = "
        f"{FedPIA().beta[-1]:g}; sites of unlike widths start from adapters of their own, the others from one"
    )
    return Result("widths", QUESTION, of, options.drawn(), parts, (*found(parts[0]), *refused(setting)))


def compared(setting: Setting) -> list[Row]:
    """The rows of one prepared federation."""
    narrow, wide = (replace(setting.adapter, width=width) for width in (min(WIDTHS), max(WIDTHS)))
    mixed = unlike(setting)
    methods: dict[str, tuple[Setting, Method]] = {
        UNLIKE: (mixed, FedPIA(wide)),
        NARROW: (setting, FedPIA(narrow)),
        WIDE: (setting, FedPIA(wide)),
        AVERAGED: (setting, FedAvg(narrow)),
        ALONE: (mixed, Local(wide)),
    }
    rows: list[Row] = []
    for name, (where, method) in methods.items():
        after = where.last(method, ROUNDS)
        figures = where.figures(method, after.shared, after.privates)
        rows.append({"sites": name, "seed": setting.seed, **figures})
    return rows


def unlike(setting: Setting) -> Setting:
    """The same sites, each with a fresh adapter of a width of its own."""
    participants = {}
    for (name, own), width in zip(setting.participants.items(), cycle(WIDTHS)):
        adapter = replace(setting.adapter, width=width)
        brought = setting.model.init(adapter, setting.seed, name)
        participants[name] = replace(own, site=replace(own.site, initial=brought))
    return replace(setting, participants=participants)


def refused(setting: Setting) -> list[str]:
    """What the server says to an adapter of fewer layers, and to one of a backbone of another width."""
    method = FedPIA(setting.adapter)
    shared = visible(setting.start(method))
    last = list(by_place(shared))[-1]
    shallow = {name: tensor for name, tensor in shared.items() if not name.startswith(f"{last}/")}
    other = {name: tensor[..., :-1] if name.endswith("/down") else tensor for name, tensor in shared.items()}
    return [
        f"Unlike depth is refused ({reason(method, shared, shallow)}): a transport moves hidden units and never the "
        "residual stream that they read and write, and two layers' streams have no axis in common; to pair layers by "
        "relative depth is a belief that nothing in the adapters can test.",
        f"Another backbone is refused where its width differs ({reason(method, shared, other)}). Two backbones of one "
        "width cannot be told apart by their shapes; their adapters must not be merged for the same reason, so every "
        "site of a federation has to load the backbone that its recipe names.",
    ]


def reason(method: FedPIA, shared: Shared, sent: Tensors) -> str:
    """Why a pair of unlike adapters is refused."""
    try:
        admit(Answer("a", Update(Shared(sent), 1.0, 1)), shared, method)
    except UpdateError as e:
        return f"“{e}”"
    return "it is not"


def found(part: Part) -> list[str]:
    """What the figures say, in sentences."""
    return [
        verdict(figure, f"[{UNLIKE}]", f"[{other}]", part.compared(figure, {"sites": UNLIKE}, {"sites": other}))
        for other in (NARROW, ALONE, WIDE)
        for figure in (TEST_LOSS, ACCURACY)
    ]
