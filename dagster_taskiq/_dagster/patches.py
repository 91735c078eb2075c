"""What is put in place of functions of Dagster, in a process that executes steps or a run."""

from __future__ import annotations

import inspect
import signal
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from typing import Any

from dagster import DagsterEvent, DagsterInstance, DagsterRun, RetryRequested
from dagster._cli.api import _execute_run_command_body, _resume_run_command_body
from dagster._core import errors
from dagster._core.definitions.reconstruct import ReconstructableJob, ReconstructableRepository
from dagster._core.errors import DagsterExecutionInterruptedError
from dagster._core.events import DagsterEventType, EngineEventData
from dagster._core.execution import compute_logs
from dagster._core.execution.api import (
    execute_run_iterator,
)
from dagster._core.execution.plan import execute_plan
from dagster._core.storage.dagster_run import DagsterRunStatus
from dagster._core.system_config.objects import ResolvedRunConfig
from dagster._grpc.impl import core_execute_run
from dagster._utils.interrupts import (
    check_captured_interrupt,
    raise_interrupts_as,
)

from dagster_taskiq.aio.forked_copies import ending_copies

#: Code locations, and jobs of them, that a process keeps.
_KEPT_LOCATIONS = 4


_KEPT_JOBS = 64


def runs_user_code() -> bool:
    """Whether Dagster would raise an interrupt here and now, rather than keep it for later.

    It does within its error boundaries around user code, where it has exchanged the handler of
    SIGINT for one that raises.
    """
    handler = signal.getsignal(signal.SIGINT)
    return getattr(handler, "__qualname__", "").startswith(f"{raise_interrupts_as.__qualname__}.")


def is_interrupt_captured() -> bool:
    """Whether a signal asked this process to stop, and what runs has not been told yet."""
    return check_captured_interrupt()


@contextmanager
def interrupts_end_no_attempt(is_run_over: Callable[[], bool]) -> Iterator[None]:
    """Keep Dagster from logging an interrupted step as failed or to be retried.

    Its process knows neither why it was interrupted, nor whether it is to be retried. Where Dagster
    has no such functions any more, it logs an end that tells of the interrupt alone.

    Args:
        is_run_over: whether no loop of the run will log the end; asked after an interrupt.
    """
    module: Any = execute_plan
    names = ("step_failure_event_from_exc_info", "core_dagster_event_sequence_for_step")
    fail, run = (getattr(module, name, None) for name in names)
    if fail is None or run is None:
        yield
        return
    interrupts = (KeyboardInterrupt, DagsterExecutionInterruptedError)

    def fail_unless_interrupted(
        step_context: Any, exc_info: Any, *more: Any, **options: Any
    ) -> DagsterEvent:
        if issubclass(exc_info[0], interrupts) and not is_run_over():
            message = f'Step "{step_context.step.key}" was interrupted.'
            return DagsterEvent.engine_event(step_context, message, EngineEventData())
        event: DagsterEvent = fail(step_context, exc_info, *more, **options)
        return event

    def run_without_policy(step_context: Any) -> Iterator[DagsterEvent]:
        try:
            yield from run(step_context)
        except RetryRequested as request:
            if isinstance(request.__cause__, interrupts):
                raise request.__cause__ from None
            raise

    module.step_failure_event_from_exc_info = fail_unless_interrupted
    module.core_dagster_event_sequence_for_step = run_without_policy
    try:
        yield
    finally:
        module.step_failure_event_from_exc_info = fail
        module.core_dagster_event_sequence_for_step = run


def copy_logs_by(begin: Callable[[str, int], None], end: Callable[[str], None]) -> None:
    """Have somebody else copy the captured output of steps to where it would have gone.

    Dagster's local compute log manager, and those that build on it, redirect standard output and
    error into files and start two processes for each, to copy them. The files, which the UI shows,
    stay as they are. Where Dagster has no such function any more, nothing changes.

    Args:
        begin: called with a file's path and the descriptor whose output goes into it from now on.
        end: called with the path when no more will come.
    """
    original = getattr(compute_logs, "tail_to_stream", None)
    if original is None or list(inspect.signature(original).parameters) != ["path", "stream"]:
        return

    @contextmanager
    def tail_to_stream(path: str, stream: Any) -> Iterator[tuple[None, None]]:
        begin(path, stream.fileno())
        try:
            yield None, None
        finally:
            end(path)

    compute_logs.tail_to_stream = tail_to_stream


def end_copies_of_steps() -> None:
    """Have a copy of this process that a step forks end where Dagster would go on after user code.

    All its boundaries around user code let interrupts through by one function. What comes after
    them writes events in the step's name.
    """

    @contextmanager
    def raise_interrupts_and_end_copies(error_class: type[BaseException]) -> Iterator[None]:
        with raise_interrupts_as(error_class), ending_copies():
            yield

    boundaries: Any = errors
    boundaries.raise_interrupts_as = raise_interrupts_and_end_copies


def keep_definitions() -> None:
    """Keep more than the one job that was used last, for a process that serves many runs.

    Dagster keeps one job and loads its whole code location anew for another one. Here a location
    is loaded once for all of its jobs. A run's config, which is resolved several times for each
    step, is known by the definition and the dictionary it was resolved for. A process that was
    forked from one which keeps them has what that one kept.
    """
    repository: Any = ReconstructableRepository
    if hasattr(repository.get_definition, "cache_info"):
        return
    repository.get_definition = lru_cache(_KEPT_LOCATIONS)(repository.get_definition)
    job: Any = ReconstructableJob
    load = ending_copies()(job.get_definition.__wrapped__)
    job.get_definition = lru_cache(_KEPT_JOBS)(load)
    config: Any = ResolvedRunConfig
    config.build = staticmethod(_known_by_identity(config.build))


def _known_by_identity(build: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Remember what was built for these very objects, which are not to be changed."""
    known: OrderedDict[tuple[int, int], tuple[Any, Any, Any]] = OrderedDict()

    def remembering(job_def: Any, run_config: Any = None) -> Any:
        key = (id(job_def), id(run_config))
        # the objects are kept with it, so that nothing else gets their ids
        if key not in known:
            known[key] = (job_def, run_config, build(job_def, run_config))
        known.move_to_end(key)
        if len(known) > _KEPT_JOBS:
            known.popitem(last=False)
        return known[key][-1]

    return remembering


def is_run_worker(run_id: str) -> bool:
    """Whether a run is executed by Dagster's code for the process of a launched run.

    Nobody keeps the events there that an executor yields, whichever launcher has started it.
    ``execute_job`` returns them, also to a step or a hook of a launched run, which has a run of its
    own executed in the same process.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not core_execute_run.__code__:
        frame = frame.f_back
    launched = frame.f_locals.get("dagster_run") if frame is not None else None
    return isinstance(launched, DagsterRun) and launched.run_id == run_id


def execute_or_resume_run(
    instance: DagsterInstance,
    run_id: str,
    *,
    is_resumed: bool,
    on_run_start_logged: Callable[[], None] = lambda: None,
) -> int:
    """Execute a run in this process, as Dagster's own run workers do; its exit code.

    With one difference: a run that is cancelled while its code is being loaded is CANCELED. To
    Dagster it is in a wrong state then, which makes it a FAILURE.

    Args:
        on_run_start_logged: called when the log says that the run has started.
    """

    def look(event: DagsterEvent) -> None:
        if event.event_type is DagsterEventType.RUN_START:
            on_run_start_logged()

    body = _resume_run_command_body if is_resumed else _execute_run_command_body
    grpc_impl: Any = import_module("dagster._grpc.impl")  # Any, as it does not export the name
    grpc_impl.execute_run_iterator = _execute_unless_cancelled
    try:
        return body(
            run_id=run_id,
            instance=instance,
            write_stream_fn=look,
            set_exit_code_on_failure=True,
        )
    finally:
        grpc_impl.execute_run_iterator = execute_run_iterator


def _execute_unless_cancelled(
    job: Any, dagster_run: DagsterRun, instance: DagsterInstance, **options: Any
) -> Iterator[DagsterEvent]:
    """Dagster's ``execute_run_iterator``, called with the run as it is after its code is loaded."""
    if dagster_run.status is DagsterRunStatus.CANCELING:
        message = "The run was cancelled before its process had begun with it."
        return iter([instance.report_run_canceled(dagster_run, message)])
    return execute_run_iterator(job, dagster_run, instance, **options)
