"""``origin.json``: written, read back, and what a damaged one or a wrong name says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lowrank_fx.errors import OptionError, StorageError
from lowrank_fx.origin import ORIGIN_FILE, Origin, original_model, read_origin, resolve, write_origin


@pytest.mark.parametrize("weights", [None, "original.safetensors"])
def test_an_origin_comes_back(tmp_path: Path, weights: str | None) -> None:
    origin = Origin("zoo:make_model", "zoo:make_loader", fresh=True, weights=weights)
    write_origin(origin, tmp_path)
    assert read_origin(tmp_path) == origin
    assert json.loads((tmp_path / ORIGIN_FILE).read_text("utf-8"))["version"] == 1


def test_a_folder_without_one_has_none(tmp_path: Path) -> None:
    assert read_origin(tmp_path) is None


GOOD: dict[str, Any] = {"version": 1, "model": "a:b", "data": "a:c", "fresh": False, "weights": None}


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"version": 2}, "not an origin of version 1"),
        ({"model": 3}, "damaged: 'model' is wrong"),
        ({"fresh": "yes"}, "damaged: 'fresh' is wrong"),
        ({"more": 1}, "damaged: 'more' is wrong"),
        ({"weights": "../x.safetensors"}, "damaged: '../x.safetensors' is not a plain file name"),
    ],
)
def test_a_damaged_origin_is_told(tmp_path: Path, change: dict[str, Any], cause: str) -> None:
    (tmp_path / ORIGIN_FILE).write_text(json.dumps(GOOD), "utf-8")
    assert read_origin(tmp_path) == Origin("a:b", "a:c", fresh=False)
    (tmp_path / ORIGIN_FILE).write_text(json.dumps({**GOOD, **change}), "utf-8")
    with pytest.raises(StorageError) as caught:
        read_origin(tmp_path)
    assert str(caught.value) == f"{tmp_path / ORIGIN_FILE}: {cause}"


def test_no_dictionary_is_told(tmp_path: Path) -> None:
    (tmp_path / ORIGIN_FILE).write_text("[]", "utf-8")
    with pytest.raises(StorageError, match="not an origin of version 1"):
        read_origin(tmp_path)


def test_a_name_means_what_is_in_a_module() -> None:
    assert resolve("collections.abc:Mapping.keys", "--data").__name__ == "keys"
    with pytest.raises(OptionError, match=r"^--data 'json:no': module 'json' has nothing called 'no'; give --data$"):
        resolve("json:no", "--data", "; give --data")


def make_model() -> torch.nn.Module:
    return torch.nn.Linear(2, 2)


def test_weights_beside_the_origin_are_loaded(tmp_path: Path) -> None:
    origin = Origin(f"{__name__}:make_model", "", fresh=True, weights="w.safetensors")
    with pytest.raises(StorageError, match="the original's weights could not be loaded: "):
        original_model(origin, tmp_path)
    state = {"weight": torch.eye(2), "bias": torch.ones(2)}
    save_file(state, tmp_path / "w.safetensors")
    loaded = original_model(origin, tmp_path).state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    save_file({"weight": torch.eye(3)}, tmp_path / "w.safetensors")
    with pytest.raises(StorageError, match="could not be loaded: Error"):
        original_model(origin, tmp_path)
