"""Queues and priorities from tags, ours first and dagster-celery's as fallbacks."""

from __future__ import annotations

import pytest
from dagster._core.storage.tags import TagType, get_tag_type
from hypothesis import given
from hypothesis import strategies as st

from dagster_taskiq import tags
from dagster_taskiq.errors import ConfigError, TagError
from dagster_taskiq.messages.time_limits import TimeLimits

NAMES = st.text("abc-_ äß", min_size=1).filter(str.strip)
MAYBE_NAMES = st.none() | NAMES


def tagged(**values: str | None) -> dict[str, str]:
    """Tags by their constants' names."""
    return {getattr(tags, name): value for name, value in values.items() if value is not None}


@given(MAYBE_NAMES, MAYBE_NAMES, MAYBE_NAMES, MAYBE_NAMES)
def test_a_steps_queue(
    step: str | None, celery_step: str | None, run: str | None, celery_run: str | None
) -> None:
    """The step's tag, its dagster-celery tag, the run's tag, the default: in this order.

    ``dagster-celery/queue`` on a run never counts for its steps.
    """
    found = tags.step_queue(
        tagged(QUEUE_TAG=step, CELERY_QUEUE_TAG=celery_step),
        tagged(QUEUE_TAG=run, CELERY_QUEUE_TAG=celery_run),
        "default",
    )
    assert found == (step or celery_step or run or "default").strip()


@given(MAYBE_NAMES, MAYBE_NAMES)
def test_a_runs_queue(ours: str | None, celery: str | None) -> None:
    """Our tag, dagster-celery's, the default."""
    found = tags.run_queue(tagged(QUEUE_TAG=ours, CELERY_QUEUE_TAG=celery), "default")
    assert found == (ours or celery or "default").strip()


@pytest.mark.parametrize("value", ["", " ", "\t\n"])
@pytest.mark.parametrize("tag", [tags.QUEUE_TAG, tags.CELERY_QUEUE_TAG])
def test_an_empty_queue_name_is_an_error(tag: str, value: str) -> None:
    """It is not taken for the default: somebody's template has failed."""
    with pytest.raises(TagError, match="queue") as caught:
        tags.step_queue({tag: value}, {}, "default")
    assert (caught.value.tag, caught.value.value) == (tag, value)
    with pytest.raises(TagError):
        tags.run_queue({tag: value}, "default")


@given(st.integers(), st.integers())
def test_priorities_add_up_and_are_clamped(run: int, step: int) -> None:
    """Run priority + step priority, within 0..10."""
    found = tags.task_priority(tagged(PRIORITY_TAG=str(step)), tagged(RUN_PRIORITY_TAG=str(run)), 5)
    assert found == min(10, max(0, run + step))


@given(st.integers(-20, 20), st.integers(-20, 20))
def test_a_higher_priority_stays_higher(one: int, other: int) -> None:
    """Clamping keeps the order."""
    assert (one <= other) <= (tags.clamp_priority(one) <= tags.clamp_priority(other))


def test_default_priorities() -> None:
    """A step without a tag has 5, a run without one adds 0; another default may be given."""
    assert tags.task_priority({}, {}, 5) == 5
    assert tags.task_priority({}, {tags.RUN_PRIORITY_TAG: "2"}, 5) == 7
    assert tags.task_priority({tags.PRIORITY_TAG: "1"}, {}, 5) == 1
    assert tags.task_priority({}, {}, 3) == 3


def test_dagster_celerys_priorities_are_fallbacks() -> None:
    """Ours go first where both are there."""
    assert tags.step_priority({tags.CELERY_PRIORITY_TAG: "1"}, 5) == 1
    assert tags.step_priority({tags.CELERY_PRIORITY_TAG: "1", tags.PRIORITY_TAG: "2"}, 5) == 2
    assert tags.run_priority({tags.CELERY_RUN_PRIORITY_TAG: "-3"}) == -3
    both = {tags.CELERY_RUN_PRIORITY_TAG: "-3", tags.RUN_PRIORITY_TAG: "4"}
    assert tags.run_priority(both) == 4


@given(st.text().filter(lambda text: not text.strip().lstrip("+-").replace("_", "").isdigit()))
def test_a_priority_that_is_no_integer_is_an_error(value: str) -> None:
    """For steps and runs, ours and dagster-celery's; the error has the tag and its value."""
    for tag in (tags.PRIORITY_TAG, tags.CELERY_PRIORITY_TAG):
        with pytest.raises(TagError) as caught:
            tags.step_priority({tag: value}, 5)
        assert (caught.value.tag, caught.value.value) == (tag, value)
    for tag in (tags.RUN_PRIORITY_TAG, tags.CELERY_RUN_PRIORITY_TAG):
        with pytest.raises(TagError, match="an integer"):
            tags.run_priority({tag: value})


def test_a_number_too_long_to_read_is_an_error_of_ours() -> None:
    """Python refuses to read more than some thousand digits."""
    with pytest.raises(ConfigError):
        tags.step_priority({tags.PRIORITY_TAG: "9" * 10_000}, 5)


def test_dagsters_own_priority_misleads_only_alone() -> None:
    """``dagster/priority`` is worth a word where no tag that counts is beside it."""
    theirs = {tags.DAGSTER_PRIORITY_TAG: "3"}
    assert tags.has_misleading_priority(theirs)
    assert not tags.has_misleading_priority({})
    assert not tags.has_misleading_priority({**theirs, tags.PRIORITY_TAG: "3"})
    assert not tags.has_misleading_priority({**theirs, tags.CELERY_PRIORITY_TAG: "3"})


LIMIT = st.none() | st.floats(0, 1e9)


@given(LIMIT, LIMIT)
def test_time_limits(soft: float | None, hard: float | None) -> None:
    """What a tag does not say stays open, for the worker's own limits."""
    found = tags.step_time_limits(
        tagged(
            SOFT_TIMEOUT_TAG=None if soft is None else repr(soft),
            TIMEOUT_TAG=None if hard is None else repr(hard),
        )
    )
    assert found == TimeLimits(soft, hard)
    filled = found.or_else(TimeLimits(1.0, 2.0))
    assert filled.soft_seconds == (1.0 if soft is None else soft)
    assert filled.hard_seconds == (2.0 if hard is None else hard)


@pytest.mark.parametrize("value", ["", "soon", "-1", "nan", "inf", "2e9", "1 s"])
@pytest.mark.parametrize("tag", [tags.SOFT_TIMEOUT_TAG, tags.TIMEOUT_TAG])
def test_a_time_limit_that_is_none(tag: str, value: str) -> None:
    """Each is refused with the tag and the value."""
    with pytest.raises(TagError, match="a number of seconds") as caught:
        tags.step_time_limits({tag: value})
    assert (caught.value.tag, caught.value.value) == (tag, value)


def test_the_names_of_dagster_celery_s_constants_are_here() -> None:
    """Code that imports one finds it under the package's name, with our value."""
    theirs = pytest.importorskip("dagster_celery.tags")
    for name in vars(theirs):
        if name.startswith("DAGSTER_CELERY_"):
            value = getattr(tags, name.replace("CELERY", "TASKIQ"))
            assert "celery" not in value
            assert value.rpartition("/")[2].endswith(getattr(theirs, name).rpartition("/")[2])


def test_the_task_id_is_hidden_in_the_ui() -> None:
    """It is on every launched run, and of no use to people."""
    assert get_tag_type(tags.TASK_ID_TAG) is TagType.HIDDEN
