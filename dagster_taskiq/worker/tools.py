"""What a station gives to each of its attempts."""

from __future__ import annotations

from dataclasses import dataclass

from dagster_taskiq.backend import Backend
from dagster_taskiq.messages.results import Place
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.messages.time_limits import TimeLimits
from dagster_taskiq.worker.leases import LeaseKeeper
from dagster_taskiq.worker.observer import WorkerObserver
from dagster_taskiq.worker.run_watch import RunWatch


@dataclass(frozen=True)
class Tools:
    """What all attempts of a station share.

    Attributes:
        backend: where tasks are claimed and results stored.
        leases: keeps the claims.
        run_watch: speaks with Dagster about runs whose process is gone.
        place: of the worker; pid and slot are filled in for each task.
        result_expires_seconds: how long an unread result is kept.
        limits: of steps whose tags say nothing.
        signer: signs results.
        observer: hears what becomes of each task.
    """

    backend: Backend
    leases: LeaseKeeper
    run_watch: RunWatch
    place: Place
    result_expires_seconds: float
    limits: TimeLimits
    signer: Signer
    observer: WorkerObserver
