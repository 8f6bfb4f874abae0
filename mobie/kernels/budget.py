"""How many instructions, registers and spills a kernel costs, counted in code compiled here, without a GPU.

Triton compiles for any NVIDIA GPU on a CPU, and its wheel holds the disassembler. `budget.csv` keeps the figures of
every registered kernel; a test compiles again and compares, so that a change that makes a kernel dearer shows.

    main loop   the innermost loop (a backward branch that encloses no other) that comes first among those with
                tensor-core instructions; without any such, the longest innermost loop
    instructions per weight = instructions of the main loop · 32 · warps / weights of one pass of it by one program

A warp's instruction counts for its 32 threads; a predicated instruction counts whether it is executed or not; a
tensor-core instruction counts as one. So this is what a scheduler has to issue, not time.
"""

from __future__ import annotations

import csv
import importlib
import io
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

from mobie.errors import DataError, UnsupportedError
from mobie.storage import write_text

FILE = Path(__file__).with_name("budget.csv")
CAPABILITIES = (80, 89, 90)
THREADS_PER_WARP = 32
#: modules with a function `variants() -> list[Variant]`; a module without one is left out
MODULES = tuple(
    f"mobie.kernels.triton_ops.{name}"
    for name in (
        "binary_grouped",
        "panel",
        "binary_linear",
        "dense_grouped",
        "route",
        "rms_norm",
        "group_pairs",
        "swiglu",
    )
)


@dataclass(frozen=True)
class Variant:
    """A kernel with the types and constants that it is compiled with.

    name:       unique; the row of `budget.csv`.
    kernel:     a `triton.jit` function.
    signature:  type of every argument that is no constant: "*bf16", "i32", …; pointers are to multiples of 16 bytes.
    constants:  value of every `constexpr` argument.
    weights_per_iteration: weights that one pass of the main loop of one program takes; None where it takes none.
    divisible:  integer arguments that are multiples of 16.
    extra_weights_per_iteration: the same of a second loop with tensor-core instructions, behind the main loop.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int
    stages: int
    weights_per_iteration: int | None = None
    divisible: Sequence[str] = ()
    extra_weights_per_iteration: int | None = None


@dataclass(frozen=True)
class Figures:
    """One row of the budget. per_weight, extra_per_weight: instructions per weight of the main loop and of the second
    loop, 0 where there is none; spills: instructions that spill."""

    variant: str
    capability: int
    per_weight: float
    extra_per_weight: float
    loop_instructions: int
    instructions: int
    registers: int
    spills: int
    triton: str


@dataclass(frozen=True)
class Instruction:
    """address: in bytes; name: with its modifiers, as `HMMA.16816.F32`; target: address that a branch goes to."""

    address: int
    name: str
    target: int | None = None


@dataclass(frozen=True)
class Compiled:
    """Machine code of a variant, disassembled."""

    instructions: tuple[Instruction, ...]
    registers: int
    loops: tuple[tuple[int, int], ...] = field(default=())

    def within(self, loop: tuple[int, int]) -> list[Instruction]:
        """Instructions of a loop, its branch too."""
        return [i for i in self.instructions if loop[0] <= i.address <= loop[1]]

    def tensor_loops(self) -> list[list[Instruction]]:
        """Innermost loops with tensor-core instructions, in order."""
        bodies = [self.within(loop) for loop in self.loops]
        return [body for body in bodies if any(is_tensor_core(i) for i in body)]

    def main_loop(self) -> list[Instruction]:
        """Instructions of the main loop (see the head of this file); none where there is no loop."""
        return next(iter(self.tensor_loops()), max(map(self.within, self.loops), key=len, default=[]))

    def spills(self) -> int:
        """Loads and stores of registers that did not fit, and of arrays in local memory."""
        return sum(i.name.split(".")[0] in ("LDL", "STL") for i in self.instructions)


def is_tensor_core(instruction: Instruction) -> bool:
    """Whether it multiplies matrices: HMMA, IMMA, and Hopper's HGMMA, IGMMA."""
    return instruction.name.split(".")[0] in ("HMMA", "IMMA", "HGMMA", "IGMMA")


_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)([^;]*);")
_ADDRESS = re.compile(r"0x([0-9a-f]+)\s*$")
_REGISTERS = re.compile(r"REG:(\d+)")


def parse(listing: str) -> tuple[Instruction, ...]:
    """Instructions of a listing of `cuobjdump -sass` with one function, in order.

    Raises:
        DataError: more than one function: addresses would be ambiguous.
    """
    if listing.count("Function :") > 1:
        raise DataError("the listing has several functions, expected one kernel that calls none")
    found = []
    for address, name, operands in _INSTRUCTION.findall(listing):
        target = _ADDRESS.search(operands) if name.split(".")[0] == "BRA" else None
        found.append(Instruction(int(address, 16), name, int(target[1], 16) if target else None))
    return tuple(found)


def innermost_loops(instructions: Iterable[Instruction]) -> tuple[tuple[int, int], ...]:
    """(first, last) addresses of the loops that enclose no other, in order.

    A branch to itself, the trap that closes a kernel, is none.
    """
    loops = {(i.target, i.address) for i in instructions if i.target is not None and i.target < i.address}
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return tuple(sorted(inner))


def compile_variant(variant: Variant, capability: int) -> Compiled:
    """Compile for a compute capability and disassemble.

    Raises:
        UnsupportedError: Triton runs its interpreter, or is not the build for NVIDIA GPUs.
    """
    triton = compiler()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(variant.kernel.arg_names)
    missing = set(names) - set(variant.signature) - set(variant.constants)
    if missing:
        raise ValueError(f"{variant.name}: no type and no constant for {', '.join(sorted(missing))}")
    types = {name: "constexpr" if name in variant.constants else variant.signature[name] for name in names}
    aligned = [n for n in names if types[n].startswith("*") or n in variant.divisible]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(variant.kernel, types, dict(variant.constants), attributes)
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        binary = triton.compile(source, GPUTarget("cuda", capability, THREADS_PER_WARP), options).asm["cubin"]
        return disassemble(binary, Path(folder) / "kernel.cubin")


def disassemble(binary: bytes, path: Path) -> Compiled:
    """Instructions and registers of a compiled kernel; `path` is a file to write it to."""
    path.write_bytes(binary)
    instructions = parse(_cuobjdump("-sass", path))
    registers = _REGISTERS.search(_cuobjdump("-res-usage", path))
    if not instructions or not registers:
        raise DataError("cuobjdump of the triton wheel printed no instructions or no registers; another version?")
    return Compiled(instructions, int(registers[1]), innermost_loops(instructions))


def _cuobjdump(option: str, path: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, option, path], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def compiler() -> Any:
    """The module triton, where it can compile for NVIDIA GPUs; else UnsupportedError."""
    try:
        import triton
        from triton.backends import backends
    except ImportError as error:
        raise UnsupportedError(f"kernels cannot be compiled: {error}; install triton (Linux)") from error
    if "nvidia" not in backends:
        raise UnsupportedError("kernels cannot be compiled: this triton has no NVIDIA backend")
    if triton.knobs.runtime.interpret:
        raise UnsupportedError("kernels cannot be compiled while TRITON_INTERPRET is set: start without it")
    return triton


def measure(variant: Variant, capability: int) -> Figures:
    """Compile one variant and count."""
    compiled = compile_variant(variant, capability)
    main = compiled.main_loop()
    second = compiled.tensor_loops()[1] if variant.extra_weights_per_iteration else []
    return Figures(
        variant=variant.name,
        capability=capability,
        per_weight=_per_weight(main, variant.warps, variant.weights_per_iteration),
        extra_per_weight=_per_weight(second, variant.warps, variant.extra_weights_per_iteration),
        loop_instructions=len(main),
        instructions=len(compiled.instructions),
        registers=compiled.registers,
        spills=compiled.spills(),
        triton=compiler().__version__,
    )


def _per_weight(loop: Sequence[Instruction], warps: int, weights: int | None) -> float:
    return round(len(loop) * THREADS_PER_WARP * warps / weights, 3) if weights else 0.0


def registered() -> list[Variant]:
    """Variants of all modules of kernels."""
    compiler()
    modules = [importlib.import_module(name) for name in MODULES]
    return [variant for module in modules for variant in getattr(module, "variants", list)()]


def read_budget(path: Path = FILE) -> dict[tuple[str, int], Figures]:
    """The checked-in figures by variant and compute capability."""
    if not path.exists():
        raise DataError(f"{path} is missing; write it with `python -m mobie kernels --write`")
    remedy = "restore it, or write it with `python -m mobie kernels --write`"
    types = {f.name: {"int": int, "float": float}.get(str(f.type), str) for f in fields(Figures)}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file, strict=True))
        rows = [Figures(**{name: types[name](value) for name, value in line.items()}) for line in lines]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(f"{path}: not a table of figures of kernels ({error!r}); {remedy}") from error
    return {(row.variant, row.capability): row for row in rows}


def write_budget(rows: Sequence[Figures], path: Path = FILE) -> None:
    """Write the figures, in the order of the variants."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(f.name for f in fields(Figures))
    writer.writerows(astuple(row) for row in rows)
    write_text(path, text.getvalue())


#: how far a figure may be above the budget: instructions move by a few when an unrelated line moves
SLACK_INSTRUCTIONS = 1.03
SLACK_REGISTERS = 8


HEADER = f"{'variant':48} {'sm':>3} {'per weight':>10} {'extra':>6} {'loop':>5} {'all':>5} {'regs':>4} {'spills':>6}"


def as_line(row: Figures) -> str:
    """One row for people, under `HEADER`."""
    weight = f"{row.per_weight:10.2f}" if row.per_weight else f"{'-':>10}"
    extra = f"{row.extra_per_weight:6.2f}" if row.extra_per_weight else f"{'-':>6}"
    counts = f"{row.loop_instructions:5} {row.instructions:5} {row.registers:4} {row.spills:6}"
    return f"{row.variant:48} {row.capability:3} {weight} {extra} {counts}"


def compare(now: Figures, expected: Mapping[tuple[str, int], Figures]) -> list[str]:
    """`regressions` against the row of the same variant and target.

    Raises:
        DataError: no such row, or it was counted with another version of Triton, whose compiler differs.
    """
    budget = expected.get((now.variant, now.capability))
    remedy = "write it with `python -m mobie kernels --write`"
    if budget is None:
        raise DataError(f"{FILE.name} has no row for {now.variant}, sm_{now.capability}; {remedy}")
    if budget.triton != now.triton:
        raise DataError(f"{FILE.name} was counted with triton {budget.triton}, here is {now.triton}; {remedy}")
    return regressions(now, budget)


def regressions(now: Figures, budget: Figures) -> list[str]:
    """What is dearer than the budget allows, in words."""
    limits = {
        "per_weight": budget.per_weight * SLACK_INSTRUCTIONS,
        "extra_per_weight": budget.extra_per_weight * SLACK_INSTRUCTIONS,
        "loop_instructions": budget.loop_instructions * SLACK_INSTRUCTIONS,
        "instructions": budget.instructions * SLACK_INSTRUCTIONS,
        "registers": budget.registers + SLACK_REGISTERS,
        "spills": budget.spills,
    }
    return [
        f"{now.variant}, sm_{now.capability}: {name} is {getattr(now, name)}, budget {getattr(budget, name)}"
        for name, limit in limits.items()
        if getattr(now, name) > limit
    ]
