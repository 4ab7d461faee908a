"""What FedPIA's matching at a site adds to the site's local epoch."""

from collections.abc import Iterator

from fedloom.adapters import Bottleneck
from fedloom.bench.lines import Line
from fedloom.bench.lora import BATCH, dtypes
from fedloom.bench.measuring import interleaved
from fedloom.bench.shapes import QUESTION, VILT_NAMES, VILT_SIDE, Size, batch, noise, vilt
from fedloom.bench.vilt import own as vilt_own
from fedloom.data import Dataset, Example
from fedloom.methods import FedPIA
from fedloom.site import Site
from fedloom.tasks import Classification
from fedloom.tensors import of_model
from fedloom.training import Training

EPOCHS = (128, 512)  # questions of a local epoch
SHARE = 0.03


def client(size: Size, repeats: int) -> Iterator[Line]:
    """The probe goes through the model once, without a gradient; training goes on as without it."""
    model, method = vilt(size, dtypes()[-1]), FedPIA(Bottleneck())
    names = [f"{i}.png" for i in range(method.probe)]
    pixels = noise(model.network, names, VILT_SIDE)
    data = Dataset(tuple(Example("a", name, QUESTION) for name in names), pixels)
    site = Site("a", model, Classification(("a", "b")), data, Dataset(()), Training(batch=BATCH), 0)
    shared, own = (of_model(method.start(model, None, 1, seed)) for seed in (0, 1))
    steps = {
        "match": lambda: method.permuting.by_activations(shared, own, site),
        "step": vilt_own(model, batch(BATCH, VILT_SIDE, texts=True)),
    }
    took = interleaved(steps, repeats)
    for questions in EPOCHS:
        steps_of = questions / BATCH
        yield Line(
            "client",
            f"FedPIA's matching at a site, a probe of {method.probe}, {VILT_NAMES[size]}, {dtypes()[-1]}",
            1e3 * took["match"].minimum,
            "ms",
            f"a local epoch of {questions} questions, batch {BATCH}",
            1e3 * steps_of * took["step"].minimum,
            SHARE,
            at_most=True,
            own_median=1e3 * took["match"].median,
            peer_median=1e3 * steps_of * took["step"].median,
        )
