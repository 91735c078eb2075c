"""What the processes of a simulation see, and the figures that this makes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from dagster_taskiq.worker.observer import LeaseRenewal


@dataclass
class Record:
    """What one process saw.

    Attributes:
        renewal_seconds: how long each renewal took, of all claims of a worker at once.
        worst_slack_share: the least that was left of a lease when its renewal had been answered,
            counted from when the renewal before it was sent; 1 is all of it.
        claims_renewed: how often a claim was renewed.
        lost: claims that a renewal found not to be held any more.
        errors: calls that the server did not answer, or refused.
        cancel_seconds: from an order to cancel to its arrival at the worker.
        steps: that have ended.
        inspections: lists of workers that runs have read.
        lag_seconds: by how much its event loop was late, at each look.
        cpu_seconds: that it used.
    """

    renewal_seconds: list[float] = field(default_factory=list)
    worst_slack_share: float = 1.0
    claims_renewed: int = 0
    lost: int = 0
    errors: int = 0
    cancel_seconds: list[float] = field(default_factory=list)
    steps: int = 0
    inspections: int = 0
    lag_seconds: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0

    def renewed(self, renewal: LeaseRenewal) -> None:
        """Note a renewal of all claims of one worker."""
        self.renewal_seconds.append(renewal.seconds)
        self.claims_renewed += renewal.claims
        self.lost += renewal.lost
        self.worst_slack_share = min(self.worst_slack_share, renewal.least_left_share)


def crowd_figures(records: Sequence[Record], seconds: float) -> dict[str, float | None]:
    """What came of a simulation that was watched for a time."""
    cancels = [it for record in records for it in record.cancel_seconds]
    lags = [it for record in records for it in record.lag_seconds]
    return {
        **renewal_figures(records, seconds),
        "errors": sum(record.errors for record in records),
        "cancels": len(cancels),
        **_milliseconds("cancel", cancels),
        "steps_per_s": sum(record.steps for record in records) / seconds,
        "inspections_per_s": sum(record.inspections for record in records) / seconds,
        **_milliseconds("generator_lag", lags),
    }


def renewal_figures(records: Sequence[Record], seconds: float) -> dict[str, float | None]:
    """Figures of the renewals, which a simulation and a replay share."""
    renewals = [it for record in records for it in record.renewal_seconds]
    renewed = sum(record.claims_renewed for record in records)
    cpu_seconds = sum(record.cpu_seconds for record in records)
    return {
        "renewals_per_s": len(renewals) / seconds,
        "claims_renewed_per_s": renewed / seconds,
        **_milliseconds("renewal", renewals),
        "worst_slack_share": min(r.worst_slack_share for r in records) if renewed else None,
        "lost_claims": sum(record.lost for record in records),
        "generator_cpu_percent": 100 * cpu_seconds / seconds,
    }


def _milliseconds(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """Median, 99th percentile and maximum; None where there is nothing."""
    if not seconds:
        return {f"{name}_{which}_ms": None for which in ("p50", "p99", "max")}
    ordered = sorted(seconds)
    return {
        f"{name}_p50_ms": 1000 * statistics.median(ordered),
        f"{name}_p99_ms": 1000 * ordered[int(0.99 * len(ordered))],
        f"{name}_max_ms": 1000 * ordered[-1],
    }
