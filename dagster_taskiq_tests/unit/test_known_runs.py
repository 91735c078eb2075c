"""What a child knows of the run of its steps is never older than a second."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus

from dagster_taskiq.errors import TaskRefusedError, WrongInstanceError
from dagster_taskiq.execution.known_runs import LiveRuns
from dagster_taskiq_tests.unit.loop_jobs import single_job


@dataclass
class Scene:
    """An instance with a run, and a clock.

    Attributes:
        reads: the runs that were read from the instance.
    """

    instance: DagsterInstance
    run: DagsterRun
    now: float = 1000.0
    reads: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.runs = LiveRuns(lambda: self.now)

    def find(self, run: DagsterRun | None = None) -> DagsterRun:
        return self.runs.find(self.instance, (run or self.run).run_id)


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    with DagsterInstance.ephemeral() as instance:
        run = instance.create_run_for_job(single_job, status=DagsterRunStatus.STARTED)
        found = Scene(instance, run)
        get_run = instance.get_run_by_id

        def note_and_get(run_id: str) -> DagsterRun | None:
            found.reads.append(run_id)
            return get_run(run_id)

        monkeypatch.setattr(instance, "get_run_by_id", note_and_get)
        yield found


def test_the_run_of_many_steps_is_read_once_a_second(scene: Scene) -> None:
    """Each run for itself, and what has changed is seen then."""
    other = scene.instance.create_run_for_job(single_job, status=DagsterRunStatus.STARTED)
    for _ in range(3):
        assert scene.find().run_id == scene.run.run_id
        assert scene.find(other).run_id == other.run_id
        scene.now += 0.25
    assert scene.reads == [scene.run.run_id, other.run_id]
    scene.instance.add_run_tags(scene.run.run_id, {"late": "tag"})
    assert "late" not in scene.find().tags
    scene.now += 0.25
    assert scene.find().tags["late"] == "tag"


def test_a_second_is_not_made_longer_by_use(scene: Scene) -> None:
    """However many steps there are in it."""
    scene.find()
    scene.now += 0.875
    scene.find()
    scene.now += 0.125
    scene.find()
    assert len(scene.reads) == 2


@pytest.mark.parametrize(
    "status", [DagsterRunStatus.CANCELING, DagsterRunStatus.CANCELED, DagsterRunStatus.FAILURE]
)
def test_a_run_that_is_over_starts_no_step(scene: Scene, status: DagsterRunStatus) -> None:
    """From a second later on at the latest, and that it was over is not remembered."""
    scene.find()
    scene.instance.run_storage.add_run(scene.run.with_status(status)._replace(run_id="other"))
    with pytest.raises(TaskRefusedError, match=status.value):
        scene.runs.find(scene.instance, "other")
    with pytest.raises(TaskRefusedError, match=status.value):
        scene.runs.find(scene.instance, "other")
    assert scene.reads == [scene.run.run_id, "other", "other"]


def test_a_run_that_was_deleted_starts_no_step(scene: Scene) -> None:
    """From a second later on at the latest."""
    scene.find()
    scene.instance.delete_run(scene.run.run_id)
    assert scene.find().run_id == scene.run.run_id
    scene.now += 1
    with pytest.raises(WrongInstanceError):
        scene.find()
