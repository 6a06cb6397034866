"""One thin program an action."""

from absl import app


def check_arguments(argv: list[str]) -> None:
    """Ends the program for arguments that belong to no flag, as a shell makes them of a pattern without quotes, or of `--chat false`."""
    if argv[1:]:
        raise app.UsageError(f"{' '.join(argv[1:])} belongs to no flag: put a pattern or a text with spaces in quotes, and give a switch as --flag or --noflag")
