"""``origin.json``: what model and data an output folder was made from, by name, so that it can be compared later.

A name is ``module:name`` with the current folder first, as ``python -m`` has it. It may mean the thing itself or a
function without arguments that returns it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowrank_fx._files import read_json, write_atomic
from lowrank_fx.errors import OptionError, StorageError

ORIGIN_VERSION = 1
ORIGIN_FILE = "origin.json"


@dataclass(frozen=True)
class Origin:
    """What an output folder was made from.

    Attributes:
        model: name of the original model, ``module:factory``.
        data: name of batches to compare on, ``module:loader``.
        fresh: whether those batches are others than the ones it was calibrated on.
        weights: a safetensors file in the same folder with the original's weights, or None where the factory gives a
            trained model.
    """

    model: str
    data: str
    fresh: bool
    weights: str | None = None


def write_origin(origin: Origin, folder: str | os.PathLike[str]) -> None:
    """Write ``origin.json`` into a folder that exists.

    Raises:
        StorageError: it cannot be written.
    """
    data = {"version": ORIGIN_VERSION, **asdict(origin)}
    write_atomic(Path(folder) / ORIGIN_FILE, (json.dumps(data, indent=1) + "\n").encode())


def read_origin(folder: str | os.PathLike[str]) -> Origin | None:
    """What :func:`write_origin` wrote; None where there is no such file.

    Raises:
        StorageError: the file is damaged, or of another version.
    """
    path = Path(folder) / ORIGIN_FILE
    if not path.exists():
        return None
    data = read_json(path)
    if not isinstance(data, dict) or data.pop("version", None) != ORIGIN_VERSION:
        raise StorageError(f"{path}: not an origin of version {ORIGIN_VERSION}")
    kinds = {"model": str, "data": str, "fresh": bool, "weights": str | None}
    wrong = [name for name, kind in kinds.items() if not isinstance(data.get(name), kind)]
    if wrong or data.keys() - kinds.keys():
        raise StorageError(f"{path}: damaged: {(wrong or sorted(data.keys() - kinds.keys()))[0]!r} is wrong")
    origin = Origin(**data)
    # A file name alone: a folder from elsewhere must not make anyone read other files.
    if origin.weights is not None and Path(origin.weights).name != origin.weights:
        raise StorageError(f"{path}: damaged: {origin.weights!r} is not a plain file name")
    return origin


def resolve(text: str, what: str, hint: str = "") -> Any:
    """The object that ``module:name`` means.

    Args:
        text: the name.
        what: where the name was given, for messages.
        hint: what else the user can do, for messages.

    Raises:
        OptionError: the text has another form, there is no such module, or nothing of that name in it.
    """
    module_name, colon, path = text.partition(":")
    if not (colon and module_name and path):
        raise OptionError(f"{what} {text!r}: write a module and a name in it, such as zoo:make_model{hint}")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that imports something missing is another mistake than a module that is not there.
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise OptionError(f"{what} {text!r}: no module {error.name!r} is in {here} or installed{hint}") from error
        raise
    for name in path.split("."):
        if not hasattr(found, name):
            raise OptionError(f"{what} {text!r}: module {module_name!r} has nothing called {path!r}{hint}")
        found = getattr(found, name)
    return found


def named_model(text: str, what: str, hint: str = "") -> Any:
    """The model that a name means; a function or a class is called.

    Args:
        text: the name.
        what: where the name was given, for messages.
        hint: what else the user can do, for messages.

    Returns:
        A ``torch.nn.Module``.

    Raises:
        OptionError: the name means nothing, or something other than a ``torch.nn.Module``.
    """
    from torch import nn

    found = resolve(text, what, hint)
    made = found() if callable(found) and not isinstance(found, nn.Module) else found
    if not isinstance(made, nn.Module):
        raise OptionError(f"{what} {text!r} gave {type(made).__name__}, not a torch.nn.Module{hint}")
    return made


def named_batches(text: str, what: str, hint: str = "") -> Any:
    """The batches that a name means; a function or a class is called.

    Args:
        text: the name.
        what: where the name was given, for messages.
        hint: what else the user can do, for messages.

    Returns:
        An iterable.

    Raises:
        OptionError: the name means nothing, or something that cannot be iterated over.
    """
    found = resolve(text, what, hint)
    iterable = hasattr(found, "__iter__") and not isinstance(found, type)
    made = found() if callable(found) and not iterable else found
    if not hasattr(made, "__iter__"):
        raise OptionError(f"{what} {text!r} gave {type(made).__name__}, which cannot be iterated over{hint}")
    return made


def original_model(origin: Origin, folder: str | os.PathLike[str], hint: str = "") -> Any:
    """The original model that an origin names, with the weights that lie beside it.

    Raises:
        OptionError: the name means no model.
        StorageError: the weights are missing or do not fit the model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    model = named_model(origin.model, f"{Path(folder) / ORIGIN_FILE}: model", hint)
    if origin.weights is not None:
        path = Path(folder) / origin.weights
        try:
            model.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise StorageError(f"{path}: the original's weights could not be loaded: {error}") from error
    return model
