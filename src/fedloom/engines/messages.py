"""What crosses between a server and a site that trust each other with nothing.

A message is a flat table: numbers, texts, and under `frame` the tensors, as the recipe's wire packs them. Whoever
receives one checks every value before it is used.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from fedloom.errors import UpdateError
from fedloom.site import Update
from fedloom.tensors import Shared, Tensors, squared_distance

Message: TypeAlias = Mapping[str, Any]
TOPIC = "fedloom"  # what messages are called where a carrier has others too


def digest(frame: bytes) -> str:
    """What a frame is called in an audit log: the start of its SHA-256."""
    return hashlib.sha256(frame).hexdigest()[:16]


def sent(update: Update, frame: bytes) -> Message:
    """An update, as a site sends it; its tensors are in the frame."""
    return {
        "frame": frame,
        "weight": float(update.weight),
        "examples": update.examples,
        "metrics": {name: float(value) for name, value in update.metrics.items()},
    }


def received(site: str, message: Message, most: int) -> tuple[Update, bytes]:
    """The update in a site's reply, without its tensors, and the frame that holds them, which is not read yet.

    most: bytes that its frame may have
    raises UpdateError: naming the site, for anything that is no update
    """
    frame, weight, examples = (message.get(name) for name in ("frame", "weight", "examples"))
    if not isinstance(frame, bytes):
        raise UpdateError(f"site '{site}' sent no frame.")
    if len(frame) > most:
        raise UpdateError(f"site '{site}' sent {len(frame):,} bytes, more than the {most:,} that are allowed.")
    if not isinstance(weight, float) or not isinstance(examples, int) or isinstance(examples, bool) or examples < 0:
        raise UpdateError(f"site '{site}' sent the weight {weight!r} and {examples!r} examples.")
    return Update(Shared({}), weight, examples, figures(site, message)), frame


def figures(site: str, message: Message) -> dict[str, float]:
    """The metrics in a site's reply; raises UpdateError, naming the site, where they are anything but numbers."""
    metrics = message.get("metrics")
    if not isinstance(metrics, dict) or not all(
        isinstance(name, str) and isinstance(value, float | int) for name, value in metrics.items()
    ):
        raise UpdateError(f"site '{site}' sent metrics that are no numbers by name.")
    return {name: float(value) for name, value in metrics.items()}


def moved(tensors: Tensors, shared: Tensors) -> float:
    """How far an update is from what its site was given: the Euclidean norm over all tensors.

    A tensor that was not given, or in another shape, counts from zero.
    """
    known = [name for name, tensor in tensors.items() if name in shared and shared[name].shape == tensor.shape]
    far = float(squared_distance({name: tensors[name].double() for name in known}, shared))
    return math.sqrt(far + sum(float(t.double().square().sum()) for name, t in tensors.items() if name not in known))
