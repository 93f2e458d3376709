"""The rules for the kernels' machine code: each of them notices a fault put in on purpose."""

from __future__ import annotations

import importlib.util

import pytest
from conftest import INTERPRETED

from bench import kernel_resources, sass
from bench.kernel_resources import Usage, resident
from bench.kernel_rules import LOOPED, broken_rules

# A loop of a sweep as cuobjdump lists it: two loads, what stands behind a branch, the way back.
LISTING = """
		Function : a_kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;                  /* 0x00000a00ff017b82 */
                                                                           /* 0x000e300000000800 */
        /*0010*/                   LDG.E.EL.128 R28, desc[UR4][R28.64] ;   /* 0x0000000000000000 */
        /*0020*/              @!P1 LDG.E.EL.128 R32, desc[UR4][R32.64] ;   /* 0x0000000000000000 */
        /*0030*/               @P0 BRA 0x60 ;                              /* 0x0000000000000000 */
        /*0040*/                   FADD R2, R2, R3 ;                       /* 0x0000000000000000 */
        /*0050*/                   SHFL.BFLY PT, R29, R28, 0x2, 0x1f ;     /* 0x0000000000000000 */
        /*0060*/                   STG.E.EF.64 desc[UR14][R34.64], R36 ;   /* 0x0000000000000000 */
        /*0070*/              @!P2 BRA 0x10 ;                              /* 0x0000000000000000 */
        /*0080*/                   LDG.E.U16.CONSTANT R4, [R6] ;           /* 0x0000000000000000 */
        /*0090*/                   EXIT ;                                  /* 0x0000000000000000 */
        /*00a0*/                   BRA 0xa0;                               /* 0x0000000000000000 */
"""


def test_a_loop_is_found_and_its_shortest_way():
    (code,) = sass.functions(LISTING).values()
    assert len(code) == 11
    (loop,) = sass.innermost_loops(code)
    assert [i.address for i in loop.body] == list(range(0x10, 0x80, 0x10))
    assert [i.address for i in loop.path] == [0x10, 0x20, 0x30, 0x60, 0x70]
    assert loop.count("SHFL") == 1  # also behind a branch
    assert loop.loads == {16: 2}
    assert loop.stores == {8: 1}
    assert sass.outermost_loops(code) == [loop]
    assert code[8].bytes == 2


def test_of_nested_loops_the_inner_and_the_outer_are_told_apart():
    outer = LISTING.replace("EXIT ;", "@P3 BRA 0x0 ;")
    (code,) = sass.functions(outer).values()
    assert [len(loop.body) for loop in sass.innermost_loops(code)] == [7]
    assert [len(loop.body) for loop in sass.outermost_loops(code)] == [10]


def row(**changes):
    """A sweep that breaks no rule, but for the changes."""
    loop = {"instructions": 254, "shuffles": 0, "elements": 32, "loads": {"16": 4}, "stores": {}}
    loop |= changes.pop("loop", {})
    good = {
        "kernel": "label_sweeps_kernel", "call": "cross_entropy 8192x128256 bf16", "sm": 90,
        "registers": 90, "local": 0, "programs": 8192, "resident": 2, "loops": [loop],
    }  # fmt: skip
    return good | changes


def test_good_rows_are_good():
    assert not [*broken_rules(row())]
    tile = row(kernel=LOOPED[0], call="cross_entropy 32768x1000 bf16", programs=4096, resident=32)
    tile["loops"][0] |= {"instructions": 421, "shuffles": 15}
    assert not [*broken_rules(tile)]
    assert not [*broken_rules({"kernel": "update_kernel", "call": "table.cu", "sm": 90,
                               "local": 0, "constant_loads": 0})]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"local": 24}, "spills: 24 bytes"),
        ({"loop": {"shuffles": 2}}, "shuffles in a loop of a sweep (2 times)"),
        ({"loop": {"shuffles": 2}, "sm": 120}, "shuffles in a loop"),
        ({"loop": {"loads": {"2": 32}}}, "accesses 2 bytes at a time"),
        ({"loop": {"loads": {"8": 8}}}, "accesses 8 bytes at a time"),
        ({"loop": {"stores": {"16": 3, "2": 1}, "instructions": 150}}, "accesses 2 bytes"),
        ({"loop": {"instructions": 280}}, "takes 8.8 instructions an element"),
        ({"loop": {"stores": {"16": 4}, "instructions": 200}}, "takes 6.2 instructions an element"),
        ({"kernel": LOOPED[0], "programs": 4096, "resident": 28}, "of which 3696 fit at once"),
        ({"kernel": LOOPED[0], "call": "cross_entropy 32768x1000 bf16", "programs": 1,
          "loop": {"instructions": 500}}, "takes 500 instructions a row, above 440"),
        ({"kernel": "update_kernel", "call": "table.cu", "constant_loads": 1},
         "has 1 loads that pass by the coherent caches"),
    ],
)  # fmt: skip
def test_each_rule_notices_its_fault(changes, complaint):
    (found,) = broken_rules(row(**changes))
    assert complaint in found


def test_what_was_fast_on_another_architecture_is_not_asked_of_it():
    assert not [*broken_rules(row(sm=120, loop={"instructions": 400}))]


def test_residents_follow_from_registers_warps_and_shared_memory():
    assert resident(Usage(64, 0, 0), 1) == 32
    assert resident(Usage(65, 0, 0), 1) == 28  # registers come in eights
    assert resident(Usage(128, 0, 0), 8) == 2
    assert resident(Usage(32, 0, 0), 8) == 8
    assert resident(Usage(32, 65536, 0), 8) == 3


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")
@pytest.mark.skipif(INTERPRETED, reason="compiles, which the interpreter does not")
def test_a_kernel_with_faults_is_caught(monkeypatch, request):
    """The whole way from a launch to the complaint: half of the registers, twice the programs."""
    from fastis.kernels.triton import geometry as triton_geometry

    def of(call):
        (launch,) = kernel_resources.recorded()[call][:1]
        return {"kernel": launch.kernel.__name__, "call": call, "sm": 90} | (
            kernel_resources.about(launch, 90)
        )

    name = "cross_entropy 32768x1000 bf16"
    request.addfinalizer(triton_geometry.row_launch.cache_clear)
    assert not [*broken_rules(of(name))]
    monkeypatch.setattr(triton_geometry, "TILE_REGISTERS", 32)
    triton_geometry.row_launch.cache_clear()
    assert any("spills" in complaint for complaint in broken_rules(of(name)))
    monkeypatch.setattr(triton_geometry, "TILE_REGISTERS", 255)
    monkeypatch.setattr(triton_geometry, "RESIDENT_WARPS", 8192)
    triton_geometry.row_launch.cache_clear()
    assert any("fit at once" in complaint for complaint in broken_rules(of(name)))
