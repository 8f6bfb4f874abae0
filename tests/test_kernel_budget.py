"""What compiled kernels cost: counted here without a GPU, and held against the checked-in budget."""

from __future__ import annotations

import csv
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mobie.errors import DataError, UnsupportedError
from mobie.kernels import budget
from mobie.kernels.budget import Figures

triton = pytest.importorskip("triton")
SAME_TRITON = pytest.mark.skipif(
    any(row.triton != triton.__version__ for row in budget.read_budget().values()),
    reason=f"the budget was counted with another Triton than {triton.__version__}, whose compiler differs",
)
LISTING = """
		Function : kernel
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                      /* 0x00000a00ff017b82 */
                                                                               /* 0x000fe20000000800 */
        /*0010*/              @!P0 EXIT ;                                      /* 0x000000000000894d */
        /*0020*/                   LDG.E.128 R8, desc[UR10][R20.64+0x20] ;     /* 0x0000000000000000 */
        /*0030*/                   HGMMA.64x16x16.F32 R24, R32, gdesc[UR4], R24 ; /* 0x0000000000000000 */
        /*0040*/              @P1  LOP3.LUT R9, R38, 0x8, RZ, 0xc0, !PT ;      /* 0x0000000000000000 */
        /*0050*/             @!UP0 BRA 0x20 ;                                  /* 0x0000000000000000 */
        /*0060*/                   STL [R1], R8 ;                              /* 0x0000000000000000 */
        /*0070*/                   IADD3 R1, R2, R3, RZ ;                      /* 0x0000000000000000 */
        /*0080*/                   IADD3 R1, R2, R3, RZ ;                      /* 0x0000000000000000 */
        /*0090*/                   IADD3 R1, R2, R3, RZ ;                      /* 0x0000000000000000 */
        /*00a0*/                   IADD3 R1, R2, R3, RZ ;                      /* 0x0000000000000000 */
        /*00b0*/               @P0 BRA 0x70 ;                                  /* 0x0000000000000000 */
        /*00c0*/               @P0 BRA 0x10 ;                                  /* 0x0000000000000000 */
        /*00d0*/                   LDL R8, [R1] ;                              /* 0x0000000000000000 */
        /*00e0*/                   BRA 0xe0;                                   /* 0x0000000000000000 */
"""


def test_counts_of_a_listing() -> None:
    """Instructions, predicated or not; two inner loops in an outer one; the trap at the end is no loop."""
    instructions = budget.parse(LISTING)
    assert [i.address for i in instructions] == list(range(0, 0xF0, 0x10))
    assert [i.name for i in instructions][1:4] == ["EXIT", "LDG.E.128", "HGMMA.64x16x16.F32"]
    loops = budget.innermost_loops(instructions)
    assert loops == ((0x20, 0x50), (0x70, 0xB0))
    compiled = budget.Compiled(instructions, 40, loops)
    assert len(compiled.main_loop()) == 4  # the one with the tensor cores, though the other is longer
    assert compiled.spills() == 2
    without = tuple(i for i in instructions if not budget.is_tensor_core(i))
    assert len(budget.Compiled(without, 40, loops).main_loop()) == 5
    with pytest.raises(DataError, match="several functions"):
        budget.parse(LISTING * 2)


def figures(**changes: float) -> Figures:
    return dataclasses.replace(Figures("kernel", 90, 2.0, 10.0, 100, 500, 96, 0, triton.__version__), **changes)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, 0),
        ({"registers": 104, "per_weight": 2.05, "loop_instructions": 103, "instructions": 510}, 0),
        ({"registers": 105}, 1),
        ({"per_weight": 2.07}, 1),
        ({"loop_instructions": 104}, 1),
        ({"instructions": 516}, 1),
        ({"spills": 1}, 1),
        ({"extra_per_weight": 10.4}, 1),
        ({"per_weight": 1.0, "loop_instructions": 50, "registers": 50}, 0),
    ],
)
def test_a_figure_above_the_budget_is_told(change: dict[str, float], told: int) -> None:
    found = budget.compare(figures(**change), {("kernel", 90): figures()})
    assert len(found) == told and all("kernel, sm_90" in text for text in found)


def test_a_budget_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row for kernel, sm_90"):
        budget.compare(figures(), {})
    with pytest.raises(DataError, match="counted with triton 1.0"):
        budget.compare(figures(), {("kernel", 90): figures(triton="1.0")})
    with pytest.raises(DataError, match=r"missing; write it with `python -m mobie kernels --write`"):
        budget.read_budget(tmp_path / "none.csv")


def test_the_file_round_trips(tmp_path: Path) -> None:
    rows = [figures(), figures(variant="other, one", spills=3)]
    budget.write_budget(rows, tmp_path / "budget.csv")
    assert list(budget.read_budget(tmp_path / "budget.csv").values()) == rows


def test_the_interpreter_is_refused() -> None:
    if triton.knobs.runtime.interpret:
        with pytest.raises(UnsupportedError, match="start without it"):
            budget.compiler()


def test_targets_of_the_binary_kernel() -> None:
    """In decode at most 3 instructions per weight with 16-bit and 1.5 with int8 activations; nothing ever spills."""
    rows = [row for row in budget.read_budget().values() if row.variant.startswith("binary_grouped")]
    assert {row.capability for row in rows} == set(budget.CAPABILITIES)
    assert all(row.spills == 0 for row in rows)
    decode = [row for row in rows if "16bit" in row.variant and "tile 64" not in row.variant]
    assert decode and all(0 < row.per_weight <= 3 for row in decode)
    integer = [row for row in rows if "int8" in row.variant and "tile 8" in row.variant]
    assert integer and all(0 < row.per_weight <= 1.5 for row in integer)


def run(code: str) -> str:
    """Run Python without Triton's interpreter, which is chosen when a kernel is defined."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@SAME_TRITON
def test_every_variant_has_its_row() -> None:
    names = run("from mobie.kernels.budget import *; print(*(v.name for v in registered()), sep='\\n')").splitlines()
    assert len(set(names)) == len(names)
    assert set(budget.read_budget()) == {(name, target) for name in names for target in budget.CAPABILITIES}


#: (targets, names): every kernel once on Hopper, the binary one as often as its code differs
CHECKED = (
    ((90,), r"^binary_grouped (16bit fp16 tile 16|(16bit|int8) bf16 tile (8|64) extra)$"),
    ((80, 89), r"^binary_grouped 16bit bf16 tile 16$"),
    ((90,), r"^(?!binary_grouped)"),
)


@SAME_TRITON
@pytest.mark.parametrize(("targets", "only"), CHECKED)
def test_compiled_kernels_keep_to_their_budget(targets: tuple[int, ...], only: str) -> None:
    command = ["kernels", "--check", "--only", only, *(f"--target={target}" for target in targets)]
    shown = run(f"from mobie.cli import main; main({command!r})")
    assert all(f" {target} " in shown for target in targets)


@SAME_TRITON
def test_weights_per_iteration_agree_with_the_tensor_cores() -> None:
    """The multiplications of the main loop's tensor-core instructions are those of the weights it is said to take."""
    code = """
import re
from mobie.kernels.budget import compile_variant, is_tensor_core, registered
for target, name in ((90, "binary_grouped 16bit fp16 tile 16"), (80, "binary_grouped int8 bf16 tile 8")):
    variant = next(v for v in registered() if v.name == name)
    products = 0  # per warp: rows · tokens · columns of an instruction; Hopper's are of four warps
    for instruction in filter(is_tensor_core, compile_variant(variant, target).main_loop()):
        kind, shape = instruction.name.split(".")[:2]
        sizes = {"16816": (16, 8, 16), "16832": (16, 8, 32)}.get(shape) or tuple(map(int, shape.split("x")))
        products += sizes[0] * sizes[1] * sizes[2] // (4 if "GMMA" in kind else 1)
    print(products * variant.warps // variant.constants["TILE"], variant.weights_per_iteration)
"""
    for line in run(code).splitlines():
        counted, said = line.split()
        assert counted == said


def test_no_row_of_the_file_is_there_twice() -> None:
    with budget.FILE.open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(budget.read_budget())
