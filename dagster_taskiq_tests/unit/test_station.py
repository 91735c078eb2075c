"""What a station makes of its child's answer."""

from __future__ import annotations

import pytest

from dagster_taskiq.backend import Claim
from dagster_taskiq.results import Outcome, Place, TaskResult
from dagster_taskiq.worker.leases import Lease, StopReason
from dagster_taskiq.worker.station import _result_of

PLACE = Place("w@h", "worker-id", "h", 4711, 2)


@pytest.mark.parametrize("reason", [None, *StopReason])
def test_only_a_cancel_rules_out_a_retry(reason: StopReason | None) -> None:
    """An interrupt before the step's start may also be a lost lease, or a stranger's signal."""
    claim = Claim("run", "task", "token", 30.0, "epoch", PLACE)
    lease = Lease(claim, 4711, 0.0, lambda: None, lambda: None, stop_reason=reason)
    interrupted = TaskResult(Outcome.FINISHED, PLACE, reason="interrupted", is_cancelled=True)
    answer = {"kind": "result", "result": interrupted.to_bytes().decode(), "resident_kib": 1}
    result = _result_of(answer, lease, "")
    assert result.is_cancelled == (reason is StopReason.CANCELLED)
    assert result.reason == "interrupted"
