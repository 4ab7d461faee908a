"""One adapter that all sites share: how it starts, what a site makes of it by itself, what the site serves."""

from typing import Literal

from torch import Tensor

from fedloom.backbones.adaptable import Adaptable
from fedloom.errors import MethodError
from fedloom.places import Adapter
from fedloom.serving import Served
from fedloom.site import Site
from fedloom.tasks import Task
from fedloom.tensors import Private, Shared, Tensors, at, of_model, part, under, without
from fedloom.training import fit, head


def begun(
    adapter: Adapter, heads: Literal["private", "shared"], model: Adaptable, task: Task | None, seed: int
) -> Shared:
    """A fresh adapter, and the task's head where that is shared.

    raises MethodError: there is nothing to train, or a shared head for tasks that differ (`task` is None)
    """
    fresh = model.init(adapter, seed)
    if not fresh and task is not None and not task.init(model.dim, seed):
        raise MethodError(
            "there is nothing to train: this adapter leaves all to the task's head, and the task has none; "
            "set another kind of [method.adapter], or of head in [task]."
        )
    if heads == "private":
        return Shared(fresh)
    if task is None:
        raise MethodError(
            "a shared head needs one task at all sites, and theirs differ; set [method] heads = 'private'."
        )
    return Shared({**fresh, **task.init(model.dim, seed)})


def own_head(site: Site, shared: Tensors, private: Tensors) -> dict[str, Tensor]:
    """The site's private head; nothing where the head is shared."""
    return {} if under("head", shared) else head(site, private)


def tuned(site: Site, adapter: Adapter, shared: Tensors, private: Tensors, epochs: int) -> Private:
    """The site's own copy of adapter and head, under local/ and head/, after more epochs: it goes on where it stopped.

    0 epochs: `private` as it was given
    """
    if not epochs:
        return Private(private)
    kept = {**part("head", private), **under("local", private)}
    start = {**of_model(shared), **own_head(site, shared, private), **kept}
    trained, _ = fit(site, start, lambda t, b: site.loss(adapter, t, b), "fine-tuning", epochs)
    return Private({**part("head", trained), **at("local", without("head", trained))})


def predictor(site: Site, adapter: Adapter, shared: Tensors, private: Tensors) -> Served:
    """Logits by the site's own copies where it has them, else by what is shared, else by a fresh head."""
    fresh = site.task.init(site.model.dim, site.seed)
    tensors = {**fresh, **of_model(shared), **part("head", private), **under("local", private)}
    return Served(site, adapter, tensors)
