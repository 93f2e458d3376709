"""Checkpoints on disk: written whole or not at all, and loaded into all objects or into none."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import pickle
import random
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

_FORMAT, _VERSION = "fastis checkpoint", 1
_UNFIT = (pickle.PickleError, AttributeError, TypeError)  # what pickling raises


def save_checkpoint(path: str | os.PathLike[str], /, *, rng: bool = True, **objects: Any) -> None:
    """Writes the states of objects, and plain values, to one file: whole or not at all.

    They go to a temporary file beside ``path``, which is flushed to the disk and takes the place
    of ``path`` in one step: whenever the process or the machine stops, ``path`` holds the last
    checkpoint that was finished.

    ::

        fastis.save_checkpoint("last.pt", model=model, optimizer=optimizer, loader=loader, step=7)

    Parameters
    ----------
    path : str or os.PathLike
        of the file.
    rng : bool
        also the states of PyTorch's (CPU and CUDA), Python's and NumPy's global random generators.
    **objects
        by name: what has ``state_dict`` and ``load_state_dict`` (models, optimizers, schedulers,
        scalers, samplers, loaders), and tensors, numbers, strings, and lists, tuples and dicts of
        these.

    Raises
    ------
    ValueError
        naming the object that ``torch.load(path, weights_only=True)`` would not read.
    OSError
        from the file system.

    The file at ``path`` has not changed then.

    See Also
    --------
    load_checkpoint : the inverse.
    """
    states = {name: value.state_dict() for name, value in objects.items() if _has_state(value)}
    values = {name: value for name, value in objects.items() if name not in states}
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "states": states,
        "values": values,
        "rng": _random_states() if rng else None,
    }
    with _replacing(Path(os.path.realpath(path))) as file:
        try:
            torch.save(content, file)
            file.flush()
            torch.load(file.name, map_location="meta", weights_only=True, mmap=True)
        except _UNFIT:
            _name_unfit({**states, **values})
            raise


def load_checkpoint(
    path: str | os.PathLike[str], /, *, rng: bool = True, **objects: Any
) -> dict[str, Any]:
    """Loads :func:`save_checkpoint`'s file into objects: into all of them, or into none.

    ::

        values = fastis.load_checkpoint("last.pt", model=model, optimizer=optimizer, loader=loader)
        step = values["step"]

    Tensors are read to the host, and each object takes them to its own device. For one state alone,
    to evaluate a model, say: ``torch.load(path, weights_only=True)["states"]["model"]``.

    Parameters
    ----------
    path : str or os.PathLike
        of the file.
    rng : bool
        whether the global random generators get their states back, for a run that is to go on bit
        for bit.
    **objects
        one for each state in the file, by the same names.

    Returns
    -------
    dict
        the plain values, by name.

    Raises
    ------
    FileNotFoundError
        where there is no such file.
    ValueError, TypeError
        for a file that is no checkpoint, for names that are not those in it, and for a state that
        its object does not take, naming it.

    Every object is as it was then.
    """
    content = _read(path)
    states = content["states"]
    for name, value in objects.items():
        if not _has_state(value):
            raise TypeError(
                f"{name} must have state_dict and load_state_dict, got {type(value).__name__}; "
                "plain values are returned"
            )
    if missing := sorted(objects.keys() - states.keys()):
        raise ValueError(f"{path} must have states of {missing}, got those of {sorted(states)}")
    if left := sorted(states.keys() - objects.keys()):
        raise ValueError(
            f"{path} has states of {left} too: give an object for each, or read single ones by "
            "torch.load(path, weights_only=True)['states']"
        )
    set_random_states = _checked_random_states(path, content["rng"]) if rng else None
    _load_all(path, objects, states)
    if set_random_states is not None:
        set_random_states()
    values: dict[str, Any] = content["values"]
    return values


def _has_state(value: Any) -> bool:
    return not isinstance(value, type) and all(
        callable(getattr(value, name, None)) for name in ("state_dict", "load_state_dict")
    )


def _load_all(
    path: str | os.PathLike[str], objects: Mapping[str, Any], states: Mapping[str, Any]
) -> None:
    """Copies are kept of what there was: an object may fail with half of its state loaded.

    Of all before the first is loaded, since they may share something, as schedulers and optimizers
    do.
    """
    before = {name: copy.deepcopy(value.state_dict()) for name, value in objects.items()}
    for name, value in objects.items():
        try:
            value.load_state_dict(states[name])
        except Exception as error:
            for other, state in before.items():
                objects[other].load_state_dict(state)
            raise ValueError(
                f"{name} ({type(value).__name__}) does not take its state from {path}: {error}; "
                "nothing was loaded"
            ) from error


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    with open(path, "rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise ValueError(f"{path} must be a file of fastis.save_checkpoint: {error}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path} must be a file of fastis.save_checkpoint, got something else")
    if content["version"] != _VERSION:
        raise ValueError(f"{path} must have version {_VERSION}, got {content['version']!r}")
    return content


def _name_unfit(entries: Mapping[str, Any]) -> None:
    """Raises for the entry that can't be written, or not be read with ``weights_only=True``."""
    for name, value in entries.items():
        buffer = io.BytesIO()
        try:
            torch.save(value, buffer)
            buffer.seek(0)
            torch.load(buffer, weights_only=True)
        except _UNFIT as error:
            found = re.findall(r"GLOBAL (\S+)", str(error)) or [error]
            raise ValueError(
                f"{name} must be of tensors, numbers, strings, lists, tuples and dicts, which "
                f"torch.load(weights_only=True) reads, got {found[0]} in it"
            ) from error


# The file ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of ``path`` when all of it is on the disk."""
    _remove_leftovers(path)
    temporary = path.with_name(f"{_prefix(path)}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name too has to reach the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _prefix(path: Path) -> str:
    return f"{path.name}.{socket.gethostname()}"


def _remove_leftovers(path: Path) -> None:
    """Deletes what processes of this machine were writing for ``path`` when they were killed."""
    if os.name != "posix":
        return
    written_by = re.compile(re.escape(_prefix(path)) + r"\.(\d+)\.\d+\.tmp")
    for file in path.parent.iterdir():
        found = written_by.fullmatch(file.name)
        if found and not _is_running(int(found[1])):
            file.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# Random generators -------------------------------------------------------------------------------


def _random_states() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if cuda else [],
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, gauss),
    }


def _checked_random_states(path: str | os.PathLike[str], states: Any) -> Callable[[], None]:
    """A function that sets them, when all of them can be set."""
    if states is None:
        raise ValueError(f"{path} must have random states, got none: load it with rng=False")
    try:
        name, keys, *rest = states["numpy"]
        numpy_state = (name, keys.numpy().astype(np.uint32), *rest)
        np.random.RandomState().set_state(numpy_state)
        random.Random().setstate(states["python"])
        torch.Generator().set_state(states["torch"])
        cuda = states["cuda"][: torch.cuda.device_count()]
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{path} must have states of random generators: {error}") from error

    def set_states() -> None:
        torch.set_rng_state(states["torch"])
        for device, state in enumerate(cuda):
            torch.cuda.set_rng_state(state, device)
        random.setstate(states["python"])
        np.random.set_state(numpy_state)  # noqa: NPY002

    return set_states
