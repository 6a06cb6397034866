"""One thin program an action."""

import re
from collections.abc import Iterable

from absl import app
from ml_collections import ConfigDict


def check_arguments(argv: list[str]) -> None:
    """Ends the program for arguments that belong to no flag, as a shell makes them of a pattern without quotes, or of `--chat false`."""
    if argv[1:]:
        raise app.UsageError(f"{' '.join(argv[1:])} belongs to no flag: put a pattern or a text with spaces in quotes, and give a switch as --flag or --noflag")


def policy_names(flag: str) -> list[str]:
    """The policies of a flag, with commas between them; those between a policy's options are its own."""
    return [name for name in re.split(",(?![a-z_]+=)", flag) if name]


def check_config(config: ConfigDict, like: Iterable[str], files: str) -> None:
    """Ends the program for a config that lacks entries of one `like` those that it takes, as another program's does; `files` says which it takes."""
    missing = [name for name in like if name not in config]
    if missing:
        raise app.UsageError(f"--config has no {', '.join(missing)}: it is another program's; give {files}")
