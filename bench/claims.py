"""What the project promises of itself, each promise judged on the rows of one run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from . import published
from .machine import ROOT
from .measure import ENOUGH
from .results import FOLDER, Row, length_of, ratio_text, read

DEMO = ROOT / "demo-out" / "metrics.json"
KILLS = FOLDER / "kills" / "digits.json"
SCORES = (
    "t2i_accuracy",
    "mmu_accuracy",
    "held_out_loss t2i, nats a token",
    "held_out_loss mmu, nats a token",
    "classifier_accuracy",
    "ceiling_accuracy",
    "copied_fraction",
    "nearest_ratio",
    "seconds",
)
SSD_FORWARD, SSD_TRAINING = "ssd_scan forward", "ssd_scan forward + backward"
OMNIMAMBA_BYTES = 2 * (1_343_757_312 + 132_532_736)
"""OmniMamba's weights at the published size in 16 bits: the Mamba-2 with its tied table, and what stands around it
(image vocabulary, projector, caption path, positions, adapters)."""


@dataclass
class Claim:
    """``passed`` is None where the run has not what it takes to judge, and ``measured`` then says what is missing."""

    what: str
    required: str
    measured: str
    passed: bool | None


def growth_exponent(lengths: list[float], times: list[float]) -> float:
    """The k of time ~ length^k: the least-squares slope of log time over log length. ValueError below two points."""
    if len(lengths) != len(times) or len(lengths) < 2:
        raise ValueError(
            f"growth_exponent: got {len(lengths)} lengths and {len(times)} times, expected 2 or more of each"
        )
    x, y = [math.log(v) for v in lengths], [math.log(v) for v in times]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def exponents(rows: list[Row]) -> list[dict]:
    """For each layer and pass: the exponent over all lengths that were run, and over the longer half of them."""
    found = []
    for group in ("layer forward", "layer forward + backward"):
        for who in dict.fromkeys(row.who for row in rows if row.group == group):
            mine = [row for row in rows if (row.group, row.who) == (group, who) and row.seconds]
            timed = [(length_of(row.case), row.seconds) for row in mine]
            if len(timed) < 2:
                continue
            lengths, times = zip(*sorted(timed), strict=True)
            half = min(len(lengths) // 2, len(lengths) - 2)
            found.append(
                {
                    "group": group,
                    "who": who,
                    "lengths": list(lengths),
                    "exponent": growth_exponent(lengths, times),
                    "exponent_of_longer_half": growth_exponent(lengths[half:], times[half:]),
                }
            )
    return found


def judge(rows: list[Row], scores: dict[str, float]) -> list[dict]:
    """Every claim as plain data, in the order in which they are promised."""
    of_models = [*_model(rows), *_omnimamba(rows), _layer(rows), *_generation(rows), _flat(rows)]
    of_rows = [*_scan(rows), *_small(rows), *of_models]
    return [asdict(claim) for claim in [*_demo(scores), *of_rows, _kills()]]


def _pick(rows: list[Row], group: str, case: str = "", who: str = "", ours: bool = False) -> list[Row]:
    """The timed rows of a group whose case and contender contain these words; ``ours``: not the peers'."""
    return [
        r
        for r in rows
        if r.group == group and case in r.case and who in r.who and r.seconds and not (ours and r.times_ours != 1.0)
    ]


def _enough(rows: list[Row]) -> list[Row]:
    """Those with so many kept rounds that one bad moment does not decide."""
    return [row for row in rows if row.rounds >= ENOUGH]


def _least(what: str, required: float, values: list[float | None], unit: str, wanted: int = 1) -> Claim:
    """The smallest of the values against the least accepted; not judged where some are missing."""
    values = [v for v in values if v is not None]
    sign = f"{required:.2f}" if unit == "" else f"{required:g}{unit}"
    if len(values) < wanted:
        return Claim(
            what, f"at least {sign}", f"{len(values)} of {wanted} cases measured in {ENOUGH} rounds or more", None
        )
    text = " to ".join(sorted({f"{v:.2f}" if unit == "" else f"{v:.1f}{unit}" for v in (min(values), max(values))}))
    return Claim(what, f"at least {sign}", text, min(values) >= required)


def demo_scores() -> dict[str, float]:
    """What `make demo`, a program of its own, last left behind; empty where it has not run here."""
    try:
        scores = read(DEMO)
    except ValueError:  # nor is one that was killed while it wrote
        return {}
    losses = scores.get("held_out_loss")
    if isinstance(losses, dict):
        scores |= {f"held_out_loss {task}, nats a token": loss for task, loss in losses.items()}
    return {name: scores[name] for name in SCORES if _is_figure(scores.get(name))}


def _is_figure(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _demo(scores: dict[str, float]) -> list[Claim]:
    wanted = {"t2i_accuracy": 0.97, "mmu_accuracy": 0.98, "copied_fraction": 0.02, "seconds": 300}
    found = []
    for name, limit in wanted.items():
        most = name in ("copied_fraction", "seconds")
        value = scores.get(name)
        passed = None if value is None else bool(value <= limit if most else value >= limit)
        text = "no score of it in demo-out/metrics.json: run make demo" if value is None else f"{value:.3f}"
        found.append(Claim(f"make demo: {name}", f"at {'most' if most else 'least'} {limit}", text, passed))
    return found


def _scan(rows: list[Row]) -> list[Claim]:
    rows = [r for r in rows if r.case.startswith("1 x") and not r.narrow]  # the shapes that are promised
    forward = _pick(_enough(rows), SSD_FORWARD, who="transformers")
    training = _pick(_enough(rows), SSD_TRAINING, who="transformers")
    own = _pick(_enough(rows), SSD_FORWARD, ours=True)
    case = "1 x 4096, 24 heads"
    theirs = [r.peak_bytes for r in _pick(rows, SSD_TRAINING, case, "transformers") if r.peak_bytes]
    mine = [r.peak_bytes for r in _pick(rows, SSD_TRAINING, case, ours=True) if r.peak_bytes]
    memory = Claim(f"its peak memory at {case}, of transformers'", "under 1/3", "not measured", None)
    if mine and theirs:
        share = mine[0] / theirs[0]
        memory.measured, memory.passed = f"{share:.2f}", share < 1 / 3
    times = [r.times_ours for r in forward], [r.times_ours for r in training]
    return [
        _least("SSD forward, 4 shapes, against transformers", 12, times[0], "x", 4),
        _least("SSD forward, share of the fp32 matmul rate", 0.95, [r.floor_share for r in own], "", 4),
        _least("SSD forward + backward, against transformers", 6, times[1], "x", 4),
        memory,
    ]


def _small(rows: list[Row]) -> list[Claim]:
    rows = _enough(rows)
    weights = [
        r.floor_share
        for few in ("1 x", "4 x")
        for r in _pick(rows, "lora_linear", ours=True)
        if r.case.startswith(few) and r.case.endswith("bf16 weights")
    ]
    conv = [r for r in _pick(rows, "causal_conv1d forward", ours=True) if r.case == "1 x 4096 x 1792"]
    speed = _least("conv1d with SiLU, 1 x 4096 x 1792, share of the copy speed", 0.70, [r.far_share for r in conv], "")
    if conv and conv[0].floor_share:
        speed.measured += f" of DRAM's, {conv[0].floor_share:.2f} of a copy as large"
    return [
        _least("bf16 product 2048 to 8512, 1 and 4 rows, share of the DRAM read rate", 0.85, weights, "", 2),
        speed,
    ]


def _model(rows: list[Row]) -> list[Claim]:
    stopped = [r for r in rows if r.group == "130M decode" and "reordered" in r.who and r.reason]
    rows = _enough(rows)
    what = "130M, decode with int8 weights, against llama.cpp Q8_0, reordered or not, the faster"
    int8 = _least(what, 1.4, _llama(rows, "130M decode", "int8"), "x")
    int8.measured += "".join(f"; reordered: not timed, {row.reason}" for row in stopped)
    if stopped and int8.passed:  # the one that was not timed may be the faster
        int8.passed = None
    prefill = [r.times_ours for r in _pick(rows, "130M prefill", "2048", "transformers")]
    decode = [r.times_ours for r in _pick(rows, "130M decode", "bf16", "transformers")]
    floor = [r.floor_share for r in _pick(rows, "130M decode", "bf16", ours=True)]
    return [
        _least("130M, prefill of 2048, against transformers fp32", 2.6, prefill, "x"),
        _least("130M, decode with bf16 weights, against transformers fp32", 7, decode, "x"),
        _least("130M, decode with bf16 weights, share of the DRAM read rate", 0.65, floor, ""),
        _least("130M, prefill of 2048, against llama.cpp F32", 1.15, _llama(rows, "130M prefill", "2048"), "x"),
        _least("130M, decode with bf16 weights, against llama.cpp BF16", 1.3, _llama(rows, "130M decode", "bf16"), "x"),
        int8,
    ]


def _llama(rows: list[Row], group: str, case: str) -> list[float]:
    """Ours against the fastest of its ways that passed their checks, or nothing."""
    return sorted(r.times_ours for r in _pick(rows, group, case, "llama"))[:1]


def _omnimamba(rows: list[Row]) -> list[Claim]:
    """At the published size, bf16 weights: one image drawn, one question answered, tokens of an answer alone."""
    drawing, answering, decoding = (
        _pick(rows, "OmniMamba", f"1.3B: {did}", ours=True) for did in ("draws an image", "answers", "decodes")
    )
    floors = [
        _least(f"1.3B, {did}, share of the weights' floor", 0.60, [r.floor_share for r in _enough(found)], "")
        for did, found in (("drawing an image", drawing), ("tokens of an answer after its prefill", decoding))
    ]
    memory = Claim("1.3B, peak memory of drawing and of answering, of the weights", "under 1.3", "not measured", None)
    peaks = [next((r.peak_bytes for r in found if r.peak_bytes), None) for found in (drawing, answering)]
    if all(peaks):
        shares = [peak / OMNIMAMBA_BYTES for peak in peaks]
        memory.measured, memory.passed = " and ".join(f"{share:.2f}" for share in shares), max(shares) < 1.3
    return [*floors, memory]


def _layer(rows: list[Row]) -> Claim:
    slopes = {e["who"]: e["exponent"] for e in exponents(rows) if e["group"] == "layer forward"}
    against = _enough(_pick(rows, "layer forward", "1 x 32768", "attention"))
    claim = Claim("Mamba-2 layer at 32K tokens, against SDPA attention", "faster", "not measured", None)
    if against:
        ratio = against[0].times_ours
        claim.passed = ratio > 1
        claim.measured = f"{ratio:.1f}x; exponents " + ", ".join(f"{who} {k:.2f}" for who, k in slopes.items())
    return claim


def _generation(rows: list[Row]) -> list[Claim]:
    """In the fair protocol, and in the paper's."""
    found = []
    for kind, peer, least in (("with", published.CACHED, 1), ("without", published.UNCACHED, 100)):
        ratio = published.speed_ratio(rows if peer == published.UNCACHED else _enough(rows), peer)
        found.append(
            Claim(
                f"130M, generation of 16K tokens, against a Transformer {kind} a KV cache",
                "faster" if least == 1 else f"over {least}x",
                "not measured" if ratio is None else ratio_text(ratio),
                None if ratio is None else ratio > least,
            )
        )
    share = published.memory_share(rows, published.CACHED)
    text = "not measured" if share is None else f"{share:.3f}"
    what = "130M, memory at 23K tokens, of that of a Transformer with a KV cache"
    return [*found, Claim(what, "at most 0.37", text, None if share is None else share <= 0.37)]


def _flat(rows: list[Row]) -> Claim:
    short, long = (
        [r.peak_bytes for r in rows if (r.group, r.case) == ("memory", f"decode {tokens} tokens") and r.peak_bytes]
        for tokens in (1024, 131072)
    )
    claim = Claim("memory of decoding 128K tokens, of that of 1K", "within 0.01 of 1", "not measured", None)
    if short and long:
        ratio = long[0] / short[0]
        claim.measured = f"{ratio:.4f}, {(long[0] - short[0]) / (131072 - 1024):.0f} bytes a token"
        claim.passed = abs(ratio - 1) <= 0.01
    return claim


def in_time(seconds: float, minutes: float, quick: bool = False) -> Claim:
    """Whether a whole run ended when it should, or one with --quick."""
    what = f"a {'quick' if quick else 'whole'} run of the benchmarks"
    return Claim(what, f"at most {minutes:g} min", f"{seconds / 60:.1f} min", seconds <= 60 * minutes)


def _kills() -> Claim:
    """What `python -m bench.kills`, a program of its own, last found."""
    claim = Claim("kill -9 at 20 random moments of a run", "20 exact continuations", "run python -m bench.kills", None)
    if not KILLS.exists():
        return claim
    try:
        found = read(KILLS)
        count, torn = len(found["kills"]), sum(kill["while saving"] for kill in found["kills"])
        exact = bool(found["exact"])
    except (ValueError, KeyError, TypeError):
        claim.measured = f"{KILLS.name} is broken: run python -m bench.kills"
        return claim
    claim.measured = f"{count} kills, {torn} within a save, {'' if exact else 'not '}the same bits"
    claim.passed = exact and count >= 20 and torn > 0
    return claim
