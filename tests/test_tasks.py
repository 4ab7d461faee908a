"""Classification: targets, losses and metrics by their definitions; its two heads; what it refuses."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.backbones import Features
from fedloom.errors import DataError
from fedloom.tasks import Classification
from fedloom.tensors import generator

ANIMALS = ("cat", "dog", "bird")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator("tasks", seed))


@given(st.lists(st.sampled_from([*ANIMALS, "fish"]), min_size=1, max_size=12), st.integers(0, 99))
def test_accuracy_and_loss_are_their_definitions(labels: list[str], seed: int) -> None:
    task, logits = Classification(ANIMALS), random(len(labels), 3, seed=seed)
    targets = task.targets(labels)
    assert targets.tolist() == [ANIMALS.index(label) if label in ANIMALS else -1 for label in labels]
    chosen = [ANIMALS[i] for i in logits.argmax(1).tolist()]
    metrics = task.metrics(logits, targets)
    assert next(iter(metrics)) == task.metric == "accuracy"
    right = sum(a == b for a, b in zip(chosen, labels, strict=True))
    assert metrics["accuracy"] == pytest.approx(right / len(labels))  # an unknown label is wrong
    known = [row.log_softmax(0)[ANIMALS.index(la)] for row, la in zip(logits, labels, strict=True) if la in ANIMALS]
    if known:
        assert float(task.loss(logits, targets)) == pytest.approx(-float(sum(known)) / len(known), rel=1e-5, abs=1e-6)
    assert all(math.isfinite(value) for value in metrics.values())


def test_examples_whose_labels_are_all_unknown_teach_nothing() -> None:
    logits = random(2, 3).requires_grad_()
    loss = Classification(ANIMALS).loss(logits, torch.tensor([-1, -1]))
    (slope,) = torch.autograd.grad(loss, logits)
    assert float(loss.detach()) == 0
    assert not slope.any()


def test_a_linear_head_starts_undecided_and_sees_normalised_features() -> None:
    task = Classification(ANIMALS, head="linear")
    tensors = task.init(5, seed=0)
    pooled = random(4, 5)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {"head/weight": (3, 5), "head/bias": (3,)}
    assert float(task.loss(task.logits(Features(pooled), tensors), torch.tensor([0, 1, 2, 0]))) == pytest.approx(
        math.log(3)
    )
    drawn = {name: random(*tensor.shape, seed=1) for name, tensor in tensors.items()}
    normal = (pooled - pooled.mean(1, keepdim=True)) / (pooled.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    expected = normal @ drawn["head/weight"].T + drawn["head/bias"]
    torch.testing.assert_close(task.logits(Features(pooled), drawn), expected)
    torch.testing.assert_close(task.logits(Features(7 * pooled), drawn), expected, rtol=1e-3, atol=1e-4)
    assert task.candidates is None


def test_prompts_are_the_candidates_and_need_no_head() -> None:
    task = Classification(ANIMALS, "an x-ray of {}")
    assert task.candidates == ("an x-ray of cat", "an x-ray of dog", "an x-ray of bird")
    assert Classification(ANIMALS, "a {} of {kind}, a {}").candidates[:1] == ("a cat of {kind}, a cat",)  # type: ignore[index]
    assert task.init(5, seed=0) == {}
    scores = random(2, 3)
    assert task.logits(Features(random(2, 5), scores), {}) is scores
    with pytest.raises(DataError, match=r"with an image and a CLIP or SigLIP; set head = 'linear' in \[task\]"):
        task.logits(Features(random(2, 5)), {})


def test_what_is_no_classification_is_refused() -> None:
    with pytest.raises(DataError, match=r"two classes or more, and there are \['cat'\]"):
        Classification(("cat",))
    with pytest.raises(DataError, match=r"two classes or more"):
        Classification(("cat", "cat"))
    with pytest.raises(DataError, match=r"template 'a photo' has no '\{\}'"):
        Classification(ANIMALS, "a photo")
    Classification(ANIMALS, "a photo", head="linear")  # which reads no text
