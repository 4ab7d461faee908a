"""A federation small enough to put a method through every law in seconds, made in memory: no file is needed."""

import string
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from fedloom.backbones import Adaptable
from fedloom.backbones.clip import CLIP
from fedloom.data import Dataset, Example, Pixels
from fedloom.site import Site
from fedloom.tasks import Classification, Task
from fedloom.tensors import generator
from fedloom.training import Training

SEED = 1
SIZES = ((5, 2), (3, 1), (4, 2), (1, 0))  # training and held-out examples of each site
COLOURS = Classification(("red", "green", "blue"), head="linear")


def federation(*tasks: Task, towers: Sequence[str] = ("vision",)) -> tuple[Site, ...]:
    """Four tiny sites on one tiny CLIP of random weights; unlike in size, the last with one example and nothing held
    out.

    tasks: dealt to the sites in turn; a classification of colours with a linear head where none is given
    towers: which of them take adapters
    """
    model = Adaptable(tiny_clip(towers))
    with tempfile.TemporaryDirectory() as folder:
        pixels = Pixels(Path(folder), model.network.decode)
        sites = []
        for i, (train, held_out) in enumerate(SIZES):
            task = (tasks or (COLOURS,))[i % max(1, len(tasks))]
            examples = tuple(_example(Path(folder), task, i, n) for n in range(train + held_out))
            pixels.usable(examples)  # decoded now, while the files are there
            parts = (Dataset(examples[:train], pixels), Dataset(examples[train:], pixels))
            training = Training(lr=1e-2, batch=2, warmup_head=1)
            sites.append(Site(f"site-{i}", model, task, *parts, training, SEED))
    return tuple(sites)


def _example(folder: Path, task: Task, site: int, n: int) -> Example:
    rng = generator("check", site, n)
    number = (site + n) % len(task.labels)
    noise = torch.randint(0, 128, (16, 16, 3), generator=rng, dtype=torch.uint8)
    noise[..., number % 3] += 100
    name = f"{site}-{n}.png"
    Image.fromarray(noise.numpy()).save(folder / name)
    return Example(task.labels[number], name)


def tiny_clip(towers: Sequence[str] = ("vision",)) -> CLIP:
    """A CLIP of two blocks of width 16 a tower, of random weights and a vocabulary of letters: no file is read."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    letters = string.ascii_lowercase + string.digits + ".,"
    tokens = ("<|startoftext|>", *letters, *(f"{letter}</w>" for letter in letters), "<|endoftext|>")
    end = len(tokens) - 1
    blocks = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": end, "pad_token_id": end}
    text = {**blocks, **special, "vocab_size": len(tokens), "max_position_embeddings": 24}
    vision = {**blocks, "image_size": 16, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):  # Hugging Face draws its weights from the global generator
        torch.manual_seed(SEED)
        module = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    words = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    return CLIP(module, (images, words), towers)
