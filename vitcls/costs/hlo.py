"""The text of a compiled program, XLA's HLO: its instructions, and how often each is executed."""

import re
from typing import NamedTuple

# `%name (parameters) -> type {` or `ENTRY %name ...` opens a computation.
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
# `%name = shapes opcode(operands), attributes`.
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
    r"|branch_computations=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_OPERAND = re.compile(r"%([\w.-]+)")


class Instruction(NamedTuple):
    """One line: whether it is the result, `name = shapes opcode(rest`."""

    is_root: bool
    name: str
    shapes: str
    opcode: str
    rest: str

    def operands(self) -> list[str]:
        """Returns the names of its operands."""
        return _OPERAND.findall(self.rest.partition(")")[0])

    def called(self) -> list[str]:
        """Returns the names of the computations that it executes."""
        found = [one or several for one, several in _CALLED.findall(self.rest)]
        return [name.strip().lstrip("%") for name in ",".join(found).split(",") if name]


Computations = dict[str, list[Instruction]]


def read_computations(text: str) -> tuple[Computations, str]:
    """Returns the instructions of all computations, and the name of the first to be executed."""
    computations, entry, current = {}, "", []
    for line in text.splitlines():
        if opened := _COMPUTATION.match(line):
            current = computations[opened[2]] = []
            entry = opened[2] if opened[1] else entry
        elif found := _INSTRUCTION.match(line):
            current.append(Instruction(bool(found[1]), *found.groups()[1:]))
    return computations, entry


def executions(computations: Computations, entry: str, num_passes: int) -> dict[str, int]:
    """How often each computation is executed; every branch counts as taken.

    Args:
      computations: See `read_computations`.
      entry: Name of the first.
      num_passes: Rounds of loops without a count in the text.
    """
    times: dict[str, int] = {}

    def execute(name: str, count: int) -> None:
        times[name] = times.get(name, 0) + count
        for instruction in computations.get(name, ()):
            # -update and -done name the computation that -start executes.
            if instruction.opcode.endswith(("-update", "-done")):
                continue
            inner = count
            if instruction.opcode == "while":
                inner *= _trips(instruction, computations) or num_passes
            for called in instruction.called():
                execute(called, inner)

    execute(entry, 1)
    return times


def _trips(loop: Instruction, computations: Computations) -> int | None:
    """Rounds of a loop: as XLA says, or what its condition compares with, as on TPU; or None."""
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    condition = _CONDITION.search(loop.rest)
    limits = [
        int(one.rest.partition(")")[0])
        for one in computations.get(condition[1] if condition else "", ())
        if one.opcode == "constant" and one.shapes.startswith("s32[]")
    ]
    return limits[0] if len(limits) == 1 else None


def itemsize(dtype: str) -> float:
    """Bytes of an element: the first number of f32, bf16, u8, s4, f8e4m3fn are its bits."""
    return 1 if dtype == "pred" else int(re.search(r"\d+", dtype)[0]) / 8
