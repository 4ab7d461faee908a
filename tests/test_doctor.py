"""`fedloom check`: what this machine has, and whether what a recipe names is there."""

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom import doctor
from fedloom.recipe import load

Fedloom = Callable[..., tuple[int, str, str]]
DEVELOPMENT = {"dev", "docs"}


def test_every_extra_is_looked_for_and_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(doctor.EXTRAS) == set(project["optional-dependencies"]) - DEVELOPMENT
    for extra, packages in doctor.EXTRAS.items():
        asked = " ".join(project["optional-dependencies"][extra]).lower()
        assert all(package.lower() in asked for package in packages)
    have = list(doctor.machine())
    assert any(line.startswith("device: CPU") for line in have)
    assert any(line.startswith("free disk here: ") for line in have)
    assert any("extra dicom: pydicom " in line for line in have)
    monkeypatch.setattr(doctor, "_version", lambda package: None if package == "pydicom" else "1")
    lacking = list(doctor.machine())
    assert "extra dicom: no pydicom (pip install 'fedloom[dicom]')" in lacking
    assert max(map(len, lacking)) <= 80


def test_what_a_recipe_names_is_looked_for(recipe: Path) -> None:
    data, backbone = doctor.present(load(recipe))
    assert data == "data: 48 examples"
    assert ": there, " in backbone
    gone = load(recipe, {"data.source": "./gone.jsonl", "backbone.name": "clip-large"})
    assert list(doctor.present(gone)) == ["data: cannot be used", "backbone clip-large: not there"]
    (_, hub) = doctor.present(load(recipe, {"backbone.name": "nobody/has-this"}))
    assert "the first run takes it from the Hugging Face hub" in hub


def test_what_is_missing_is_listed_and_then_said_with_its_remedy(fedloom: Fedloom, recipe: Path) -> None:
    code, out, err = fedloom("check", recipe, "--set", "data.source=./gone.jsonl")
    assert code == 2
    assert "data: cannot be used" in out
    assert ": there, " in out  # the backbone is looked for all the same
    assert err.count("\n") == 1
    assert "gone.jsonl" in err
