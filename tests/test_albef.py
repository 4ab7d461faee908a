"""ALBEF: the composition against plain torch operations, its adapters, its ranking of answers."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModel, BertTokenizer, ViTImageProcessorPil

from fedloom.adapters import BitFit, Bottleneck, Everything, Head, LoRA, Norms
from fedloom.backbones import albef, load
from fedloom.backbones.adaptable import Adaptable
from fedloom.backbones.albef import Albef, Tree
from fedloom.backbones.albef_model import AlbefConfig, AlbefModel
from fedloom.backbones.batches import Batch
from fedloom.errors import BackboneError, DataError
from fedloom.places import Added

WORDS = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "plane", "organ", "is", "this", "?"),
    *("axial", "lung", "left", "right", "ct", "angio", "##graphy", "mr"),
)
ANSWERS = ("ct", "ct angiography", "left lung", "right lung", "axial", "lung", "ct")
HEADS, WIDTH, SIDE = 2, 32, 32


def tiny() -> AlbefConfig:
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": 48}
    return AlbefConfig(
        vision_config={**sizes, "num_hidden_layers": 2, "image_size": SIDE, "patch_size": 16},
        text_config={**sizes, "num_hidden_layers": 3, "vocab_size": len(WORDS), "max_position_embeddings": 16},
        fusion_layers=2,
        projection_dim=8,
    )


def randomised(model: AlbefModel) -> AlbefModel:
    """Every parameter away from its start, so that none can be left out unseen."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=rng)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("albef")
    randomised(AlbefModel(tiny())).save_pretrained(path)
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, model_max_length=16).save_pretrained(path)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def network(adaptable: Adaptable) -> Any:
    return adaptable.network


@pytest.fixture(scope="module")
def adaptable(folder: Path) -> Adaptable:
    return load(str(folder))


@pytest.fixture
def batch() -> Batch:
    images = torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    return Batch(torch.zeros(3), images, ("what plane ?", "lung", "what organ is this ?"), ANSWERS)


class Reference:
    """The model from its weights, by plain operations and loops over examples, layers, positions and heads."""

    def __init__(self, network: Albef):
        self.weights: dict[str, Tensor] = network.module.state_dict()

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-12).sqrt()
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def attention(self, names: Sequence[str], x: Tensor, other: Tensor, may_read: Callable[[int, int], bool]) -> Tensor:
        q, k, v = (self.linear(name, t) for name, t in zip(names[:3], (x, other, other), strict=True))
        rows, size = [], WIDTH // HEADS
        for i in range(len(x)):
            read = [j for j in range(len(other)) if may_read(i, j)]
            heads = []
            for part in (slice(h * size, (h + 1) * size) for h in range(HEADS)):
                weight = torch.stack([q[i, part] @ k[j, part] / math.sqrt(size) for j in read]).softmax(0)
                heads.append(sum(w * v[j, part] for w, j in zip(weight, read, strict=True)))
            rows.append(torch.cat(heads))
        return self.linear(names[3], torch.stack(rows))

    def image(self, pixels: Tensor) -> Tensor:
        """(3, side, side) to (5, width)."""
        at = "vision.embeddings"
        kernel = self.weights[f"{at}.patch_embeddings.projection.weight"].flatten(1)
        cuts = [pixels[:, r : r + 16, c : c + 16].flatten() for r in (0, 16) for c in (0, 16)]
        patches = torch.stack(cuts) @ kernel.T + self.weights[f"{at}.patch_embeddings.projection.bias"]
        x = torch.cat([self.weights[f"{at}.cls_token"][0], patches]) + self.weights[f"{at}.position_embeddings"][0]
        for i in range(2):
            at = f"vision.layers.{i}"
            h = self.norm(f"{at}.layernorm_before", x)
            x = x + self.attention([f"{at}.attention.{n}_proj" for n in "qkvo"], h, h, lambda i, j: True)
            h = self.norm(f"{at}.layernorm_after", x)
            x = x + self.linear(f"{at}.mlp.fc2", F.gelu(self.linear(f"{at}.mlp.fc1", h)))
        return self.norm("vision.layernorm", x)

    def embedded(self, ids: list[int]) -> Tensor:
        at = "text.embeddings"
        x = torch.stack(
            [
                self.weights[f"{at}.word_embeddings.weight"][word]
                + self.weights[f"{at}.position_embeddings.weight"][position]
                + self.weights[f"{at}.token_type_embeddings.weight"][0]
                for position, word in enumerate(ids)
            ]
        )
        return self.norm(f"{at}.LayerNorm", x)

    def layer(self, at: str, x: Tensor, other: Tensor | None = None, causal: bool = False) -> Tensor:
        for part, read in (("attention", x), ("crossattention", other)):
            if read is not None:
                names = [f"{at}.{part}.{n}" for n in ("self.query", "self.key", "self.value", "output.dense")]
                both = causal and part == "attention"
                made = self.attention(names, x, read, lambda i, j, both=both: j <= i or not both)
                x = self.norm(f"{at}.{part}.output.LayerNorm", made + x)
        fed = self.linear(f"{at}.output.dense", F.gelu(self.linear(f"{at}.intermediate.dense", x)))
        return self.norm(f"{at}.output.LayerNorm", fed + x)

    def fused(self, pixels: Tensor, ids: list[int]) -> Tensor:
        image, x = self.image(pixels), self.layer("text.layers.0", self.embedded(ids))
        for i in (1, 2):
            x = self.layer(f"text.layers.{i}", x, image)
        return x

    def answer(self, ids: list[int], fused: Tensor) -> Tensor:
        x = self.embedded(ids)
        for i in range(2):
            x = self.layer(f"decoder.{i}", x, fused, causal=True)
        x = self.norm("head.transform.LayerNorm", F.gelu(self.linear("head.transform.dense", x)))
        return x @ self.weights["text.embeddings.word_embeddings.weight"].T + self.weights["head.decoder.bias"]


def pieces(network: Albef, text: str) -> list[int]:
    return list(network.tokens.tokenizer(text)["input_ids"])


def normal(network: Albef, batch: Batch) -> Tensor:
    assert batch.images is not None
    return batch.images / 127.5 - 1


def inside(model: Adaptable, batch: Batch, adapter: Added, seed: int = 0) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    tensors = model.init(adapter, seed)
    features = model(batch, adapter, tensors)
    assert features.scores is not None
    return tensors, features.pooled, features.scores


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_fused_states_and_scores_are_those_of_the_reference(folder: Path, batch: Batch, attention: str) -> None:
    model: Any = load(str(folder), attention=attention)  # type: ignore[arg-type]
    network, features = model.network, model(batch, Head(), {})
    reference, pixels = Reference(network), normal(network, batch)
    for n, text in enumerate(batch.texts or ()):
        fused = reference.fused(pixels[n], pieces(network, text))
        assert_close(features.pooled[n], fused[0], atol=2e-5, rtol=1e-5)
        for c, answer in enumerate(ANSWERS):
            ids = pieces(network, answer)
            logs = reference.answer(ids[:-1], fused).log_softmax(-1)
            assert features.scores is not None
            assert_close(
                features.scores[n, c], sum(logs[t, ids[t + 1]] for t in range(len(ids) - 1)), atol=1e-4, rtol=1e-5
            )


def test_padding_changes_no_state(network: Albef, batch: Batch) -> None:
    together = network.features(batch, ()).pooled
    assert batch.images is not None
    assert batch.texts is not None
    for n, text in enumerate(batch.texts):
        alone = replace(batch, targets=torch.zeros(1), images=batch.images[n : n + 1], texts=(text,))
        assert_close(network.features(alone, ()).pooled[0], together[n], atol=1e-5, rtol=1e-5)


def test_the_decoder_reads_no_later_piece_and_no_padding(network: Albef, batch: Batch) -> None:
    model = network.module
    states, mask = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(0)), torch.ones(2, 4)
    ids = torch.tensor([[2, 15, 16, 3], [2, 12, 3, 0]])
    logits = model.answer(ids, ids != 0, states, mask)
    later = ids.clone()
    later[:, 2:] = 7
    assert_close(model.answer(later, ids != 0, states, mask)[:, :2], logits[:, :2])
    assert_close(
        model.answer(ids[1:, :3], ids[1:, :3] != 0, states[1:], mask[1:]), logits[1:, :3], atol=1e-5, rtol=1e-5
    )


def test_fused_states_beyond_the_question_are_not_read(network: Albef) -> None:
    ids = torch.tensor([[2, 15, 3]])
    states = torch.randn(1, 4, WIDTH, generator=torch.Generator().manual_seed(0))
    part = network.module.answer(ids, ids != 0, states[:, :2], torch.ones(1, 2))
    assert_close(network.module.answer(ids, ids != 0, states, torch.tensor([[1, 1, 0, 0]])), part, atol=1e-5, rtol=1e-5)


def test_a_tree_decodes_each_beginning_once() -> None:
    tree = Tree.of([[2, 15, 3], [2, 15, 16, 3], [2, 12, 3]])
    assert tree.ids.tolist() == [[2, 15, 16, 12]]
    assert tree.position.tolist() == [[0, 1, 2, 1]]
    assert tree.reads.int().tolist() == [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]]
    assert tree.step.T.tolist() == [[0, 0, 15], [0, 1, 3], [1, 0, 15], [1, 1, 16], [1, 2, 3], [2, 0, 12], [2, 3, 3]]


def test_scores_do_not_depend_on_how_many_candidates_pass_at_once(
    folder: Path, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load(str(folder)).network.features(batch, ()).scores
    monkeypatch.setattr(albef, "AT_ONCE", 2)
    assert_close(load(str(folder)).network.features(batch, ()).scores, whole, atol=1e-5, rtol=1e-5)


def test_the_base_model_has_thirty_adapters_of_the_paper() -> None:
    with torch.device("meta"):
        module = AlbefModel(AlbefConfig())
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
    network = Albef(module, (ViTImageProcessorPil(), tokenizer))
    adapter = Bottleneck(width=48)
    tensors = Adaptable(network).init(adapter, 0)
    assert [sum(p.kind == "block" and p.tower == tower for p in network.places) for tower in albef.TOWERS] == [
        12,
        12,
        6,
    ]
    assert sum(t.numel() for t in tensors.values()) == 2_236_320
    assert sum(p.kind == "linear" for p in network.places) == 12 * 6 + 6 * 6 + 6 * 10 + 6 * 10


def test_adapters_at_zero_leave_the_model_as_it_is(adaptable: Adaptable, batch: Batch) -> None:
    plain = adaptable(batch, Head(), {})
    _, pooled, scores = inside(adaptable, batch, Bottleneck(4, std_up=0.0))
    assert torch.equal(pooled, plain.pooled)
    assert plain.scores is not None
    assert torch.equal(scores, plain.scores)


def test_a_bert_block_takes_its_norm_twice_around_the_adapter(adaptable: Adaptable, batch: Batch) -> None:
    layer, adapter = adaptable.network.module.text.layers[2], Bottleneck(4, std=0.5)
    tensors = {name: t for name, t in adaptable.init(adapter, 0).items() if name.startswith("text.2.block/")}
    made: dict[str, Tensor] = {}
    hooks = [
        layer.intermediate.register_forward_hook(lambda _, args, out: made.update(inp=args[0])),
        layer.output.dense.register_forward_hook(lambda _, args, out: made.update(res=out)),
    ]
    pooled = adaptable(batch, adapter, tensors).pooled
    for hook in hooks:
        hook.remove()
    inp, res, norm = made["inp"], made["res"], layer.output.LayerNorm
    down, up = (tensors[f"text.2.block/{name}"] for name in ("down", "up"))
    out = norm(res + torch.relu(norm(res + inp) @ down.T) @ up.T + inp)
    assert_close(pooled, out[:, 0], atol=1e-6, rtol=1e-6)


def test_permuting_hidden_units_changes_nothing(adaptable: Adaptable, batch: Batch) -> None:
    tensors, pooled, scores = inside(adaptable, batch, Bottleneck(6, std=0.3))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    permuted = {}
    for name, tensor in tensors.items():
        axes = Bottleneck.symmetry.get(name.rpartition("/")[2], ())
        permuted[name] = tensor.index_select(axes.index("hidden"), order) if axes else tensor
    found = adaptable(batch, Bottleneck(6), permuted)
    assert_close(found.pooled, pooled, atol=1e-5, rtol=1e-5)
    assert_close(found.scores, scores, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "in_text", "in_vision"),
    [
        ("q_proj", "attention.self.query", "attention.q_proj"),
        ("k_proj", "attention.self.key", "attention.k_proj"),
        ("v_proj", "attention.self.value", "attention.v_proj"),
        ("out_proj", "attention.output.dense", "attention.o_proj"),
        ("x_q_proj", "crossattention.self.query", None),
        ("x_k_proj", "crossattention.self.key", None),
        ("x_v_proj", "crossattention.self.value", None),
        ("x_out_proj", "crossattention.output.dense", None),
        ("fc1", "intermediate.dense", "mlp.fc1"),
        ("fc2", "output.dense", "mlp.fc2"),
    ],
)
def test_a_low_rank_adapter_is_a_change_of_that_weight(
    folder: Path, batch: Batch, name: str, in_text: str, in_vision: str | None
) -> None:
    model, adapter = load(str(folder)), LoRA(rank=2, targets=(name,))
    rng = torch.Generator().manual_seed(4)
    tensors = {k: torch.randn(t.shape, generator=rng) * 0.3 for k, t in model.init(adapter, 0).items()}
    adapted = model(batch, adapter, tensors)
    tops = {"text": ("text.layers", in_text), "decoder": ("decoder", in_text), "vision": ("vision.layers", in_vision)}
    module, changed = model.network.module, 0
    for place in filter(adapter.at, model.places):
        layers, part = tops[place.tower]
        weight = module.get_parameter(f"{layers}.{place.name.split('.')[1]}.{part}.weight")
        weight.data += adapter.scale * tensors[f"{place.name}/B"] @ tensors[f"{place.name}/A"]
        changed += 1
    assert changed == (4 if name.startswith("x_") else 7)
    plain = model(batch, Head(), {})
    assert_close(adapted.pooled, plain.pooled, atol=5e-5, rtol=1e-4)
    assert_close(adapted.scores, plain.scores, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_adapter_gets_a_gradient_from_the_scores(folder: Path, batch: Batch, checkpointing: bool) -> None:
    model = load(str(folder), checkpointing=checkpointing)
    adapter = Bottleneck(4, std=0.3)
    leaves = {name: t.requires_grad_() for name, t in model.init(adapter, 0).items()}
    scores = model(batch, adapter, leaves).scores
    assert scores is not None
    F.cross_entropy(scores, torch.tensor([0, 1, 2])).backward()
    assert len(leaves) == 7 * 4
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        assert leaf.grad.abs().sum() > 0, name
    if checkpointing:
        plain = load(str(folder))
        others = {name: t.requires_grad_() for name, t in plain.init(adapter, 0).items()}
        F.cross_entropy(plain(batch, adapter, others).scores, torch.tensor([0, 1, 2])).backward()
        for name, leaf in leaves.items():
            assert_close(leaf.grad, others[name].grad, msg=name)


@pytest.mark.parametrize(
    ("adapter", "frozen"), [(Head(), 2), (Bottleneck(4, std=0.3, last=1), 1), (Bottleneck(4, std=0.3), 0)]
)
def test_the_cached_prefix_gives_the_same_bits(adaptable: Adaptable, batch: Batch, adapter: Added, frozen: int) -> None:
    tensors, pooled, scores = inside(adaptable, batch, adapter)
    blocks = adaptable.frozen_blocks(adapter)
    assert blocks == frozen
    kept = replace(batch, images=None, prefix=adaptable.prefix([batch], blocks))
    found = adaptable(kept, adapter, tensors)
    assert torch.equal(found.pooled, pooled)
    assert found.scores is not None
    assert torch.equal(found.scores, scores)


@pytest.mark.parametrize("adapter", [Everything(), BitFit(), Norms()])
def test_replaced_parameters_are_the_models_own_at_first(
    adaptable: Adaptable, batch: Batch, adapter: Everything | BitFit | Norms
) -> None:
    tensors = adaptable.init(adapter, 0)
    plain = adaptable(batch, Head(), {})
    assert torch.equal(adaptable(batch, adapter, tensors).pooled, plain.pooled)
    moved = {
        name: t + 0.1 * torch.randn(t.shape, generator=torch.Generator().manual_seed(5)) for name, t in tensors.items()
    }
    found = adaptable(batch, adapter, moved)
    assert found.scores is not None
    assert not torch.equal(found.pooled, plain.pooled)


def test_tied_words_are_trained_once(adaptable: Adaptable) -> None:
    names = [name for name, t in adaptable.init(Everything(), 0).items() if t.shape == (len(WORDS), WIDTH)]
    assert names == ["text.embeddings.word_embeddings/weight"]


def test_what_is_read_and_what_of_it_is_padding(adaptable: Adaptable, batch: Batch) -> None:
    lengths = torch.tensor([5, 3, 7])
    places = {p.name for p in adaptable.places}
    adapter = LoRA(targets=("q_proj", "x_q_proj", "x_k_proj"))
    tensors = adaptable.init(adapter, 0)
    seen = {}
    for place, h, mask in adaptable.inputs(batch, adapter, tensors):
        assert mask.shape == h.shape[:2], place.name
        seen[place.name] = mask.sum(1)
    assert places >= seen.keys() == {p.name for p in adaptable.places if adapter.at(p)}
    for name, count in seen.items():
        tower, _, layer = name.split(".")
        of_question = (tower == "text") != (layer == "x_k_proj") if tower != "vision" else False
        assert torch.equal(count, lengths) == of_question, name


def test_a_picture_is_a_square_of_the_models_size(network: Albef) -> None:
    pixels = network.decode(Image.new("RGB", (70, 40), (255, 0, 10)))
    assert pixels.shape == (3, SIDE, SIDE)
    assert pixels.dtype == torch.uint8
    assert pixels[:, 5, 5].tolist() == [255, 0, 10]


def test_a_folder_gives_the_same_bits(folder: Path, tmp_path: Path) -> None:
    model: Any = load(str(folder)).network.module
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "albef"
    assert model.state_dict().keys() == again.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert again.head.decoder.weight is again.text.embeddings.word_embeddings.weight


def test_a_folder_is_known_whatever_was_imported_before(folder: Path) -> None:
    asked = "import sys; from fedloom.backbones import load; print(type(load(sys.argv[1]).network).__name__)"
    done = subprocess.run([sys.executable, "-c", asked, str(folder)], capture_output=True, text=True)
    assert done.stdout == "Albef\n", done.stderr


def test_bfloat16_keeps_features_and_scores_in_float32(folder: Path, batch: Batch) -> None:
    features = load(str(folder), dtype=torch.bfloat16)(batch, Head(), {})
    assert features.scores is not None
    assert features.pooled.dtype == features.scores.dtype == torch.float32


def test_a_folder_with_a_weight_missing_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    del weights["decoder.1.output.dense.bias"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match=r"lacks 1 weights .*'decoder\.1\.output\.dense\.bias'"):
        load(str(tmp_path))


def test_an_image_is_needed_and_no_empty_question_among_others(network: Albef, batch: Batch) -> None:
    with pytest.raises(DataError, match="these examples have none"):
        network.features(replace(batch, images=None), ())
    with pytest.raises(DataError, match="text 2 of 3 is empty"):
        network.features(replace(batch, texts=("lung", " ", "ct")), ())
    without = network.features(replace(batch, texts=None), ())
    assert torch.equal(without.pooled, network.features(replace(batch, texts=None, candidates=None), ()).pooled)
    assert without.pooled.shape == (3, WIDTH)


def test_unknown_towers_and_unequal_widths_are_refused(folder: Path) -> None:
    with pytest.raises(BackboneError, match="vision, text, decoder"):
        load(str(folder), towers=("image",))
    config = tiny()
    config.fusion_layers = 4
    with pytest.raises(BackboneError, match="fusion_layers = 4"):
        AlbefModel(config)


def test_only_the_towers_asked_for_are_adapted(folder: Path) -> None:
    model = load(str(folder), towers=("text", "decoder"))
    assert {place.tower for place in model.places} == {"text", "decoder"}
    assert model.frozen_blocks(Bottleneck(4)) == 2  # the whole image tower can be kept


def test_the_decoder_starts_as_a_copy_of_the_fusion_layers() -> None:
    model = randomised(AlbefModel(tiny()))
    model.copy_fusion_to_decoder()
    for i in range(2):
        fusion, copy = model.text.layers[1 + i].state_dict(), model.decoder[i].state_dict()
        assert all(torch.equal(fusion[name], copy[name]) for name in fusion)
