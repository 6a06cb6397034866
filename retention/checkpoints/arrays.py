"""Named arrays, and what is said of them as JSON, in one safetensors file: how gates and sessions are kept."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy


def save(path: str | pathlib.Path, arrays: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Writes the file whole or not at all, in the place of an earlier one.

    Raises FileNotFoundError where there is no such folder, ValueError where something stands there that is no file.
    """
    path = pathlib.Path(path).expanduser()
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file that could be written anew; give the path of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} into; make it first")
    partial = path.with_name(path.name + ".partial")
    metadata = {name: json.dumps(fact) for name, fact in facts.items()}
    partial.write_bytes(safetensors.numpy.save({name: np.asarray(array) for name, array in arrays.items()}, metadata))
    partial.replace(path)


def load(path: str | pathlib.Path, make: Callable[[dict[str, np.ndarray], dict[str, Any]], Any], kind: str, writer: str) -> Any:
    """What make(arrays, facts) makes of the file.

    Raises FileNotFoundError, and ValueError for what is no `kind` ("gates file") as its `writer` writes it: make's KeyError, TypeError or ValueError too.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no {kind} {path}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            facts = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
            return make({name: file.get_tensor(name) for name in file.keys()}, facts)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a {kind} as {writer} writes it, or it is damaged: {error}") from error
