"""What must be shown on an H200, in bfloat16 and with a cold cache, judged for each of our back ends on one run's rows.

A ratio counts only beside a peer of the same run. What a run has not measured is not judged, and says what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

from omnimamba_kernels.causal_conv1d import cases as conv_cases
from omnimamba_model import MambaConfig

from .counts import state_bytes
from .gpu_problems import models, prefill
from .published import AT_ONCE

Rows = list[dict[str, Any]]
Verdict = tuple[str, bool | None]
NOT_SLOWER, FIRST_CALL = 1.0, 3.0
TOKENS, FLAT, PICTURES, GIGABYTES = 1100.0, 1.05, 40.0, 4.6
MODELS = (models.DECODE, models.IMAGES, models.LAYER, models.TRAINING, prefill.PREFILL)
BASE = "torch, the base alone"
STEP, LORA, LORA_STEP = "1.3B, b 64, state float32", "8192-2048-8512-tasks2-r8", "1-2048-8512-tasks2-r8"
"""Cases of the decode step and of the LoRA linear layer."""
CONV = frozenset(case.name for case in conv_cases.GPU)
"""All cases of the convolution."""
NORM, FLOOR = "1.3B, 8 x 2048", "8 x 4096, 64 heads"
"""Cases of the gated norm, and of the scan held to its floor."""


@dataclass(frozen=True)
class Least:
    """What a back end must show: the scan against mamba_ssm at each case, forward and backward; shares of the copy
    speed and of floors; the LoRA linear layer over the product alone."""

    scan: dict[str, tuple[float, float]]
    copy: float
    lora_longer: float
    lora_step_longer: float | None = None
    scan_floor: float | None = None
    decode_floor: float | None = None


LEAST = {
    "triton": Least(
        {"8 x 2048, 64 heads": (4.0, 2.5), "1 x 2048, 64 heads": (2.5, 2.5), "4 x 32768, 64 heads": (7.0, 2.5)},
        0.85, 1.08,
    ),
    "cuda": Least(
        {"8 x 2048, 64 heads": (5.0, 3.0), "32 x 2048, 64 heads": (9.0, 3.0), "4 x 32768, 64 heads": (9.0, 3.0),
         "1 x 2048, 64 heads": (3.0, 3.0)},
        0.88, 1.05, 1.05, 0.6, 0.75,
    ),
}  # fmt: skip


def judge(rows: Rows, who: str) -> list[dict[str, Any]]:
    """Every claim about one of our back ends: what, required, measured, and whether it is met (None: not judged)."""
    found = []
    for what, required, verdict in _claims(LEAST[who]):
        measured, met = verdict(rows, who)
        found.append({"what": what, "required": required, "by": who, "measured": measured, "met": met})
    return found


def _claims(least: Least) -> list[tuple[str, str, Callable[[Rows, str], Verdict]]]:
    def faster(group: str, cases: Set[str], times: float, peer: str = "mamba_ssm") -> tuple[str, str, Callable]:
        which = "in all cases" if len(cases) > 1 else min(cases)
        return (f"{group} {which}, against {peer}", f"{times:g}x",
                lambda rows, who: _ratio(rows, who, group, cases, peer, times))  # fmt: skip

    def share(what: str, group: str, case: str, part: float, of: str = "the copy speed") -> tuple[str, str, Callable]:
        return f"{what}, share of {of}", f"{part:g}", _share(group, case, part)

    def longer(what: str, case: str, times: float) -> tuple[str, str, Callable]:
        what = f"lora_linear, {what}, 2048 to 8512, two tasks mixed, over the bare product"
        return what, f"at most {times:g}x", lambda rows, who: _lora(rows, who, case, times)

    claims = [faster("ssd_scan forward", {case}, times) for case, (times, _) in least.scan.items()]
    claims += [faster("ssd_scan backward", {case}, times) for case, (_, times) in least.scan.items()]
    if least.scan_floor:
        claims.append(share(f"ssd_scan forward {FLOOR}", "ssd_scan forward", FLOOR, least.scan_floor, "the floor"))
    for group in ("causal_conv1d forward", "causal_conv1d backward"):
        claims.append(share(group, group, "", least.copy))
        claims.append(faster(group, CONV, NOT_SLOWER, "causal_conv1d"))
    for group in ("gated_norm forward", "gated_norm backward"):
        claims.append(share(f"{group} {NORM}", group, NORM, least.copy))
    what = "state_update, 64 sequences x 64 heads, fp32 state"
    claims.append(share(what, "state_update", STEP, least.copy))
    claims.append(longer("8192 tokens", LORA, least.lora_longer))
    if least.lora_step_longer:
        claims.append(longer("one token", LORA_STEP, least.lora_step_longer))
    if least.decode_floor:
        what = "decode of the 1.3B shape, batch 1, weights' bytes at the copy speed over the time"
        claims.append((what, f"{least.decode_floor:g}", lambda rows, who: _weights(rows, who, least.decode_floor)))
    claims.append(
        ("1.3B, batch 1, tokens a second from 4K to 128K of context, the fewest", f"over {TOKENS:g}", _tokens)
    )
    claims.append(("1.3B, batch 1, time of a token at 128K over that at 4K", f"at most {FLAT:g}x", _flat))
    claims.append((f"1.3B, {AT_ONCE} images at once, images a second", f"over {PICTURES:g}", _pictures))
    claims.append(("1.3B, memory at 128K of context, 16 bits", f"under {GIGABYTES:g} GB", _memory))
    claims.append(("first call with a cold cache, the slowest", f"under {FIRST_CALL:g} s", _first_call))
    return claims


def _pick(rows: Rows, group: str, case: str, who: str) -> dict[str, dict[str, Any]]:
    """The timed rows of a group and contender by case, all of them where ``case`` is empty."""
    mine = [r for r in rows if (r["group"], r["who"]) == (group, who) and "seconds" in r]
    return {r["case"]: r for r in mine if case in ("", r["case"])}


def _ratio(rows: Rows, who: str, group: str, cases: Set[str], peer: str, least: float) -> Verdict:
    """The worst ratio. It fails a claim wherever it was measured, and meets one of several cases if all were."""
    case = "" if len(cases) > 1 else min(cases)
    own, others = _pick(rows, group, case, who), _pick(rows, group, case, peer)
    both = own.keys() & others.keys()
    if not both:
        return f"no time of {peer if own else who}", None
    ratio = min(others[name]["seconds"] / own[name]["seconds"] for name in both)
    missing = cases - both
    if missing and ratio >= least:
        return f"{ratio:.2f}x, without {len(missing)} of {len(cases)} cases", None
    return f"{ratio:.2f}x", ratio >= least


def _share(group: str, case: str, part: float) -> Callable[[Rows, str], Verdict]:
    def verdict(rows: Rows, who: str) -> Verdict:
        shares = [row["floor_share"] for row in _pick(rows, group, case, who).values()]
        return (f"{min(shares):.2f}", min(shares) >= part) if shares else (f"no time of {who}", None)

    return verdict


def _lora(rows: Rows, who: str, case: str, longest: float) -> Verdict:
    own, bare = _pick(rows, "lora_linear", case, who), _pick(rows, "lora_linear", case, BASE)
    if not own or not bare:
        return f"no time of {BASE if own else who}", None
    ratio = own[case]["seconds"] / bare[case]["seconds"]
    return f"{ratio:.3f}x", ratio <= longest


def _weights(rows: Rows, who: str, part: float) -> Verdict:
    """Of the decode step's bytes the weights' alone, which are all but those of the states."""
    row = _pick(rows, models.DECODE, f"1.3B, {models.context_case(models.CONTEXTS[0])}", who)
    if not row:
        return f"no time of {who}", None
    ((_, step),) = row.items()
    share = step["floor_share"] * (1 - 2 * state_bytes(MambaConfig()) / step["bytes"])
    return f"{share:.2f}", share >= part


def _decode(rows: Rows, who: str) -> list[dict[str, Any]]:
    """Our row at each context, in their order; empty unless all were timed."""
    found = _pick(rows, models.DECODE, "", who)
    mine = [found.get(f"1.3B, {models.context_case(context)}") for context in models.CONTEXTS]
    return mine if all(mine) else []


def _step(row: dict[str, Any]) -> float:
    """Seconds of a decode step, replayed as a graph where it was, as generation does."""
    return row.get("graph_seconds", row["seconds"])


def _tokens(rows: Rows, who: str) -> Verdict:
    mine = _decode(rows, who)
    if not mine:
        return f"no time of {who} at every context", None
    fewest = min(1 / _step(row) for row in mine)
    return f"{fewest:.0f}", fewest > TOKENS


def _flat(rows: Rows, who: str) -> Verdict:
    mine = _decode(rows, who)
    if not mine:
        return f"no time of {who} at every context", None
    ratio = _step(mine[-1]) / _step(mine[0])
    return f"{ratio:.3f}x", ratio <= FLAT


def _pictures(rows: Rows, who: str) -> Verdict:
    mine = [row for case, row in _pick(rows, models.IMAGES, "", who).items() if case.startswith("1.3B")]
    if not mine:
        return f"no time of {who}", None
    rate = AT_ONCE / mine[0]["seconds"]
    return f"{rate:.1f}", rate > PICTURES


def _memory(rows: Rows, who: str) -> Verdict:
    mine = _decode(rows, who)
    if not mine or "peak_bytes" not in mine[-1]:
        return f"no memory of {who}", None
    held = mine[-1]["peak_bytes"] / 1e9
    return f"{held:.2f} GB", held < GIGABYTES


def _first_call(rows: Rows, who: str) -> Verdict:
    mine = [r for r in rows if r["who"] == who and "first_call" in r and r["group"] not in MODELS]
    first = {f"{r['group']} {r['case']}": r["first_call"] for r in mine}
    if not first:
        return f"no call of {who}", None
    slowest = max(first, key=first.get)
    return f"{first[slowest]:.2f} s: {slowest}", first[slowest] < FIRST_CALL
