"""The arrows of the architecture hold, and importing fastis stays cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastis
from fastis import kernels

PACKAGE = Path(fastis.__file__).parent
# Who may import whom, inside the package: everything not named here is forbidden.
ALLOWED = {
    "check": {"dense"},
    "dense": set(),
    "first_order": set(),
    "table": {"kernels", "memory"},
    "memory": {"kernels"},
    "sampling": {"check", "kernels"},
    "variance": {"table"},
    "estimators": {"check", "gradients", "kernels", "methods"},
    "gradients": {"check", "kernels", "scored"},
    "lr": set(),
    "methods": {"check", "kernels", "methods", "saved", "table"},
    "observation": {"check", "dense", "methods", "sampling", "table"},
    "sampler": {
        *("check", "kernels", "methods", "observation", "sampling", "saved", "table", "variance")
    },
    "saved": {"check", "kernels", "table"},
    "loss": {"dense", "kernels", "loss_arguments", "scored"},
    "loss_arguments": {"dense", "kernels"},
    "scored": {"dense", "first_order", "kernels", "loss_arguments", "operators"},
    "operators": {"first_order", "kernels", "loss_arguments"},
    "kernels": {"_C", "__version__", "kernels", "memory", "table"},
}


def imported(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastis":
            inner = node.module.split(".")[1:]
            names |= {inner[0]} if inner else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("fastis.")}
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_imports_point_down(path):
    place = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if place == "__init__":
        return
    assert imported(path) <= ALLOWED[place], f"{path.name} imports upwards"


def test_import_loads_neither_triton_nor_matplotlib():
    code = "import fastis, sys; print([m for m in ('triton', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_backends_have_the_same_functions():
    import importlib.util
    import inspect

    columns = [(o, b) for o in ("update", "sample") for b in ("cpu", "cuda")]
    if importlib.util.find_spec("triton"):
        columns.append(("loss", "triton"))
    for operation, backend in columns:
        reference = importlib.import_module(f"fastis.kernels.reference_{operation}")
        compiled = importlib.import_module(f"fastis.kernels.{backend}_{operation}")
        own = {compiled.__name__, "fastis.kernels.cuda_weights"}  # the latter is part of a column
        for name, function in inspect.getmembers(compiled, inspect.isfunction):
            if function.__module__ not in own or name.startswith("_"):
                continue
            assert inspect.signature(function) == inspect.signature(getattr(reference, name))


def test_unknown_backend_is_an_error():
    with (
        pytest.raises(
            ValueError, match="name must be one of reference, cpu, triton, cuda, got 'tpu'"
        ),
        fastis.backend("tpu"),
    ):
        pass


def test_backend_that_cannot_serve_a_device_is_an_error():
    with fastis.backend("cpu"), pytest.raises(RuntimeError, match="no sample kernels for cuda"):
        kernels.kernels_for("sample", "cuda")


def test_missing_extension_is_named(monkeypatch):
    monkeypatch.setattr(kernels, "_C_MISSING", "the compiled extension is missing (why)")
    kernels._chosen.clear()
    with (
        pytest.raises(RuntimeError, match=r"backend 'cpu' was asked for, but .*missing"),
        fastis.backend("cpu"),
    ):
        pass
    assert kernels.kernels_for("update", "cpu").__name__.endswith("reference_update")
    kernels._chosen.clear()


def test_show_config(capsys):
    fastis.show_config()
    shown = capsys.readouterr().out
    assert f"fastis {fastis.__version__}" in shown
    assert "sample on cpu: cpu, reference" in shown
    assert "cuda" in shown


def test_forcing_a_lower_instruction_set():
    import os

    code = "from fastis import _C; print(_C.isa(), _C.lanes())"
    env = {**os.environ, "FASTIS_CPU_ISA": "baseline"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.split() == ["baseline", "4"]
    env["FASTIS_CPU_ISA"] = "mmx"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode != 0
    assert "FASTIS_CPU_ISA must be baseline, avx2 or avx512, got mmx" in done.stderr
