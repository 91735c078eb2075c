"""The assets under test, and the jobs of them, which only their repository knows.

They are not in ``jobs``, since what Dagster imports to read a selection of assets would be half of
what a process takes to load that module.
"""

from collections.abc import Iterator

from dagster import (
    AssetCheckResult,
    AssetExecutionContext,
    AssetOut,
    AssetSelection,
    Definitions,
    Output,
    StaticPartitionsDefinition,
    asset,
    asset_check,
    define_asset_job,
    multi_asset,
)

from dagster_taskiq import taskiq_executor

days = StaticPartitionsDefinition(["monday", "tuesday"])


@asset(partitions_def=days)
def daily(context: AssetExecutionContext) -> str:
    return f"of {context.partition_key}"


@asset(partitions_def=days)
def report(context: AssetExecutionContext, daily: str) -> str:
    return f"report {daily}"


@asset
def source() -> int:
    return 1


@asset
def derived(source: int) -> int:
    return source + 1


@asset_check(asset=source, blocking=True)
def source_is_small(source: int) -> AssetCheckResult:
    return AssetCheckResult(passed=source < 10, metadata={"value": source})


@asset_check(asset=derived)
def derived_is_negative(derived: int) -> AssetCheckResult:
    return AssetCheckResult(passed=derived < 0)


@asset
def wrong() -> int:
    return 100


@asset_check(asset=wrong, blocking=True)
def wrong_is_small(wrong: int) -> AssetCheckResult:
    return AssetCheckResult(passed=wrong < 10)


@asset
def after_wrong(wrong: int) -> int:
    return wrong


@multi_asset(
    outs={"first": AssetOut(is_required=False), "second": AssetOut(is_required=False)},
    can_subset=True,
)
def pair(context: AssetExecutionContext) -> Iterator[Output[int]]:
    for number, name in enumerate(("first", "second")):
        if name in context.op_execution_context.selected_output_names:
            yield Output(number, name)


@asset
def after_second(second: int) -> int:
    return second + 1


defs = Definitions(
    assets=[daily, report, source, derived, wrong, after_wrong, pair, after_second],
    asset_checks=[source_is_small, derived_is_negative, wrong_is_small],
    jobs=[
        define_asset_job("partitioned", ["daily", "report"], executor_def=taskiq_executor),
        define_asset_job("checked", ["source", "derived"], executor_def=taskiq_executor),
        define_asset_job("blocked", ["wrong", "after_wrong"], executor_def=taskiq_executor),
        define_asset_job(
            "multi", AssetSelection.assets(pair, "after_second"), executor_def=taskiq_executor
        ),
    ],
)
