"""Whether a compiled Triton kernel overwrites shared memory that an asynchronous product still reads.

A pipelined loop loads tiles ahead into the slots of a ring in shared memory. On Hopper and Blackwell the matrix
units read slots after their instruction was issued, so that the ring needs a slot for each tile on its way and for
each product still pending. Triton's pipeliner has miscounted both within a loop (a tile with a second user) and
across loops (the next one's first loads ahead of the wait). So the kernel's TTGIR is executed, as far as slots go:
integers, loops, loads into slots, products and waits, with everything else unknown.
"""

import operator
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

TRIPS = 8  # of a loop with unknown bounds: more than any ring has slots
NAME = r"%[\w#-]+"
COMPARE = {"eq": operator.eq, "ne": operator.ne}
COMPARE |= {sign + name: getattr(operator, name) for sign in "su" for name in ("lt", "le", "gt", "ge")}
ARITHMETIC = {"addi": operator.add, "subi": operator.sub, "muli": operator.mul, "remsi": operator.mod}
PRODUCT = re.compile(rf"\.(?:warp_group_dot|tc_gen5_mma) ({NAME}), ({NAME})")


@dataclass
class Op:
    """A line of the text, and the lines of its region."""

    text: str
    body: list["Op"] = field(default_factory=list)

    @property
    def results(self) -> list[str]:
        """%a of "%a = ...", %a#0 and %a#1 of "%a:2 = ..."."""
        found = re.match(rf"({NAME})(?::(\d+))? = ", self.text)
        if not found:
            return []
        return [f"{found[1]}#{i}" for i in range(int(found[2]))] if found[2] else [found[1]]


@dataclass(frozen=True)
class Slot:
    ring: str
    index: int | None  # None: not known, and taken for any


@dataclass(frozen=True)
class Pipeline:
    """What the matrix units read while they work behind the program's back; 0 where they do not.

    slots: of the smallest ring that they read. pending: most products that were issued and not waited for when a
    slot was filled. hazards: a sentence for each load that may overwrite what a pending product reads.
    """

    slots: int
    pending: int
    hazards: list[str]


def pipeline(ttgir: str) -> Pipeline:
    machine = _Machine()
    machine.run(_parse(ttgir))
    if PRODUCT.search(ttgir) and not machine.products:
        return Pipeline(0, 0, ["no product was reached."])
    slots = min((len(machine.filled[ring]) for ring in machine.read), default=0)
    return Pipeline(slots, machine.most_pending, sorted(machine.found))


def _parse(text: str) -> list[Op]:
    root = Op("")
    stack = [root]
    for line in (line.strip() for line in text.splitlines()):
        if line.startswith("}") and len(stack) > 1:
            stack.pop()
        op = Op(line)
        stack[-1].body.append(op)
        if line.endswith("{"):
            stack.append(op)
    return root.body


class _Machine:
    def __init__(self) -> None:
        self.values: dict[str, object] = {}  # names that are known: integers, truths, slots
        self.pending: list[tuple[Slot, ...]] = []  # the operands of products, the oldest first
        self.products = 0  # that were issued, of any kind
        self.most_pending = 0
        self.filled: defaultdict[str, set[int | None]] = defaultdict(set)  # slots, by ring
        self.read: set[str] = set()  # rings, by products that are not waited for at once
        self.found: set[str] = set()

    def run(self, ops: list[Op]) -> list[str]:
        """The names that the region yields."""
        yielded: list[str] = []
        for op in ops:
            if " scf.for " in f" {op.text}":
                self._loop(op)
            elif op.text.startswith("scf.yield"):
                yielded = list(_names(op.text.split(" : ")[0]))
            else:
                self._step(op)
                self.run(op.body)
        return yielded

    def _loop(self, op: Op) -> None:
        counter, low, high, step = re.search(
            rf"scf\.for ({NAME}) = ({NAME}) to ({NAME}) step ({NAME})", op.text
        ).groups()
        arguments = re.search(r"iter_args\((.*?)\) ->", op.text)
        pairs = re.findall(rf"({NAME}) = ({NAME})", arguments[1]) if arguments else []
        first, last, by = (self.values.get(name) for name in (low, high, step))
        known = all(type(bound) is int for bound in (first, last, by))
        now = [self.values.get(start) for _, start in pairs]
        for value in range(first, last, by) if known else [None] * TRIPS:
            self.values[counter] = value
            self.values |= {name: carried for (name, _), carried in zip(pairs, now, strict=True)}
            now = [self.values.get(name) for name in self.run(op.body)]
        self.values |= dict(zip(op.results, now, strict=False))

    def _step(self, op: Op) -> None:
        text, values = op.text, self.values
        result = next(iter(op.results), None)
        if found := re.search(r"arith\.constant (-?\d+|true|false)(?: : i\d+)?(?: loc|$)", text):
            values[result] = {"true": True, "false": False}.get(found[1]) if found[1][0] in "tf" else int(found[1])
        elif found := re.search(rf"arith\.(\w+) ({NAME}), ({NAME}) ", text):
            values[result] = self._apply(ARITHMETIC.get(found[1]), found[2], found[3])
        elif found := re.search(rf"arith\.cmpi (\w+), ({NAME}), ({NAME}) ", text):
            values[result] = self._apply(COMPARE[found[1]], found[2], found[3])
        elif found := re.search(rf"arith\.select ({NAME}), ({NAME}), ({NAME}) ", text):
            chosen = values.get(found[1])
            values[result] = values.get(found[2] if chosen else found[3]) if chosen is not None else None
        elif found := re.search(rf"memdesc_(?:index|subview) ({NAME})\[({NAME})", text):
            values[result] = Slot(found[1], values.get(found[2]))
        elif found := re.search(rf"(?:memdesc_\w+|tt\.trans) ({NAME}) ", text):
            values[result] = values.get(found[1])
        elif re.search(r"(?:local|tmem)_alloc\b", text):
            values[result] = Slot(result, 0)
            if re.search(rf"_alloc {NAME}", text):
                self._write(values[result])
        elif found := re.search(rf"(?:async_copy_global_to_local|local_store) {NAME}, ({NAME}) ", text):
            self._write(values.get(found[1]))
        elif found := PRODUCT.search(text):
            self.products += 1
            if "isAsync = true" in text or "is_async" in text:
                in_memory = found.groups()[" : tensor<" in text :]  # the first may be in registers
                operands = [values.get(name) for name in in_memory]
                self.pending.append(tuple(operand for operand in operands if isinstance(operand, Slot)))
                self.read |= {slot.ring for slot in self.pending[-1]}
                if len(self.pending[-1]) < len(operands):
                    self.found.add("an operand of a product cannot be followed to its slot.")
        elif "warp_group_dot_wait" in text:
            names = re.search(r"warp_group_dot_wait (.*?) \{pendings = (\d+)", text)
            left = int(names[2])
            self.pending = self.pending[len(self.pending) - left :] if left < len(self.pending) else self.pending
            for name, waited in zip(op.results, _names(names[1]), strict=False):
                values[name] = values.get(waited)
        elif "ttng.wait_barrier" in text:  # one barrier a product, waited for in their order
            self.pending = self.pending[1:]

    def _apply(self, function, *names: str):
        operands = [self.values.get(name) for name in names]
        return None if function is None or None in operands else function(*operands)

    def _write(self, slot: object) -> None:
        self.most_pending = max(self.most_pending, len(self.pending))
        if isinstance(slot, Slot):
            self.filled[slot.ring].add(slot.index)
        for operands in self.pending:
            for read in operands:
                if isinstance(slot, Slot) and slot.ring == read.ring and None in (slot.index, read.index):
                    self.found.add(f"a load into {slot.ring} cannot be told apart from what a product reads.")
                elif slot == read:
                    self.found.add(f"a load overwrites {slot.ring} while a product still reads it.")


def _names(text: str) -> Iterator[str]:
    return (found[0] for found in re.finditer(NAME, text))
