"""Runs a GPU benchmark without a GPU, to find what is wrong with the script before time counts.

    python bench/gpu_rehearsal.py bench/bench_gpu_loss.py ARGUMENTS

"cuda" is the CPU and the CPU's kernels serve it, a graph is the calls that it was made of, Triton's
launches go to a driver that isn't there, and compiling by torch is left out. Nothing that is
measured means anything.
"""

from __future__ import annotations

import contextlib
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from torch.overrides import TorchFunctionMode

NAME = "none: a rehearsal on the CPU"


def on_the_host(value: Any) -> Any:
    """What names the GPU names the CPU."""
    if isinstance(value, str) and value.startswith("cuda"):
        return "cpu"
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return value


class OnTheHost(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cuda:
            return args[0]
        kwargs = {name: on_the_host(value) for name, value in (kwargs or {}).items()}
        return function(*map(on_the_host, args), **kwargs)


class AnyGenerator(type(torch.Generator)):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, Generator.__base__)


class Generator(torch.Generator, metaclass=AnyGenerator):
    def __new__(cls, device: Any = "cpu") -> Any:
        return Generator.__base__.__new__(Generator.__base__, on_the_host(device))


class Event:
    def __init__(self, enable_timing: bool = False) -> None: ...
    def record(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Event) -> float:
        return 1.0


class Graph:
    """A replay runs the calls; what warms them up runs when the graph is made, as it would."""

    def __init__(self, calls: Sequence[Callable[[], object]], warmups: int) -> None:
        self.calls = calls
        for _ in range(warmups):
            self.replay()

    def replay(self) -> None:
        for call in self.calls:
            call()


def pretend() -> Iterator[Any]:
    """The patches."""
    from bench import fake_triton, gpu_ceilings, timing
    from fastis import kernels
    from fastis.kernels.cpu import categorical as cpu_categorical
    from fastis.kernels.cpu import loss as cpu_loss
    from fastis.kernels.cpu import table as cpu_table

    fake_triton.pretend()
    stream = SimpleNamespace(wait_stream=lambda other: None, cuda_stream=0)
    cuda = {
        "is_available": lambda: True,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: NAME,
        "Event": Event,
        "Stream": lambda *_: stream,
        "current_stream": lambda *_: stream,
        "stream": lambda _: contextlib.nullcontext(),
    }
    for name, value in cuda.items():
        yield mock.patch.object(torch.cuda, name, value)
    yield mock.patch.object(torch, "Generator", Generator)
    yield mock.patch.object(torch, "compile", new=lambda function, **_: function)
    served = {"loss": cpu_loss, "table": cpu_table, "categorical": cpu_categorical}
    yield mock.patch.dict(kernels._chosen, {(o, "cuda"): module for o, module in served.items()})

    yield mock.patch.object(timing, "captured", new=lambda calls, warmups=3: Graph(calls, warmups))
    # Its kernel computes nothing here.
    yield mock.patch.object(gpu_ceilings, "check_read", return_value=None)


def main(argv: list[str]) -> None:
    script = Path(argv[0]).resolve()
    # A module by its name, so that the patches of bench.NAME reach the script itself.
    sys.argv = argv
    with contextlib.ExitStack() as stack:
        for patch in pretend():
            stack.enter_context(patch)
        stack.enter_context(OnTheHost())
        module = __import__(f"bench.{script.stem}", fromlist=["main"])
        if hasattr(module, "main"):
            sys.exit(module.main(argv[1:]))
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
