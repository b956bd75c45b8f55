"""What one compiled kernel takes, read from its cubin: registers, stack and shared memory, and its instructions."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from triton import knobs
from triton.runtime.cache import get_cache_manager

from ..kernels.device import GPUS
from .limits import REGISTERS, warp_registers

# An instruction's address, its condition, its opcode and its operands.
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*)")
_TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")
_LOCAL = ("LDL", "STL")
# The number changes with the fields of Resources.
_RESOURCES_FILE = "fastllm_resources_2.json"
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
_LOADS, _STORES = ("LDG", "LDGSTS"), ("STG",)
_TENSOR_CORE = ("HGMMA", "HMMA", "QGMMA", "IMMA", "IGMMA", "DMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA")
# What bounds occupancy on sm_80, sm_90 and sm_100 alike: warps and blocks of a processor, beside a block's registers.
WARPS, BLOCKS = 64, 32
_DOUBLE = ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX", "DMMA")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: registers a thread, stack and shared memory in bytes, SASS opcode counts."""

    registers: int
    stack: int
    shared: int
    num_warps: int
    num_stages: int
    opcodes: dict[str, int]
    narrow_products: int = 0
    """32-bit products of two numbers that are known at the launch only: as offsets they may overflow."""
    looped_spills: int = 0
    """Of :attr:`local_accesses`, those inside a loop."""
    loop_length: int = 0
    """Instructions of the loops that have :attr:`looped_spills`, with the loops around them."""

    def count(self, *families: str) -> int:
        """Instructions whose opcode, up to its first dot, is one of ``families``."""
        return sum(n for opcode, n in self.opcodes.items() if opcode.partition(".")[0] in families)

    @property
    def local_accesses(self) -> int:
        """Loads and stores of thread-local memory."""
        return self.count(*_LOCAL)

    @property
    def untouched_stack(self) -> bool:
        """Whether there is a stack that no instruction loads from or stores to."""
        return self.stack > 0 and not self.local_accesses

    @property
    def spills(self) -> int:
        """:attr:`local_accesses`; at least 1 where there is a stack."""
        return max(self.local_accesses, int(self.stack > 0))

    @property
    def doubles(self) -> int:
        """fp64 arithmetic and conversions."""
        return self.count(*_DOUBLE) + sum(n for opcode, n in self.opcodes.items() if ".F64" in opcode)

    @property
    def tensor_core(self) -> int:
        return self.count(*_TENSOR_CORE)

    @property
    def tma(self) -> int:
        """Bulk tensor copies (UTMALDG, UTMASTG, UTMAREDG)."""
        return self.count("UTMALDG", "UTMASTG", "UTMAREDG")

    def widths(self, *families: str) -> dict[int, int]:
        """Bits per thread -> instructions, of the memory operations ``families``."""
        found: Counter[int] = Counter()
        for opcode, n in self.opcodes.items():
            family, *modifiers = opcode.split(".")
            if family in families:
                found[next((_WIDTHS[m] for m in modifiers if m in _WIDTHS), 32)] += n
        return dict(sorted(found.items(), reverse=True))

    @property
    def load_widths(self) -> dict[int, int]:
        return self.widths(*_LOADS)

    @property
    def store_widths(self) -> dict[int, int]:
        return self.widths(*_STORES)

    def occupancy(self, arch: int) -> float:
        """Share of a processor's warps that can be resident, bounded by registers, shared memory and blocks."""
        # 1 KB of shared memory a block is the system's, and a processor has 1 KB more than a block can have.
        by_registers = REGISTERS // warp_registers(self.registers) // self.num_warps
        by_shared = (GPUS[arch].shared_per_block + 1024) // (self.shared + 1024)
        by_warps = WARPS // self.num_warps
        return min(by_registers, by_shared, by_warps, BLOCKS) * self.num_warps / WARPS


_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


def _cuobjdump(option: str, cubin: Path) -> str:
    tool = knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, option, str(cubin)], check=True, capture_output=True, text=True).stdout


class Instruction(NamedTuple):
    """One instruction of a kernel: its address, its opcode, and the addresses of those that may follow it."""

    address: int
    opcode: str
    then: tuple[int, ...]


def instructions(sass: str) -> list[Instruction]:
    """What ``cuobjdump -sass`` prints of one kernel."""
    lines = _INSTRUCTION.findall(sass)
    found = []
    for (address, condition, opcode, operands), following in zip(lines, [*lines[1:], None], strict=True):
        family = opcode.partition(".")[0]
        target = _TARGET.search(operands) if family == "BRA" else None
        then = [] if target is None else [int(target[1], 16)]
        # A branch may have its condition among its operands.
        always = not condition and (family in ("EXIT", "RET") or (family == "BRA" and "," not in operands))
        if following is not None and not always:
            then.append(int(following[0], 16))
        found.append(Instruction(int(address, 16), opcode, tuple(then)))
    return found


def _reached(start: int, edges: Mapping[int, Iterable[int]]) -> set[int]:
    """The addresses that a path of at least one edge leads to."""
    found, waiting = set(), [start]
    while waiting:
        new = set(edges.get(waiting.pop(), ())) - found
        found |= new
        waiting += new
    return found


def spills_in_loops(code: list[Instruction]) -> dict[str, int]:
    """The fields ``looped_spills`` and ``loop_length`` of :class:`Resources`.

    An instruction is in a loop that leads back to itself: code that lies behind the kernel's end, where it waits for a
    copy, is part of one or of none by what follows it, not by where it lies.
    """
    after = {one.address: one.then for one in code}
    before: dict[int, list[int]] = {}
    for one in code:
        for address in one.then:
            before.setdefault(address, []).append(one.address)
    looped, loops = 0, set()
    for one in code:
        if one.opcode.partition(".")[0] in _LOCAL and one.address in (ahead := _reached(one.address, after)):
            looped += 1
            loops |= ahead & _reached(one.address, before)
    return {"looped_spills": looped, "loop_length": len(loops)}


def read_resources(compiled) -> Resources:
    """Registers, stack, shared memory and opcodes of a kernel that Triton compiled; Triton's cache keeps them too."""
    cache = get_cache_manager(compiled.hash)
    known = cache.get_file(_RESOURCES_FILE)
    if known is not None:
        return Resources(**json.loads(Path(known).read_text()))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        used = [tuple(map(int, m)) for m in _RESOURCES.findall(_cuobjdump("--dump-resource-usage", cubin))]
        code = instructions(_cuobjdump("-sass", cubin))
        opcodes = Counter(one.opcode for one in code)
    if not used or not opcodes:
        raise RuntimeError(f"cuobjdump found no code in the cubin of {compiled.name}")
    found = Resources(
        registers=max(registers for registers, _ in used),
        stack=max(stack for _, stack in used),
        shared=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        num_stages=compiled.metadata.num_stages,
        opcodes=dict(sorted(opcodes.items())),
        narrow_products=narrow_products(compiled.asm.get("ttir", "")),
        **spills_in_loops(code),
    )
    cache.put(json.dumps(asdict(found)), _RESOURCES_FILE, binary=False)
    return found


_ASSIGNED = re.compile(
    r"^\s*(%[\w#.]+) = (arith\.constant|tt\.splat|arith\.muli)\b *(%[\w#.]+)?,? *(%[\w#.]+)?(.*)", re.MULTILINE
)


def narrow_products(ttir: str) -> int:
    """See :class:`Resources`. A product with a constant of the kernel, such as its tile's size, is none."""
    constants, found = set(), 0
    for name, operator, a, b, rest in _ASSIGNED.findall(ttir):
        if operator == "arith.constant" or (operator == "tt.splat" and a in constants):
            constants.add(name)
        elif operator == "arith.muli" and not {a, b} & constants:
            found += bool(re.search(r": (?:tensor<[\dx]*x)?i32", rest))
    return found
