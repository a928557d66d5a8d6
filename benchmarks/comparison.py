"""The records of benchmarks/compare.py as Markdown: rivals and ours, ours at shares of the plain peak, prediction and truth."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from itertools import groupby

from benchmarks.cases import Record, markdown, mib

Columns = dict[str, Callable[[Record], str]]


def tables(records: list[Record]) -> str:
    """All tables, and below them what did not apply and what failed."""
    measured = [record for record in records if "eager" in record]
    rivals = [record for record in measured if "rival" in record]
    shares = [record for record in measured if "rival" not in record]
    plans = [record for record in measured if "predicted_bytes" in record.get("ours", ()) and not is_compiled(record)]
    parts = [
        ("What people use, and ours at the same peak", markdown(RIVALS, rivals)),
        ("Ours at shares of the plain peak", markdown(SHARES, shares)),
        ("Did the cost model tell the truth?", markdown(TRUTH, truths(plans))),
        ("Not applicable", listed(records, "not_applicable")),
        ("Failed", listed(records, "error")),
    ]
    head = "".join(f"{made}\n\n" for made in sorted({made_on(record) for record in measured}))
    return head + "\n".join(f"### {title}\n\n{text}" for title, text in parts if text)


def is_compiled(record: Record) -> bool:
    """The plan was compiled by inductor; predictions are of kernels."""
    return str(record["method"]).startswith("inductor")


def made_on(record: Record) -> str:
    machine = record["machine"]
    return f"torch {machine['torch']}, {machine['processor']}, {machine['date']}; batches times {record['scale']:g}."


def listed(records: Iterable[Record], key: str) -> str:
    return "".join(f"- {record['model']}, {record['method']}: {record[key]}\n" for record in records if key in record)


def peak(record: Record, side: str, key: str) -> str:
    """A peak as a share of eager's, and in MiB."""
    nbytes = record[side].get(key)
    return "-" if nbytes is None else f"{nbytes / record['eager'][key]:.3f} ({mib(nbytes)})"


def spread(ratio: dict[str, float] | None) -> str:
    return "-" if ratio is None else f"{ratio['median']:.3f} ± {ratio['noise']:.3f}"


def faster(record: Record) -> str:
    """How much less time a step of ours takes than the rival's, in per cent."""
    ratio = record.get("ours_to_rival")
    return "-" if ratio is None else f"{100 * (1 - ratio['median']):+.1f} ± {100 * ratio['noise']:.1f} %"


def differences(record: Record, side: str) -> str:
    """Of loss, gradients and buffers; "none" where every bit is eager's."""
    found = record[side].get("difference")
    if found is None:
        return "-"
    return ", ".join(f"{kind} {value:.0e}" for kind, value in found.items() if value) or "none"


def of_ours(show: Callable[[Record], str]) -> Callable[[Record], str]:
    """A column of the plan's side: where there is no plan, the name of the error."""
    return lambda record: record["ours"]["error"].partition(":")[0] if "error" in record["ours"] else show(record)


def planning(record: Record) -> str:
    """Seconds, and those without measuring kernels: a second plan finds them on disk."""
    seconds = record["ours"]["planning"]
    return f"{seconds['total']:.1f} ({seconds['total'] - seconds['measure']:.1f})"


RIVALS: Columns = {
    "model": lambda r: r["model"],
    "method": lambda r: r["method"],
    "physical peak, of eager's (MiB)": lambda r: peak(r, "rival", "physical_bytes"),
    "logical peak": lambda r: peak(r, "rival", "logical_bytes"),
    "step time": lambda r: spread(r["rival"]["time"]),
    "eager to eager": lambda r: spread(r["control"]),
    "first step, s": lambda r: f"{r['rival']['first_step_s']:.1f}",
    "differs from eager in": lambda r: differences(r, "rival"),
    "ours: physical peak": of_ours(lambda r: peak(r, "ours", "physical_bytes")),
    "ours: logical peak": of_ours(lambda r: peak(r, "ours", "logical_bytes")),
    "ours: step time": of_ours(lambda r: spread(r["ours"]["time"])),
    "ours: differs in": of_ours(lambda r: differences(r, "ours")),
    "planned in, s (kernels known)": of_ours(planning),
    "ours takes less time by": faster,
}

SHARES: Columns = {
    "model": lambda r: r["model"],
    "budget": lambda r: r["method"].removeprefix("ours-"),
    "physical peak, of eager's (MiB)": of_ours(lambda r: peak(r, "ours", "physical_bytes")),
    "logical peak": of_ours(lambda r: peak(r, "ours", "logical_bytes")),
    "step time": of_ours(lambda r: spread(r["ours"]["time"])),
    "eager to eager": lambda r: spread(r["control"]),
    "predicted": of_ours(lambda r: f"{r['ours']['predicted_time']:.3f}"),
    "gap": of_ours(lambda r: f"{r['ours']['gap']:.2%}"),
    "planned in, s (kernels known)": of_ours(planning),
    "differs from eager in": of_ours(lambda r: differences(r, "ours")),
}


def truths(plans: list[Record]) -> list[Record]:
    """Predicted against measured, for the plans of each model and for all of them."""
    groups = [(model, list(group)) for model, group in groupby(plans, key=lambda record: record["model"])]
    return [truth(model, group) for model, group in [*groups, ("all", plans)] if group]


def truth(model: str, plans: list[Record]) -> Record:
    """How far predictions were off; times are ratios to the plain step, their errors in points of it."""
    predicted = [record["ours"]["predicted_time"] for record in plans]
    measured = [record["ours"]["time"]["median"] for record in plans]
    errors = [100 * (b - a) for a, b in zip(predicted, measured, strict=True)]
    worst, which = max(zip(errors, plans, strict=True), key=lambda pair: abs(pair[0]))
    return {
        "model": model,
        "plans": len(plans),
        "logical": worst_peak(plans, "logical_bytes"),
        "physical": worst_peak(plans, "physical_bytes"),
        "correlation": correlation(predicted, measured),
        "error": statistics.median(map(abs, errors)),
        "worst": f"{worst:+.1f} ({which['model']}, {which['method']})",
        "noise": 100 * statistics.median(record["control"]["noise"] for record in plans),
        "seconds": statistics.median(record["ours"]["step_s"] / record["ours"]["predicted_s"] for record in plans),
    }


def worst_peak(plans: list[Record], key: str) -> float | None:
    """The largest relative error of a predicted peak against the measured one."""
    ours = [record["ours"] for record in plans]
    return max((side[key] / side["predicted_bytes"] - 1 for side in ours if key in side), key=abs, default=None)


def correlation(a: list[float], b: list[float]) -> float | None:
    """Pearson's; None where one of them is constant."""
    return statistics.correlation(a, b) if len(set(a)) > 1 and len(set(b)) > 1 else None


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3%}"


TRUTH: Columns = {
    "model": lambda t: t["model"],
    "plans": lambda t: str(t["plans"]),
    "peak, worst: logical over predicted": lambda t: percent(t["logical"]),
    "physical over predicted": lambda t: percent(t["physical"]),
    "step time, predicted to measured ratios: correlation": lambda t: (
        "-" if t["correlation"] is None else f"{t['correlation']:.2f}"
    ),
    "median error, points": lambda t: f"{t['error']:.1f}",
    "worst error, points": lambda t: t["worst"],
    "noise, points": lambda t: f"{t['noise']:.1f}",
    "seconds, measured over predicted": lambda t: f"{t['seconds']:.2f}",
}
