"""The figures of a soak, for people and for programs."""

from __future__ import annotations

import json
from typing import Any

from dagster_taskiq_tests.soak.director import Director
from dagster_taskiq_tests.soak.evidence import Verdict


def figures(director: Director, verdict: Verdict, seed: int, seconds: float) -> dict[str, Any]:
    """Everything that is worth keeping."""
    return {
        "broker": director.kind,
        "seed": seed,
        "seconds": seconds,
        "faults": dict(director.faults.most_common()),
        "runs": len(director.runs.all),
        "good": verdict.is_good,
        **vars(verdict),
    }


def table(values: dict[str, Any]) -> str:
    """The same as a text."""
    faults = values["faults"]
    lines = [
        f"broker {values['broker']}, seed {values['seed']}, {values['seconds']:g} s",
        f"faults      {sum(faults.values())}",
        *[f"  {count:4} {name}" for name, count in faults.items()],
        f"runs        {values['runs']}: "
        + ", ".join(f"{count} {status}" for status, count in values["statuses"].items()),
        f"steps       {values['steps']}",
        f"attempts    {values['attempts']}",
        f"lost        {len(values['lost'])}",
        f"twice       {len(values['twice'])}",
        f"wrong ends  {len(values['wrong_ends'])}",
        f"left over   {json.dumps(values['left']) if values['left'] else 'nothing'}",
        "attempts that failed, by why",
        *[f"  {count:4} {why}" for why, count in sorted(values["failures"].items())],
    ]
    for kind in ("lost", "twice", "wrong_ends", "others"):
        lines += [f"BROKEN ({kind}): {text}" for text in values[kind]]
    return "\n".join(lines)
