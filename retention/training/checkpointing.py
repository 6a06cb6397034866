"""Checkpoints of a training run: gates and optimiser, the place of each row in its data, and the config, written while training goes on."""

import contextlib
import errno
import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from retention import runs
from retention.distributed import gather_json

# A run may be resumed with other values of these: they say where and how often things happen, and not what is learned.
FREE = ("mesh", "checkpoint_every", "keep_checkpoints")
NO_DAMAGE = (MemoryError, PermissionError, jax.errors.JaxRuntimeError)  # what keeps a whole checkpoint from being read, such as a device without room


class Checkpoints:
    """The folder workdir/checkpoints: one folder a step, named by it. A context manager; leaving it waits for what is being written.

    A checkpoint gets its name when all of it is on the disk, and the oldest goes after that: whenever the program dies, the last one with a name is whole.
    """

    def __init__(self, folder: pathlib.Path, keep: int):
        if keep < 1:
            raise ValueError(f"keep_checkpoints must be at least 1, not {keep}")
        self.folder = folder
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler(), "config": ocp.JsonCheckpointHandler()}
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(folder, item_handlers=handlers, options=options)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            # An error that ends the run is the one to be seen.
            with contextlib.nullcontext() if kind is None else contextlib.suppress(OSError):
                self.wait()
        finally:
            self._manager.close()

    def save(self, step: int, state: Any, rows: dict, config: dict) -> None:
        """Begins to write what is needed to go on after `step` steps; the arrays may be donated as soon as it returns. Of several processes all call it.

        rows: this process's part of the data's state, row -> JSON-able.  Raises OSError if this or an earlier checkpoint cannot be written.
        """
        self.wait()  # as orbax would; but here an error is known to be that of the earlier one
        self._step = step
        everything = {row: place for part in gather_json(rows) for row, place in part.items()}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(everything), config=ocp.args.JsonSave(config))
        self._or_disk_error(lambda: self._manager.save(step, args=items, force=True))

    def check(self) -> None:
        """Raises OSError if a checkpoint could not be written."""
        self._or_disk_error(self._manager.check_for_errors)

    def wait(self) -> None:
        """Returns when all that was begun is on the disk. Raises OSError if it could not be written."""
        self._or_disk_error(self._manager.wait_until_finished)

    def restore(self, shapes: Any, config: dict) -> tuple[Any, dict] | None:
        """The last checkpoint's state and rows (of all processes), or None if there is none.

        shapes: jax.ShapeDtypeStructs of the state, with the shardings it is to have; they need not be those it was saved with.
        Raises ValueError for a checkpoint of another config or of gates of another shape, or a damaged one.
        """
        last = self._manager.latest_step()
        if last is None:
            return None
        path = self.folder / str(last)
        with _undamaged(path):
            stored = self._manager.restore(last, args=ocp.args.Composite(config=ocp.args.JsonRestore(), data=ocp.args.JsonRestore()))
            found = self._manager.item_metadata(last)["state"]["params"]
        runs.check_same(stored["config"], config, FREE, f"the checkpoint {path} is of another config")
        for name, leaf in shapes.params.items():
            if name not in found or tuple(found[name].shape) != leaf.shape:
                is_there = tuple(found[name].shape) if name in found else "missing"
                raise ValueError(f"the checkpoint {path} is of other gates: {name} is {is_there}, this run needs {leaf.shape}; give a new workdir")
        with _undamaged(path):
            state = self._manager.restore(last, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes)))["state"]
            jax.block_until_ready(state)
        return state, stored["data"]

    def _or_disk_error(self, action) -> None:
        try:
            action()
        except Exception as error:  # orbax hands on the storage library's errors, whose types vary and whose words are many
            reason = next((words for words in map(os.strerror, errno.errorcode) if words in str(error)), str(error))
            last = self._manager.latest_step()
            place = "its start" if last is None else self.folder / str(last)
            raise OSError(
                f"the checkpoint {self.folder / str(self._step)} cannot be written ({reason}); put that right and start again, and the run goes on from {place}"
            ) from error


@contextlib.contextmanager
def _undamaged(path: pathlib.Path):
    """Around what reads a checkpoint: raises ValueError where it cannot be read for another reason than NO_DAMAGE."""
    try:
        yield
    except NO_DAMAGE:
        raise
    except Exception as error:  # orbax raises whatever the damage leads to
        raise ValueError(f"the checkpoint {path} cannot be read; delete that folder, and the run goes on from the one before") from error
