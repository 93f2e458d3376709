"""exp with all its digits, as compiled: the interpreter cannot show what the compiler contracts.

The straight-line code that Triton hands to ptxas is evaluated here, instruction by instruction.
"""

from __future__ import annotations

import importlib.util
import re

import numpy as np
import pytest
from conftest import INTERPRETED

pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton"),
    pytest.mark.skipif(INTERPRETED, reason="compiles, which the interpreter does not"),
]
if importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl

    from fastis.kernels.triton.math import exp_full

    @triton.jit
    def exp_kernel(x_ptr, out_ptr):
        lane = tl.arange(0, 32)
        tl.store(out_ptr + lane, exp_full(tl.load(x_ptr + lane)))


def ex2(x):
    return np.exp2(x.astype(np.float64))


OPERATIONS = {
    "add": lambda a, b: a.astype(np.float64) + b,
    "sub": lambda a, b: a.astype(np.float64) - b,
    "mul": lambda a, b: a.astype(np.float64) * b,
    "fma": lambda a, b, c: a.astype(np.float64) * b + c,
    "neg": lambda a: -a,
    "mov": lambda a: a,
    "ex2": ex2,
    "setp.lt": lambda a, b: a < b,
    "selp": lambda a, b, p: np.where(p, a, b),
}


def evaluate(ptx: str, x: np.ndarray) -> np.ndarray:
    """What the float32 code between the one load and the one store makes of ``x``."""
    body = ptx[ptx.index("ld.global") : ptx.index("st.global")]
    registers = {re.search(r"\{ (%r\d+) \}", body)[1]: x}

    def value(operand: str) -> np.ndarray:
        if operand.startswith("0f"):
            bits = np.array(int(operand[2:], 16), np.uint32)
            return np.broadcast_to(bits.view(np.float32), x.shape)
        return registers[operand]

    for line in re.findall(r"^\s*([a-z]\w*[\w.]*\.[fb]32\s[^;]*);", body, re.MULTILINE):
        opcode, _, operands = line.partition(" ")
        if opcode.startswith("ld."):
            continue
        to, *others = (operand.strip() for operand in operands.split(","))
        name = "setp.lt" if opcode.startswith("setp.lt") else opcode.partition(".")[0]
        result = OPERATIONS[name](*map(value, others))
        registers[to] = result if result.dtype == bool else result.astype(np.float32)
    stored = re.search(r"\{ (%r\d+) \};", ptx[ptx.index("st.global") :])
    return registers[stored[1]]


def test_exp_keeps_its_digits_when_it_is_compiled():
    """Within 3 ulp down to exp(-87). A contracted product cost 2.6e-6 there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(exp_kernel, {"x_ptr": "*fp32", "out_ptr": "*fp32"}, {}, {})
    options = {"num_warps": 1, "enable_fp_fusion": True}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    x = -np.linspace(0, 87, 20011, dtype=np.float32)
    with np.errstate(under="ignore"):
        found = evaluate(ptx, x).astype(np.float64)
    truth = np.exp(x.astype(np.float64))
    assert np.abs(found / truth - 1).max() < 3 * 2.0**-23
