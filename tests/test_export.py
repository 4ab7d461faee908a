"""Exports, held against the libraries they are for: PEFT, transformers, onnxruntime, each doing its own loading."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedloom.adapters import IA3, Attention, BitFit, Bottleneck, Everything, Head, LoRA, Norms, Prompt
from fedloom.backbones import Adaptable
from fedloom.backbones.clip import CLIP
from fedloom.data import Dataset
from fedloom.errors import AdapterError, ExportError, RecipeError, RunError
from fedloom.export import checked, export
from fedloom.export.fingerprint import Inputs, apart, picture
from fedloom.export.folded import parameters
from fedloom.export.merged import write_merged
from fedloom.federation import visible
from fedloom.methods import FedDLP
from fedloom.peft_folder import CONFIG, WEIGHTS, files, import_peft
from fedloom.places import Adapter
from fedloom.recipe import load
from fedloom.runs import Run, run
from fedloom.serving import Blend, Served
from fedloom.site import Site
from fedloom.tasks import Classification
from fedloom.tensors import Private, by_place, generator
from fedloom.training import Training

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT

ALL = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "projection")
ANIMALS = Classification(("cat", "dog", "bird"))  # by prompts
GATED = LoRA(rank=4, alpha=6.0, targets=ALL, gated=True)
CLIs = Callable[..., tuple[int, str, str]]


def equal(found: Tensor, expected: Tensor, within: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=within, atol=within)


def drawn(model: Adaptable, adapter: Adapter) -> dict[str, Tensor]:
    """Tensors a little off their start; of gates some, and at one place all, are dead."""
    rng = generator("drawn")
    tensors = {name: t + 0.1 * torch.randn(t.shape, generator=rng) for name, t in model.init(adapter, 1).items()}
    for i, place in enumerate(by_place(tensors)):
        if (gate := tensors.get(f"{place}/gate")) is not None:
            tensors[f"{place}/gate"] = gate * (torch.arange(len(gate)) < i % (len(gate) + 1))
    return tensors


@pytest.fixture
def served(network: Callable[..., CLIP]) -> Callable[[Adapter], Served]:
    """A predictor over both towers of a tiny CLIP, by prompts."""

    def make(adapter: Adapter) -> Served:
        model = Adaptable(network(towers=("vision", "text")))
        site = Site("oslo", model, ANIMALS, Dataset(()), Dataset(()), Training(), 0)
        return Served(site, adapter, drawn(model, adapter))

    return make


def own(served: Served) -> Tensor:
    with torch.no_grad():
        return served(Inputs(True, False).batch(served.site.model.network, ANIMALS))


def read_by(folder: Path, model: Any) -> Tensor:
    """Logits of the fixed pictures by a CLIPModel and by processors that transformers reads from a folder."""
    from transformers import AutoImageProcessor, AutoTokenizer

    texts = AutoTokenizer.from_pretrained(folder)(list(ANIMALS.candidates or ()), padding=True, return_tensors="pt")
    pixels = AutoImageProcessor.from_pretrained(folder)([picture(i) for i in range(4)], return_tensors="pt")
    with torch.no_grad():
        return model(**texts, **pixels).logits_per_image  # type: ignore[no-any-return]


def placed(folder: Path, contents: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("adapter", [GATED, IA3(), Bottleneck(width=5)], ids=lambda adapter: type(adapter).__name__)
def test_peft_answers_as_the_adapter(
    adapter: Adapter, served: Callable[[Adapter], Served], backbone: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import CLIPModel

    import fedloom.peft_bottleneck  # noqa: F401  (PEFT learns of the bottleneck; it knows the others)

    ours = served(adapter)
    folder = placed(tmp_path / "peft", files(ours.site.model, adapter, ours.tensors, "tiny"))
    theirs = PeftModel.from_pretrained(CLIPModel.from_pretrained(backbone), folder).eval()
    equal(read_by(backbone, theirs), own(ours))
    equal(read_by(backbone, theirs.unload()), read_by(backbone, CLIPModel.from_pretrained(backbone)))
    if adapter is GATED:
        config, weights = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
        assert len(set(config["rank_pattern"].values()) | {config["r"]}) == 4
        assert len(config["target_modules"]) < len(by_place(ours.tensors)), "a place without a rank is no target"
        assert not any("gate" in name for name in weights)
        for module in config["target_modules"]:
            rank = config["rank_pattern"].get(module, config["r"])
            alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
            assert alpha / rank == pytest.approx(GATED.scale)


@pytest.mark.parametrize(
    "adapter", [GATED, IA3(), BitFit(), Norms(), Everything(), Head()], ids=lambda adapter: type(adapter).__name__
)
def test_a_merged_model_answers_as_the_adapter(
    adapter: Adapter, served: Callable[[Adapter], Served], backbone: Path, tmp_path: Path
) -> None:
    from transformers import AutoModel

    ours = served(adapter)
    before = {name: t.clone() for name, t in ours.site.model.network.module.state_dict().items()}
    write_merged(tmp_path, ours)
    equal(read_by(tmp_path, AutoModel.from_pretrained(tmp_path)), own(ours))
    after = ours.site.model.network.module.state_dict()
    assert all(torch.equal(after[name], t) for name, t in before.items()), "the federation's own stays frozen"
    if not isinstance(adapter, Head):
        assert apart(read_by(backbone, AutoModel.from_pretrained(backbone)), own(ours)) > 1e-3


def test_logits_near_zero_may_be_off_by_what_the_others_are() -> None:
    expected = torch.tensor([[-11.0, 0.0], [7.0, 2.0]])
    off = torch.tensor([[0.0, 0.06], [0.0, 0.0]])
    assert apart(expected + off, expected) == pytest.approx(0.06 / 12)
    assert apart(expected * float("nan"), expected) == apart(expected[:1], expected) == float("inf")


@pytest.mark.parametrize("adapter", [Bottleneck(width=3), Prompt(), Attention()])
def test_what_has_no_weights_of_its_own_is_not_merged(adapter: Adapter, served: Callable[[Adapter], Served]) -> None:
    ours = served(adapter)
    with pytest.raises(ExportError, match=rf"{type(adapter).__name__} cannot be folded .*--onnx"):
        parameters(ours.site.model, adapter, ours.tensors)


# What PEFT has trained


def trained(backbone: Path, folder: Path, **options: Any) -> Any:
    """A LoRA of PEFT on the tiny CLIP with factors drawn at random, saved; the model."""
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPModel

    model = get_peft_model(CLIPModel.from_pretrained(backbone), LoraConfig(**{"lora_dropout": 0.0, **options})).eval()
    rng = generator("trained")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=rng)
    model.save_pretrained(folder)
    return model


VISION = r"vision_model\..*\.(q_proj|v_proj)"
PATTERNS = {
    "r": 3,
    "lora_alpha": 5,
    "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2},
    "alpha_pattern": {"v_proj": 7},
    "use_rslora": True,
    "target_modules": VISION,
}


def test_what_peft_has_trained_comes_in_with_equal_logits(backbone: Path, network: Any, tmp_path: Path) -> None:
    theirs = trained(backbone, tmp_path / "peft", **PATTERNS)
    model, adapter = Adaptable(network()), LoRA(rank=8, alpha=12.0)
    tensors = import_peft(tmp_path / "peft", model, adapter, f"/elsewhere/{backbone.name}")
    assert {len(leaves["A"]) for leaves in by_place(tensors).values()} == {2, 3}
    site = Site("oslo", model, ANIMALS, Dataset(()), Dataset(()), Training(), 0)
    equal(own(Served(site, adapter, tensors)), read_by(backbone, theirs))


def test_what_was_exported_comes_in_again(served: Callable[[Adapter], Served], tmp_path: Path) -> None:
    ours = served(LoRA(rank=3, targets=ALL))
    model = ours.site.model
    folder = placed(tmp_path / "peft", files(model, ours.adapter, ours.tensors, "owner/clip"))
    other = LoRA(rank=5, alpha=2.0, targets=ALL, gated=True)
    again = import_peft(folder, model, other, "clip")
    equal(own(Served(ours.site, other, again)), own(ours))


def rewritten(folder: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    config, weights = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    change(config, weights)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(weights, folder / WEIGHTS)


FIRST = "base_model.model.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c, w: c.update(base_model_name_or_path="owner/vit"), "trained on 'owner/vit', and the backbone"),
        (lambda c, w: c.update(peft_type="IA3"), "holds a IA3 of PEFT; only a LORA"),
        (lambda c, w: c.update(use_dora=True), "no plain one .use_dora."),
        (lambda c, w: c.update(init_lora_weights="pissa_niter_4"), "no plain one .init_lora_weights"),
        (lambda c, w: c.update(bias="all"), "no plain one .bias = 'all'"),
        (lambda c, w: c.update(r=0), "rank and α of .* are 0"),
        (lambda c, w: c.update(r=4), r"expected \(4, 32\)"),
        (lambda c, w: c.update(rank_pattern={"(": 2}), "no regular expression"),
        (lambda c, w: w.pop(FIRST), "one factor of two"),
        (lambda c, w: [w.pop(FIRST), w.pop(FIRST.replace("_A", "_B"))], "has none at the module .*layers.0.self_attn"),
        (lambda c, w: w.update({FIRST: w[FIRST] * torch.nan}), "expected finite factors"),
        (lambda c, w: w.update({"base_model.model.x.lora_magnitude_vector.weight": w[FIRST].clone()}), "magnitude"),
        (lambda c, w: w.update({FIRST: w[FIRST][:, :-1].contiguous()}), r"\(2, 31\)"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(
    change: Any, said: str, backbone: Path, network: Any, tmp_path: Path
) -> None:
    trained(backbone, tmp_path / "peft", r=2, target_modules=VISION)
    rewritten(tmp_path / "peft", change)
    with pytest.raises(AdapterError, match=said):
        import_peft(tmp_path / "peft", Adaptable(network()), LoRA(), str(backbone))


def test_a_folder_without_a_lora_is_refused(network: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"no PEFT folder with adapter_config.json"):
        import_peft(tmp_path, Adaptable(network()), LoRA(), "clip")


def test_a_site_brings_the_folder_that_its_recipe_names(recipe: Path, backbone: Path, tmp_path: Path) -> None:
    trained(backbone, tmp_path / "brought", r=3, lora_alpha=24, target_modules=VISION)
    brings = {"method.name": "local", "sites.rome.initial": str(tmp_path / "brought"), **FAST}
    done = run(load(recipe, brings), tmp_path / "run")
    initial = done.federation.participants["rome"].site.initial
    assert {len(leaves["A"]) for leaves in by_place(initial).values()} == {3}
    assert {tuple(t.shape) for name, t in done.private("rome").items() if name.endswith("/A")} == {(3, 32)}
    with pytest.raises(RecipeError, match=r"initial of .* is no adapter: .*has a LoRA at the module"):
        run(load(recipe, {**brings, "method.adapter.last": 1}), tmp_path / "other")
    with pytest.raises(RecipeError, match=r"PEFT's LoRA is all that can be brought in"):
        run(load(recipe, {**brings, "method.adapter": {"kind": "bottleneck"}}), tmp_path / "other")


# Runs

FAST = {"reference.rows": [], "federation.evaluate_every": 0}


@pytest.fixture
def made(recipe: Path, tmp_path: Path) -> Callable[..., Run]:
    """`made(**{"method.name": ...})`: a run of three sites and two rounds, each fine-tuned after them."""

    def make(**settings: Any) -> Run:
        return run(load(recipe, {**FAST, **settings}), tmp_path / "run")

    return make


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def predicted(done: Run, name: str) -> Tensor:
    """What the federation answers to the fixed pictures."""
    site = done.federation.participants[name].site
    predictor = done.federation.method.serve(site, visible(done.shared), done.private(name))
    with torch.no_grad():
        return predictor(Inputs(True, False).batch(site.model.network, site.task))


ALONE = """
import sys
from PIL import Image
exec(open("code.py").read())
found = answers([Image.open(f"{i}.png") for i in range(4)])
assert not any(name.startswith("fedloom") for name in sys.modules)
torch.save(found, "found.pt")
"""


@pytest.mark.parametrize("task", [{}, {"task.head": "prompts", "task.template": "{} of {kind}"}], ids=str)
def test_the_code_of_the_card_answers_as_the_federation_without_fedloom(
    task: dict[str, str], made: Callable[..., Run], tmp_path: Path
) -> None:
    done = made(**task)
    (folder,) = export(done, tmp_path / "to", ["rome"])
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    (folder / "code.py").write_text(code)
    for i in range(4):
        picture(i).save(folder / f"{i}.png")
    subprocess.run([sys.executable, "-c", ALONE], cwd=folder, check=True, capture_output=True)
    equal(torch.load(folder / "found.pt"), predicted(done, "rome"))


def test_two_exports_are_equal_and_hold_no_one_else_s_tensors(made: Callable[..., Run], tmp_path: Path) -> None:
    done = made(**{"method.name": "local"})
    written = export(done, tmp_path / "a", forms=["merged"])
    export(done, tmp_path / "b", forms=["merged"])
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert {folder.name for folder in written} == {"oslo", "rome", "kyiv"}
    assert all(check.equal for checks in written.values() for check in checks)
    privates = {site: [t for t in done.private(site).values() if t.dim() == 2] for site in done.sites}
    for folder in written:
        inside = [t for path in folder.rglob("*.safetensors") for t in load_file(path).values()]
        for site, tensors in privates.items():
            found = [any(torch.equal(t, other) for other in inside) for t in tensors]
            assert all(found) if site == folder.name else not any(found)
    card = (written_card := folder / "README.md").read_text()
    assert written_card.exists()
    assert "Sites: kyiv, oslo, rome." in card
    assert done.recipe.id in card
    assert not re.search(r"\d+\.png|manifest", "".join(str(content) for content in tree(tmp_path / "a").values()))


def test_a_round_of_a_run_that_is_not_finished(made: Callable[..., Run], tmp_path: Path, fedloom: CLIs) -> None:
    done = made()
    tuned = predicted(done, "rome")
    assert apart(predicted(Run(done.folder, 2), "rome"), tuned) > 1e-4, "a round is looked at before the fine-tuning"
    path = done.folder / "recipe.toml"
    path.write_text(path.read_text().replace("rounds = 2", "rounds = 3"))
    code, _, said = fedloom("export", done.folder, "--to", tmp_path / "to")
    assert (code, said.count("\n")) == (2, 1)
    assert "not finished (2 of 3 rounds)" in said
    assert "--round 2" in said
    code, _, _ = fedloom("export", done.folder, "--to", tmp_path / "to", "--round", 2, "--site", "rome")
    assert code == 0
    assert "round 2 of 3" in (tmp_path / "to" / "rome" / "README.md").read_text()
    logits = load_file(tmp_path / "to" / "rome" / "fingerprint.safetensors")["logits"]
    equal(logits, predicted(Run(done.folder, 2), "rome"))
    earlier = export(Run(done.folder, 1), tmp_path / "earlier", ["rome"])
    assert apart(load_file(next(iter(earlier)) / "fingerprint.safetensors")["logits"], logits) > 1e-4
    with pytest.raises(RunError, match="what round 7 left; it has rounds 1, 2"):
        export(Run(done.folder, 7), tmp_path / "never")


def test_an_export_that_was_changed_is_found_out(made: Callable[..., Run], tmp_path: Path, fedloom: CLIs) -> None:
    done = made()
    (folder,) = export(done, tmp_path / "to", ["rome"])
    code, out, _ = fedloom("evaluate", "--exported", tmp_path / "to")
    assert (code, out.count("logits equal")) == (0, 1)
    weights = load_file(folder / WEIGHTS)
    save_file({name: t * 1.01 for name, t in weights.items()}, folder / WEIGHTS)
    code, out, said = fedloom("evaluate", "--exported", folder)
    assert (code, out.count("logits differ"), said.count("\n")) == (2, 1, 1)
    export(done, tmp_path / "to" / "deep", ["oslo"])

    def damaged(why: str) -> None:
        """The damage is told, and the site beside it is checked all the same."""
        code, out, said = fedloom("evaluate", "--exported", tmp_path / "to")
        told = " ".join(out.split())
        assert (code, said.count("\n"), "1 of 2 forms" in said) == (2, 1, True)
        assert why in told
        assert "site 'oslo', peft: logits equal" in told

    config = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text("{}")
    damaged("adapter_model.safetensors is damaged")
    (folder / CONFIG).write_text(config)
    (folder / WEIGHTS).unlink()
    damaged("adapter_model.safetensors' is missing; export the run again.")
    (folder / "fingerprint.safetensors").write_bytes(b"nonsense")
    damaged("fingerprint.safetensors' is missing or damaged")
    (folder / "fedloom.json").write_text((folder / "fedloom.json").read_text().replace('"weights": "', '"weights": "0'))
    damaged("other weights than the one that was trained on")
    (folder / "fedloom.json").write_text("{")
    damaged("no export of fedloom")
    with pytest.raises(ExportError, match="holds no export"):
        list(checked(done.folder))


def test_a_blend_leaves_its_parts_and_is_not_merged(made: Callable[..., Run], tmp_path: Path, fedloom: CLIs) -> None:
    done = made(**{"method.name": "ensemble"})
    (folder,) = export(done, tmp_path / "to", ["rome"])
    parts = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    assert parts == ["kyiv", "oslo", "rome"]  # which every site of an ensemble is given
    each = torch.stack([load_file(folder / name / "fingerprint.safetensors")["logits"].softmax(-1) for name in parts])
    equal(each.mean(0), predicted(done, "rome").softmax(-1))
    code, _, said = fedloom("export", done.folder, "--to", tmp_path / "merged", "--merged")
    assert (code, said.count("\n")) == (2, 1)
    assert "a blend of 3 adapters (the mean of the probabilities)" in said
    assert "distil = true" in said
    assert not (tmp_path / "merged").exists()


def test_feddlp_says_what_it_serves(site: Callable[..., Site]) -> None:
    one, method = site(), FedDLP(LoRA(rank=2), rank=1)
    shared = method.start(one.model, one.task, 1, 0)
    _, private = method.local_round(0, one, shared, Private({}))
    for weight, kind in ((0.0, Served), (0.25, Blend), (1.0, Served)):
        predictor = method.serve(one, shared, Private({**private, "choice/blend": torch.tensor(weight)}))
        assert isinstance(predictor, kind)
    blend = method.serve(one, shared, Private({**private, "choice/blend": torch.tensor(0.25)}))
    assert isinstance(blend, Blend)
    batch = one.probe(3)
    logits = {name: part(batch) for name, part in blend.parts.items()}
    equal(blend(batch), 0.25 * logits["local"] + 0.75 * logits["global"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method.name": "majority"}, "serves at site 'kyiv' neither an adapter nor a blend"),
        ({"method.adapter": {"kind": "prompt"}}, "no adapter of the kind Prompt. Export a graph (--onnx)"),
        ({"method.adapter": {"kind": "norms"}}, "no adapter of the kind Norms. Export a merged model (--merged), or"),
    ],
    ids=["majority", "prompt", "norms"],
)
def test_what_peft_does_not_have_is_said_with_what_there_is(
    settings: dict[str, Any], said: str, made: Callable[..., Run], tmp_path: Path, fedloom: CLIs
) -> None:
    done = made(**settings)
    code, _, error = fedloom("export", done.folder, "--to", tmp_path / "to")
    assert (code, error.count("\n")) == (2, 1)
    assert said in error
    assert not (tmp_path / "to").exists()


def test_a_head_alone_needs_no_adapter(made: Callable[..., Run], tmp_path: Path) -> None:
    done = made(**{"method.adapter": {"kind": "head"}})
    (folder,) = export(done, tmp_path / "to", ["oslo"])
    assert not (folder / CONFIG).exists()
    assert "PeftModel" not in (folder / "README.md").read_text()


def test_mistakes_are_one_sentence(
    made: Callable[..., Run], recipe: Path, tmp_path: Path, fedloom: CLIs, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = made()
    to = ("--to", tmp_path / "to")
    for arguments, expected in (
        (("export", done.folder, *to, "--site", "nowhere"), "there is no site 'nowhere'"),
        (("export", tmp_path / "no", *to), "is not a run folder"),
        (("export", done.folder, *to, "--push", "me/model"), "name the site (--site)"),
        (("export", done.folder, "--to", recipe), "is a file; name a folder with --to"),
        (("export", done.folder, *to, "--site", "rome", "--push", "a/b/c"), "is no name of a repository, OWNER/NAME"),
        (("evaluate",), "name the folder of a run, or an export"),
        (("evaluate", done.folder, "--exported", tmp_path), "leave out"),
    ):
        code, _, said = fedloom(*arguments)
        assert (code, said.count("\n")) == (2, 1)
        assert expected in said
    assert not (tmp_path / "to").exists()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    push = ("export", done.folder, "--site", "rome", "--push", "me/model")
    code, _, said = fedloom(*push, *to)
    assert (code, said.count("\n")) == (2, 1)
    assert "is ready, and there is no token" in said
    assert f"then: hf upload me/model '{tmp_path / 'to' / 'rome'}'." in said
    assert next(iter(checked(tmp_path / "to"))).equal
    code, _, said = fedloom(*push, *to)
    assert (code, "is not empty; name another folder" in said) == (2, True)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_nobody")  # and the tests are offline
    code, _, said = fedloom(*push, "--to", tmp_path / "other")
    assert (code, said.count("\n")) == (2, 1)
    assert "the hub did not take it as 'me/model'" in said


def test_a_missing_extra_is_one_sentence(made: Callable[..., Run], tmp_path: Path, monkeypatch: Any) -> None:
    done = made()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ExportError, match=r"pip install 'fedloom\[peft\]'"):
        export(done, tmp_path / "to")
    assert not any((tmp_path / "to").iterdir()), "what was not checked is not left there"
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ExportError, match=r"pip install 'fedloom\[onnx\]'"):
        export(done, tmp_path / "to", forms=["onnx"])


def test_bfloat16_is_exported_within_what_it_holds(made: Callable[..., Run], tmp_path: Path) -> None:
    done = made(**{"backbone.dtype": "bfloat16"})
    (checks,) = export(done, tmp_path / "to", ["rome"], ["merged", "onnx"]).values()
    assert [(check.form, check.equal) for check in checks] == [("peft", True), ("merged", True), ("onnx", True)]
    assert checks[0].tolerance > 1e-2
    merged = load_file(tmp_path / "to" / "rome" / "merged" / "model.safetensors")
    assert {t.dtype for t in merged.values()} == {torch.float32}, "a delta is smaller than a bit of bfloat16"


def test_the_commands_of_the_documentation(
    recipe: Path, tmp_path: Path, fedloom: CLIs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (recipe, tmp_path / "manifest.jsonl"):
        path.write_text(path.read_text().replace("oslo", "north"))
    run(load(recipe, FAST), tmp_path / "runs" / "hospitals")
    page = (Path(__file__).parents[1] / "docs" / "export.md").read_text("utf-8")
    commands = re.findall(r"^fedloom ([^#\n]*[^# \n])", page, re.M)
    assert len(commands) == 6
    for command in commands:
        if "--onnx" in command:  # as test_export_families has it
            continue
        code, _, said = fedloom(*command.split())
        assert (code, "token" in said) == (2, True) if "--push" in command else (0, False), said
    toml = re.search(r"```toml\n(.*?)```", page, re.S)
    assert toml
    (tmp_path / "late.toml").write_text(recipe.read_text() + toml[1])
    assert load(tmp_path / "late.toml").sites["oslo"].joins == 2
