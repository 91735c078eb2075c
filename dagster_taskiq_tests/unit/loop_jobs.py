"""Jobs for the tests of the execution loop and of eager execution."""

from collections.abc import Iterator

from dagster import (
    AssetCheckResult,
    AssetCheckSeverity,
    AssetExecutionContext,
    AssetSelection,
    DailyPartitionsDefinition,
    Definitions,
    DynamicOut,
    DynamicOutput,
    Failure,
    HookContext,
    In,
    JobDefinition,
    Nothing,
    OpExecutionContext,
    Out,
    Output,
    RetryPolicy,
    RetryRequested,
    asset,
    asset_check,
    define_asset_job,
    execute_job,
    failure_hook,
    job,
    mem_io_manager,
    op,
    reconstructable,
    resource,
    success_hook,
)

from dagster_taskiq import taskiq_executor
from dagster_taskiq._dagster.names import DagsterExecutionInterruptedError
from dagster_taskiq.tags import DAGSTER_PRIORITY_TAG, PRIORITY_TAG, QUEUE_TAG


@op
def one() -> int:
    return 1


@op
def two() -> int:
    return 2


@op
def add_one(number: int) -> int:
    return number + 1


@op
def total(numbers: list[int]) -> int:
    return sum(numbers)


@job(executor_def=taskiq_executor)
def single_job() -> None:
    one()


@job(executor_def=taskiq_executor)
def chain_job() -> None:
    add_one(add_one(one()))


@job(executor_def=taskiq_executor)
def diamond_job() -> None:
    number = one()
    total([add_one.alias("left")(number), add_one.alias("right")(number)])


@op(retry_policy=RetryPolicy(max_retries=2))
def patient() -> int:
    return 1


@job(executor_def=taskiq_executor)
def patient_job() -> None:
    add_one(patient())


@op(retry_policy=RetryPolicy(max_retries=1))
def interrupted_once(context: OpExecutionContext) -> None:
    if context.retry_number == 0:
        raise DagsterExecutionInterruptedError


@job(executor_def=taskiq_executor)
def interrupted_job() -> None:
    interrupted_once()


@op(out={"yes": Out(int, is_required=False), "no": Out(int, is_required=False)})
def only_yes() -> Iterator[Output[int]]:
    yield Output(5, "yes")


@job(executor_def=taskiq_executor)
def skip_job() -> None:
    yes, no = only_yes()
    total([add_one.alias("taken")(yes), add_one.alias("skipped")(no)])
    add_one.alias("after_skipped")(add_one.alias("skipped_too")(no))


@op(out=DynamicOut(int))
def numbers() -> Iterator[DynamicOutput[int]]:
    for number in range(4):
        yield DynamicOutput(number, mapping_key=f"n{number}")


@op(out=DynamicOut(int))
def no_numbers() -> Iterator[DynamicOutput[int]]:
    yield from ()


@job(executor_def=taskiq_executor)
def dynamic_job() -> None:
    total(numbers().map(add_one).collect())
    total.alias("total_of_none")(no_numbers().map(add_one.alias("add_to_none")).collect())


@op(retry_policy=RetryPolicy(max_retries=2, delay=0.05))
def third_time(context: OpExecutionContext) -> int:
    if context.retry_number < 2:
        raise ValueError(f"attempt {context.retry_number}")
    return context.retry_number


@op
def asks_for_retry(context: OpExecutionContext) -> int:
    if context.retry_number < 1:
        raise RetryRequested(max_retries=1, seconds_to_wait=0.05)
    return context.retry_number


@op(retry_policy=RetryPolicy(max_retries=1))
def never() -> int:
    raise ValueError("never")


@job(executor_def=taskiq_executor)
def retry_job() -> None:
    total([third_time(), asks_for_retry()])


@job(executor_def=taskiq_executor)
def exhausted_job() -> None:
    add_one(never())
    one()


@op(config_schema={"fails": bool})
def may_fail(context: OpExecutionContext, number: int) -> int:
    if context.op_config["fails"]:
        raise Failure("as configured", metadata={"number": number})
    return number + 10


@job(executor_def=taskiq_executor)
def failing_job() -> None:
    total([may_fail(one()), two()])


@job(executor_def=taskiq_executor)
def crowd_job() -> None:
    for number in range(25):
        one.alias(f"step_{number:02}")()


def on_trace() -> None:
    """What a test has the step below do."""


@op
def traced() -> None:
    on_trace()


@job(executor_def=taskiq_executor)
def traced_job() -> None:
    traced()


@op(pool="narrow")
def in_pool() -> None:
    """It needs a slot of a pool."""


@job(executor_def=taskiq_executor)
def pool_job() -> None:
    in_pool.alias("first")()
    in_pool.alias("second")()


@resource
def broken_resource() -> None:
    raise ValueError("no such database")


@op(required_resource_keys={"database"})
def needs_database() -> None:
    """It is never reached."""


@job(executor_def=taskiq_executor, resource_defs={"database": broken_resource})
def resource_job() -> None:
    needs_database()


@job(executor_def=taskiq_executor, resource_defs={"io_manager": mem_io_manager})
def memory_job() -> None:
    add_one(one())


@job(executor_def=taskiq_executor)
def empty_job() -> None:
    """It has no ops."""


@op(ins={"after": In(Nothing)}, tags={PRIORITY_TAG: "9", QUEUE_TAG: "short"})
def urgent() -> None:
    """It says where it wants to go."""


@op(tags={PRIORITY_TAG: "1"})
def unhurried() -> None:
    """It can wait."""


@op(tags={DAGSTER_PRIORITY_TAG: "3"})
def mistaken() -> None:
    """Its tag does not count here."""


@job(executor_def=taskiq_executor)
def priority_job() -> None:
    unhurried()
    urgent()
    mistaken()


@asset(partitions_def=DailyPartitionsDefinition("2024-01-01"))
def upstream_asset(context: AssetExecutionContext) -> str:
    return str(context.partition_key)


@asset(partitions_def=DailyPartitionsDefinition("2024-01-01"))
def downstream_asset(upstream_asset: str) -> str:
    return f"after {upstream_asset}"


@asset_check(asset=downstream_asset)
def is_checked() -> AssetCheckResult:
    return AssetCheckResult(passed=True)


def asset_job() -> JobDefinition:
    """A job of two assets with partitions and a check."""
    return Definitions(
        assets=[upstream_asset, downstream_asset],
        asset_checks=[is_checked],
        jobs=[define_asset_job("assets", AssetSelection.all())],
        executor=taskiq_executor,
    ).resolve_job_def("assets")


@asset
def some_asset() -> int:
    return 1


@asset
def asset_after_checks(some_asset: int) -> int:
    return some_asset


@asset_check(asset=some_asset)
def warns() -> AssetCheckResult:
    return AssetCheckResult(passed=False, severity=AssetCheckSeverity.WARN)


@asset_check(asset=some_asset, blocking=True)
def blocks() -> AssetCheckResult:
    return AssetCheckResult(passed=False)


def check_job() -> JobDefinition:
    """A job of which a check fails that an asset waits for."""
    return Definitions(
        assets=[some_asset, asset_after_checks],
        asset_checks=[warns, blocks],
        jobs=[define_asset_job("checks", AssetSelection.all())],
        executor=taskiq_executor,
    ).resolve_job_def("checks")


@success_hook
def on_success(context: HookContext) -> None:
    context.log.info("it has succeeded")


@failure_hook
def on_failure(_context: HookContext) -> None:
    raise ValueError("a hook that fails")


@job(executor_def=taskiq_executor, hooks={on_success, on_failure})
def hook_job() -> None:
    add_one(one())
    never()


#: Without servers.
EAGER = {"execution": {"config": {"config_source": {"task_always_eager": True}}}}


def _nest(context: OpExecutionContext | HookContext) -> None:
    """Execute a job here, and fail unless all that its log has of its steps comes back."""
    done = execute_job(reconstructable(chain_job), context.instance, EAGER, raise_on_error=True)
    told = [it.event_type_value for it in done.all_events if it.step_key]
    logged = [
        it.dagster_event.event_type_value
        for it in context.instance.all_logs(done.run_id)
        if it.dagster_event and it.dagster_event.step_key
    ]
    if sorted(told) != sorted(logged):
        raise Failure(f"of {sorted(logged)} only {sorted(told)} came back")


@op
def nests(context: OpExecutionContext) -> None:
    _nest(context)


@success_hook
def nests_too(context: HookContext) -> None:
    _nest(context)


@job(executor_def=taskiq_executor, hooks={nests_too})
def nesting_job() -> None:
    nests()
