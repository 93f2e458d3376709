"""The arrows of the architecture hold, and importing fastis stays cheap."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import fastis
from fastis import kernels

PACKAGE = Path(fastis.__file__).parent
# From the ground up: a module imports from the lines above its own, and from its own folder.
ORDER = [
    *("kernels.extension", "kernels", "kernels.memory", "kernels.constants", "kernels.layout"),
    "kernels.formats",
    *("kernels.code", "kernels.flatten", "kernels.quantize", "kernels.alias"),
    *("kernels.state", "kernels.variance", "kernels.table", "kernels.loss", "kernels.shards"),
    "kernels.batch_norm",
    *("kernels.reference", "kernels.cpu", "kernels.cuda", "kernels.triton"),
    *("check", "batch", "scored", "autograd", "operators", "loss", "any_loss", "categorical"),
    *("saved", "methods", "coefficients", "batch_norm", "variance", "misuse"),
    *("monitor", "resume", "steer", "sampler", "scalars", "figures", "suspects"),
    *("exchange", "replicated"),
    "scoring",
    *("ranks", "moments", "sharded_state", "sharded"),
    *("rates", "in_flight", "data", "checkpoint", "lr", "gradients", "estimators", "config"),
    *("integrations.parts", "integrations.model_loss", "integrations"),
]


def place_of(module):
    """The line of ORDER that a dotted name below fastis belongs to; None: the package itself."""
    names = (".".join(module.split(".")[:depth]) for depth in (2, 1))
    return next((name for name in names if name in ORDER), None)


def imported(path):
    """Dotted names below fastis."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastis":
            for alias in node.names:
                yield f"{node.module}.{alias.name}".removeprefix("fastis.")
        elif isinstance(node, ast.Import):
            yield from (a.name[7:] for a in node.names if a.name.startswith("fastis."))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_imports_point_down(path):
    own = place_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    if path.name == "__init__.py" and path.parent == PACKAGE:
        return
    for module in imported(path):
        place = place_of(module)
        assert place is not None or module in ("_C", "__version__"), module
        assert place in (None, own) or ORDER.index(place) < ORDER.index(own), module


def test_import_loads_no_library_that_is_optional():
    others = ("triton", "matplotlib", "transformers", "accelerate", "lightning", "timm")
    code = f"import fastis, sys; print([m for m in {others} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def cells():
    folders = PACKAGE / "kernels"
    return [
        (backend, operation)
        for backend in kernels.BACKENDS
        for operation in kernels.OPERATIONS
        if (folders / backend / f"{operation}.py").exists() and backend != "reference"
    ]


def functions(backend, operation):
    """Signatures by name of what a cell of the matrix defines for others."""
    if backend == "triton":
        pytest.importorskip("triton")
    module = importlib.import_module(f"fastis.kernels.{backend}.{operation}")
    return {
        name: inspect.signature(function)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }


def test_matrix_of_backends_is_as_documented():
    assert cells() == [
        *(("cpu", operation) for operation in kernels.OPERATIONS),
        ("triton", "loss"),
        *(("cuda", operation) for operation in ("table", "categorical")),
    ]


@pytest.mark.parametrize(("backend", "operation"), cells())
def test_backends_have_the_same_functions(backend, operation):
    assert functions(backend, operation) == functions("reference", operation)


def test_unknown_backend_is_an_error():
    with (
        pytest.raises(
            ValueError, match="name must be one of reference, cpu, triton, cuda, got 'tpu'"
        ),
        fastis.backend("tpu"),
    ):
        pass


def test_backend_that_cannot_serve_a_device_is_an_error():
    with (
        fastis.backend("cpu"),
        pytest.raises(RuntimeError, match="no categorical kernels for cuda"),
    ):
        kernels.kernels_for("categorical", "cuda")


def test_missing_extension_is_named(monkeypatch):
    monkeypatch.setattr(kernels.extension, "MISSING", "the compiled extension is missing (why)")
    kernels._chosen.clear()
    with (
        pytest.raises(RuntimeError, match=r"backend 'cpu' was asked for, but .*missing"),
        fastis.backend("cpu"),
    ):
        pass
    assert kernels.kernels_for("table", "cpu").__name__.endswith("reference.table")
    kernels._chosen.clear()


def test_show_config(capsys):
    fastis.show_config()
    shown = capsys.readouterr().out
    assert f"fastis {fastis.__version__}" in shown
    assert "categorical on cpu: cpu, reference" in shown
    assert "cuda" in shown


def test_forcing_a_lower_instruction_set():
    import os

    code = "from fastis import _C; print(_C.isa())"
    env = {**os.environ, "FASTIS_CPU_ISA": "baseline"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.split() == ["baseline"]
    env["FASTIS_CPU_ISA"] = "mmx"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode != 0
    assert "FASTIS_CPU_ISA must be baseline, avx2 or avx512, got mmx" in done.stderr
