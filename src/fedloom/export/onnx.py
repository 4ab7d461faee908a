"""What a site serves as one ONNX graph: pixels and pieces of text in, logits out.

    images           (n, 3, height, width) uint8, as the processor resizes and crops; the graph normalises
    input_ids        (n, pieces) int64, attention_mask alike: 1 for a piece, 0 for padding
    logits           (n, labels) float32

Whatever the method serves goes in, a bottleneck, prompts or a blend too. Candidate texts, being always the same, are
part of the graph. It is in float32.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.backbones import load
from fedloom.backbones.adaptable import Adaptable
from fedloom.backbones.batches import Batch
from fedloom.errors import ExportError
from fedloom.quiet import quiet
from fedloom.recipe import Recipe
from fedloom.serving import Blend, Served

FILE = "model.onnx"
MISSING = "an ONNX graph needs two packages more; get them: pip install 'fedloom[onnx]'."
OPSET = 20


def write_onnx(path: Path, predictor: Served | Blend, batch: Batch) -> None:
    """The graph of a predictor over float32 weights (`widened`); batch: an example of what it reads."""
    try:
        import onnxscript  # noqa: F401  (the exporter of torch asks for it)
    except ImportError:
        raise ExportError(MISSING) from None
    one = next(iter(predictor.parts.values())) if isinstance(predictor, Blend) else predictor
    network: Any = one.site.model.network
    given = inputs(network, batch)
    with torch.no_grad():
        predictor(batch)  # what is computed once and kept, the candidates, is a constant of the graph
        program = _exported(_Graph(predictor, network, batch).eval(), given)
    try:
        path.write_bytes(_bare(program.model_proto).SerializeToString(deterministic=True))
    except ValueError as e:
        raise ExportError(f"the graph is too large for one ONNX file, which holds 2 GiB at most: {e}.") from e


def _exported(graph: nn.Module, given: Mapping[str, Tensor]) -> Any:
    shapes = {name: {0: "n"} | ({1: "pieces"} if t.dim() == 2 else {}) for name, t in given.items()}
    try:
        with _quietly():
            return torch.onnx.export(
                graph,
                kwargs=dict(given),
                input_names=list(given),
                output_names=["logits"],
                dynamic_shapes=shapes,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as e:
        reason = str(e.__cause__ or e).strip().splitlines()[0]
        raise ExportError(f"what is served does not become a graph: {reason}") from e


def run_onnx(path: Path, given: dict[str, Tensor]) -> Tensor:
    """The logits of a graph, by onnxruntime on the CPU."""
    try:
        import onnxruntime
    except ImportError:
        raise ExportError(MISSING) from None
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
    except Exception as e:  # its exceptions have no common root
        raise ExportError(f"onnxruntime cannot run '{path}': {str(e).splitlines()[0]}") from e
    return torch.from_numpy(logits)


def inputs(network: Any, batch: Batch) -> dict[str, Tensor]:
    """A batch as the graph's inputs, by name."""
    given = {} if batch.images is None else {"images": batch.images}
    if hasattr(network, "tokens"):
        ids, mask = network.tokens(batch.texts or ("",) * len(batch))
        given |= {"input_ids": ids, "attention_mask": mask.long()}
    if not given:
        raise ExportError("a CLIP's texts alone have no graph yet; export another form, or use a text encoder.")
    return given


def widened(predictor: Served | Blend, recipe: Recipe) -> Served | Blend:
    """The same predictor over weights in float32."""
    if recipe.backbone.dtype == "float32":
        return predictor
    named = recipe.backbone
    network = load(named.name, named.towers, getattr(torch, named.dtype)).network
    network.module.float()
    model = Adaptable(network)

    def over(served: Served) -> Served:
        return replace(served, site=replace(served.site, model=model))

    if isinstance(predictor, Blend):
        return replace(predictor, parts={name: over(part) for name, part in predictor.parts.items()})
    return over(predictor)


class _Graph(nn.Module):
    """A predictor as a module of tensors alone."""

    def __init__(self, predictor: Served | Blend, network: Any, batch: Batch):
        super().__init__()
        self.weights = network.module
        self.predictor, self.network, self.candidates = predictor, network, batch.candidates

    def forward(
        self, images: Tensor | None = None, input_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        if input_ids is None or attention_mask is None:
            return self._answer(images, images, None)
        with self.network.tokens.reading(input_ids, attention_mask.bool()):
            return self._answer(input_ids, images, ("text",))

    def _answer(self, each: Any, images: Tensor | None, texts: tuple[str, ...] | None) -> Tensor:
        # A batch is as long as its targets, which nothing looks at here.
        return self.predictor(Batch(each.flatten(1)[:, 0], images, texts, self.candidates))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter says of operators that no graph here has."""
    with quiet("torch.onnx"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _bare(model: Any) -> Any:
    """The graph without where in a program each node came from, which is another on each machine."""
    del model.metadata_props[:]
    for graph in (model.graph, *model.functions):
        del graph.metadata_props[:]
        for part in (*graph.node, *graph.value_info, *getattr(graph, "input", ()), *getattr(graph, "output", ())):
            if hasattr(part, "metadata_props"):
                del part.metadata_props[:]
                part.doc_string = ""
    return model
