"""Reads the compiler's first form of a kernel and finds the 32-bit numbers in its addresses that may not fit.

Every integer has an interval: an argument that of its type or a narrower one that the host keeps, a program's number
[0, 2^31), what is carried through a loop in 32 bits is a position, +-(2^29 + 2^16). Sums, differences, products and
shifts in 32 bits that may leave 32 bits are followed to the addresses and comparisons that they reach.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product

POSITION = 2**29 + 2**16
WORD = 2**31 - 1
_NAME = r"%[\w-]+(?:#\d+)?"


@dataclass(frozen=True)
class Value:
    """What is known of a number: its interval, and the operations before it that may have wrapped."""

    low: int
    high: int
    wraps: frozenset[str] = frozenset()


def full(kind: str) -> Value:
    """Any number of the type; of what is no integer nothing is asked."""
    bits = int(m[1]) if (m := re.search(r"i(\d+)>?$", kind.strip())) else 64
    return Value(0, 1) if bits == 1 else Value(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def carried(kind: str) -> Value:
    return Value(-POSITION, POSITION) if re.search(r"i32>?$", kind.strip()) else full(kind)


def join(values: list[Value]) -> Value:
    wraps = frozenset().union(*(v.wraps for v in values))
    return Value(min(v.low for v in values), max(v.high for v in values), wraps)


def corners(operation: str, a: Value, b: Value) -> tuple[int, int]:
    """The least and the most of a sum, difference or product."""
    if operation == "addi":
        return a.low + b.low, a.high + b.high
    if operation == "subi":
        return a.low - b.high, a.high - b.low
    if operation == "shli":
        a, b = a, Value(2 ** max(0, min(b.low, 64)), 2 ** max(0, min(b.high, 64)))
    found = [i * j for i, j in product((a.low, a.high), (b.low, b.high))]
    return min(found), max(found)


class Reader:
    """One kernel, line by line; names belong to the region that they stand in."""

    def __init__(self, text: str, names: list[str], limits: dict[str, int]) -> None:
        self.faults: list[str] = []
        self.addresses = self.checked = 0
        self.scopes: list[dict[str, Value]] = [{}]
        self.regions: list[tuple[str, list[str], list[str], list[list[Value]]]] = []
        self.names, self.limits = names, limits
        for line in text.splitlines():
            self.read(line.strip())
        assert not self.regions, "a region does not end"

    def __getitem__(self, name: str) -> Value:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), Value(-(2**63), 2**63 - 1))

    def read(self, line: str) -> None:
        if line.startswith("#"):
            return
        if line.startswith("tt.func"):
            for name, (found, kind) in zip(self.names, re.findall(r"(%arg\d+): ([^,{]+)", line), strict=True):
                value = full(kind)
                limit = self.limits.get(name, value.high)
                self.scopes[0][found] = value if "ptr" in kind else Value(0, limit)
            self.open("func", [], [])
        elif line.startswith("}") and line.endswith("{"):
            self.scopes[-1] = {}
        elif line.startswith("}"):
            self.close(line)
        elif line.startswith("^bb"):
            self.scopes[-1] |= {n: carried(k) for n, k in re.findall(rf"({_NAME}): ([^,)]+)", line)}
        elif line.startswith(("scf.yield", "scf.condition")):
            self.leave(line)
        elif line.endswith("{") or line.endswith("({"):
            self.enter(line)
        elif " = " in line:
            result, right = line.split(" = ", 1)
            self.scopes[-1][result] = self.value(right, line)
        elif line.startswith("module"):
            self.open("module", [], [])

    def open(self, kind: str, results: list[str], kinds: list[str]) -> None:
        self.regions.append((kind, results, kinds, []))
        self.scopes.append({})

    def enter(self, line: str) -> None:
        """The head of a loop, a branch, a reduction."""
        left, _, right = line.partition(" = ") if re.match(rf"{_NAME}(?::\d+)? = ", line) else ("", "", line)
        name, _, count = left.partition(":")
        kinds = re.findall(r"[^(), ][^(),]*", right.rpartition("->")[2].split("  :")[0].split(" {")[0])
        kinds = kinds if "->" in right else []
        results = [f"{name}#{i}" for i in range(int(count))] if count else [name] * bool(name)
        kind = next((k for k in ("scf.for", "scf.while", "scf.if") if right.startswith(k)), "other")
        arguments = re.findall(rf"({_NAME}) = ({_NAME})", right)
        bounds = re.search(rf"scf\.for (?:unsigned )?({_NAME}) = ({_NAME}) to ({_NAME})", right)
        inside = {}
        if bounds:
            arguments = [pair for pair in arguments if pair[0] != bounds[1]]
            first, end = self[bounds[2]], self[bounds[3]]
            inside[bounds[1]] = Value(first.low, max(first.low, end.high - 1), first.wraps | end.wraps)
        for (argument, start), of in zip(arguments, kinds, strict=False):
            inside[argument] = carried(of)
            self.reached(self[start].wraps)
        self.open(kind, results, kinds)
        self.scopes[-1] |= inside

    def leave(self, line: str) -> None:
        values = [self[name] for name in re.findall(_NAME, line.partition(" : ")[0])]
        kind, _, _, yielded = self.regions[-1]
        if kind == "scf.if":
            yielded.append(values)
        else:
            for value in values:
                self.reached(value.wraps)

    def close(self, line: str) -> None:
        kind, results, kinds, yielded = self.regions.pop()
        self.scopes.pop()
        if kind == "scf.if" and yielded:
            values = [join(list(each)) for each in zip(*yielded, strict=True)]
        else:
            kinds = kinds or [line.rpartition("->")[2]]
            values = [carried(of) for of in kinds]
        self.scopes[-1] |= dict(zip(results, values, strict=False))

    def reached(self, wraps: frozenset[str]) -> None:
        self.faults += sorted(wraps - set(self.faults))

    def value(self, right: str, line: str) -> Value:
        operation = re.match(r'"?([\w.]+)', right)[1].removeprefix("arith.")
        if operation == "tt.load":
            right = re.sub(r"!tt.ptr<(\w+)(?:, \d+)?>", r"\1", right)
        kind = right.rpartition("->")[2] if "->" in right else right.rpartition(":")[2].rpartition(" to ")[2]
        operands = [self[name] for name in re.findall(_NAME, right)]
        if operation in ("addi", "subi", "muli", "shli"):
            low, high = corners(operation, *operands)
            self.checked += "i32" in kind
            value, wraps = full(kind), operands[0].wraps | operands[1].wraps
            if any(v.low == v.high and abs(v.low) > POSITION for v in operands):  # a factor or key of Philox
                return value
            if value.low <= low and high <= value.high:
                return Value(low, high, wraps)
            return Value(value.low, value.high, wraps | ({line} if "i32" in kind else set()))
        if operation == "tt.addptr":
            self.addresses += 1
            self.reached(operands[1].wraps)
            return full("i64")
        if operation == "cmpi":
            self.reached(operands[0].wraps | operands[1].wraps)
            return Value(0, 1)
        return self.other(operation, right, kind, operands)

    def other(self, operation: str, right: str, kind: str, operands: list[Value]) -> Value:
        """Operations that cannot leave 32 bits; their results' intervals."""
        if operation == "xori" or (operation == "constant" and 'dense<"' in right):  # a hash, no address
            return full(kind)
        followed = operation != "tt.load" and re.search(r"i\d+>?$", kind.strip())
        wraps = frozenset().union(*(v.wraps for v in operands)) if followed else frozenset()
        if operation == "constant":
            number = re.search(r"constant (?:dense<)?(-?\d+|true|false)\b", right)
            if number is None or not re.search(r"i\d+>?$", kind.strip()):
                return full(kind)
            known = {"true": 1, "false": 0}
            return Value(*[known.get(number[1]) if number[1] in known else int(number[1])] * 2)
        if operation == "tt.get_program_id":
            return Value(0, WORD)
        if operation == "tt.make_range":
            end, start = (int(re.search(rf"{w} = (\d+)", right)[1]) for w in ("end", "start"))
            return Value(start, end - 1)
        if operation in ("tt.splat", "tt.expand_dims", "tt.broadcast", "tt.reshape", "tt.trans", "extsi"):
            return operands[0]
        if operation == "select":
            return join(operands[1:])
        if operation == "tt.load":
            return Value(max(-1, full(kind).low), full(kind).high)
        a, b = (*operands, Value(0, 0), Value(0, 0))[:2]
        value = full(kind)
        if operation == "trunci":
            fits = value.low <= a.low and a.high <= value.high
            return a if fits else Value(value.low, value.high, wraps | {right})
        if operation in ("minsi", "maxsi"):
            of = min if operation == "minsi" else max
            return Value(of(a.low, b.low), of(a.high, b.high), wraps)
        if operation == "divsi":
            least = max(1, b.low)
            return Value(min(0, a.low // least), max(0, a.high // least), wraps)
        if operation == "remsi":
            return Value(0 if a.low >= 0 else -max(0, b.high - 1), min(max(0, a.high), max(0, b.high - 1)), wraps)
        return Value(value.low, value.high, wraps)
