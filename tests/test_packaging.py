"""What is left without the compiled extension, and what it brings into the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

# As in a wheel that was built with FASTIS_NO_EXTENSION=1: importing fastis._C fails.
WITHOUT_EXTENSION = """
import sys

sys.modules["fastis._C"] = None
import torch

import fastis
"""

EVERYTHING = """
from fastis import methods

torch.manual_seed(0)
inputs, target = torch.randn(200, 5), torch.randint(3, (200,))
linear = torch.nn.Linear(5, 3)


def score_of(indices):
    return fastis.cross_entropy(linear(inputs[indices]), target[indices])


names = ["emais", "loss", "rais", "confidence", "confvar", "self_paced"]
names += ["online_batch", "prioritized", "scan", "uniform"]
for method in [*names, methods.Presampling(score_of, score="loss")]:
    sampler = fastis.Sampler(200, 16, method=method)
    for step in range(40):
        batch = sampler.sample()
        out = fastis.cross_entropy(linear(inputs[batch.indices]), target[batch.indices])
        sampler.update(batch, out)
        out.loss.backward()
    sampler.load_state_dict(sampler.state_dict())
    sampler.sample()
logits = torch.randn(16, 3, requires_grad=True)
fastis.cross_entropy(logits, torch.rand(16, 3).softmax(-1)).loss.backward()
fastis.binary_cross_entropy_with_logits(logits, torch.rand(16, 3)).loss.backward()
fastis.mse_loss(logits, torch.rand(16, 3)).loss.backward()
assert fastis.sample(torch.tensor([0.0, 1.0]), 3).indices.tolist() == [1, 1, 1]
assert fastis.AliasTable(torch.tensor([0.0, 1.0])).sample(3).indices.tolist() == [1, 1, 1]
"""


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_everything_works_without_the_extension():
    done = python(WITHOUT_EXTENSION + EVERYTHING)
    assert done.returncode == 0, done.stderr


def test_config_names_the_missing_extension():
    done = python(WITHOUT_EXTENSION + "fastis.show_config()")
    shown = done.stdout.splitlines()
    (line,) = [line for line in shown if line.startswith("compiled extension")]
    assert "missing" in line
    assert "installed with FASTIS_NO_EXTENSION=1, or not built for this Python" in line
    for operation in ("loss", "table", "categorical"):
        (line,) = [line for line in shown if line.startswith(f"{operation} on cpu")]
        assert line.startswith(f"{operation} on cpu: reference; cpu: ")


def test_forcing_a_missing_extension_is_an_error():
    done = python(WITHOUT_EXTENSION + "fastis.backend('cpu').__enter__()")
    assert "RuntimeError: backend 'cpu' was asked for, but the compiled" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime():
    """Two would start threads of their own and disagree about how many there are."""
    code = """
import fastis, torch

torch.set_num_threads(2)
torch.rand(1 << 20).exp().sum()
logits = torch.randn(4096, 100)
fastis.cross_entropy(logits, torch.zeros(4096, dtype=torch.long))
paths = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
print([p for p in paths if p.rpartition("/")[2].startswith(("libgomp", "libomp", "libiomp"))])
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert len(eval(done.stdout)) == 1, done.stdout
