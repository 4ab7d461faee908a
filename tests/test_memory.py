"""Sites share one backbone: a hundred of them take hardly more memory than ten; so do two adapters of one site."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fedloom.tensors import generator

# Two rounds, and what the process has held at most, and what its sites keep.
ROUNDS = """
import sys
from pathlib import Path
from fedloom.assembly import assemble, planned
from fedloom.federation import federate
from fedloom.lineage import peak
from fedloom.recipe import load

recipe = planned(load(sys.argv[1], ["federation.rounds=2", f"data.source={sys.argv[2]}"]))
federation = assemble(recipe)
engine = federation.engine(recipe.method, Path(sys.argv[2]).with_suffix(""))
shared = recipe.method.start(federation.model, federation.task, len(federation.participants), 0)
for done in federate(recipe.method, engine, shared, federation.schedule):
    assert len(done.answers) == len(federation.participants)
print(peak(), sum(own.store.size() for own in engine.participants.values()))
"""

# One round of ten sites of a batch of eight images each, on a CLIP of ViT-B/32's shape and random weights.
TEN_SITES = """
import sys
from pathlib import Path
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel
from PIL import Image
from fedloom.adapters import LoRA
from fedloom.backbones import Adaptable
from fedloom.backbones.clip import CLIP
from fedloom.check.tiny import tiny_clip
from fedloom.data import Dataset, Example, Pixels
from fedloom.lineage import peak
from fedloom.methods import FedAvg, FedDLP
from fedloom.methods.feddlp import LAYERS
from fedloom.site import Site
from fedloom.tasks import Classification
from fedloom.tensors import Private, to_bytes
from fedloom.training import Training

folder, adapter = Path(sys.argv[1]), LoRA(rank=4, targets=LAYERS)
side = {"height": 224, "width": 224}
images = CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size=side)
model = Adaptable(CLIP(CLIPModel(CLIPConfig(text_config={"num_hidden_layers": 1})), (images, tiny_clip().tokenizer)))
task = Classification(("cat", "dog", "bird"))
Image.new("RGB", (224, 224)).save(folder / "black.png")
pixels = Pixels(folder, model.network.decode)
data = Dataset(tuple(Example(label, "black.png") for label in 2 * (*task.labels, "cat")), pixels)
held_out = Dataset(data.examples[:1], pixels)  # a pass without gradients holds less than a step
sites = [Site(f"{i}", model, task, data, held_out, Training(batch=8), 0) for i in range(10)]
method = {"fedavg": FedAvg(adapter), "feddlp": FedDLP(adapter)}[sys.argv[2]]
shared = method.start(model, task, 10, 0)
states = [method.local_round(0, site, shared, Private({})) for site in sites]
print(peak(), sum(len(to_bytes(update.tensors)) + len(to_bytes(own)) for update, own in states))
"""


def held(recipe: Path, sites: int) -> tuple[int, int]:
    """Bytes of memory at most, and bytes of private state, of a federation of so many sites over the same images."""
    manifest = recipe.with_name(f"{sites}.jsonl")
    rows = [
        {"image": f"{i}.png", "label": "ab"[i % 2], "site": f"site-{site}"} for site in range(sites) for i in range(4)
    ]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = subprocess.run(
        [sys.executable, "-c", ROUNDS, recipe, manifest], capture_output=True, text=True, check=True
    ).stdout
    memory, private = map(int, out.split())
    return memory, private


@pytest.mark.slow
def test_a_hundred_sites_share_one_backbone(tmp_path: Path) -> None:
    for i in range(4):
        noise = torch.randint(0, 256, (96, 96, 3), generator=generator("noise", i), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(tmp_path / f"{i}.png")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[data]\nsource = "10.jsonl"\n[backbone]\nname = "clip-small"\n[task]\nkind = "classification"\n'
        'head = "linear"\n[method]\nname = "fedavg"\n[method.adapter]\nkind = "lora"\n'
    )
    (ten, of_ten), (hundred, of_hundred) = held(recipe, 10), held(recipe, 100)
    assert of_hundred == 10 * of_ten > 0
    assert hundred < 1.2 * ten + of_hundred, f"{hundred / 1e6:.0f} MB against {ten / 1e6:.0f} MB"


@pytest.mark.slow
def test_two_adapters_are_not_two_models(tmp_path: Path) -> None:
    memory = {}
    for which in ("fedavg", "feddlp"):
        command = [sys.executable, "-c", TEN_SITES, tmp_path, which]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        memory[which] = [int(figure) for figure in out.split()]
    (single, sent), (dual, both) = memory.values()
    assert both > 2 * sent > 0
    allowed = single + both - sent
    # 1.02 was measured. Two models come to less than the promised 1.3: Python and its libraries are in both figures.
    assert dual < 1.15 * allowed, f"{dual / 1e6:.0f} MB against {allowed / 1e6:.0f} MB"
