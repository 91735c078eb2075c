"""The job of ``dagster-taskiq demo``, which ``example/`` deploys: a day of a web shop.

Short steps go to ``short-queue``, long ones to ``long-queue``, so that a long calculation never
keeps a quick mail waiting. Within a queue the higher priority goes first. What the steps do is a
``sleep`` and a little arithmetic; what they show is in their decorators.

    orders ──────────> daily_report: split ─> price[north|east|south|west] ─> add_up
    exchange_rates ──────────────────────────────┘
    newsletter, reminders, invoices     (ready at once, sent in the order of their priority)
"""

import time
from collections.abc import Iterator

from dagster import (
    AssetExecutionContext,
    AssetsDefinition,
    AssetSelection,
    Backoff,
    Definitions,
    DynamicOut,
    DynamicOutput,
    MetadataValue,
    OpExecutionContext,
    Out,
    Output,
    RetryPolicy,
    asset,
    define_asset_job,
    graph_asset,
    op,
)

from dagster_taskiq.executor import taskiq_executor
from dagster_taskiq.tags import PRIORITY_TAG, QUEUE_TAG

SHORT_QUEUE = "short-queue"
LONG_QUEUE = "long-queue"

Orders = dict[str, list[int]]


@asset(op_tags={QUEUE_TAG: SHORT_QUEUE, PRIORITY_TAG: "9"})
def orders() -> Orders:
    """The day's orders, amounts in euro by region: what all the rest waits for, so it is first."""
    time.sleep(0.3)
    return {
        region: [number * (7 + 3 * place) % 90 + 10 for number in range(1, 41)]
        for place, region in enumerate(("north", "east", "south", "west"))
    }


@asset(
    op_tags={QUEUE_TAG: LONG_QUEUE},
    retry_policy=RetryPolicy(max_retries=2, delay=0.5, backoff=Backoff.LINEAR, jitter=None),
)
def exchange_rates(context: AssetExecutionContext) -> dict[str, float]:
    """Rates from a service that is down at the first try: the step's retry policy tries again."""
    time.sleep(0.3)
    if context.retry_number == 0:
        raise ConnectionError("The exchange's service does not answer.")
    return {"USD": 1.08, "GBP": 0.86}


@op(tags={QUEUE_TAG: SHORT_QUEUE, PRIORITY_TAG: "8"}, out=DynamicOut(list[int]))
def split(orders: Orders) -> Iterator[DynamicOutput[list[int]]]:
    """One output for each region: how many steps follow is known only now."""
    for region, amounts in orders.items():
        yield DynamicOutput(amounts, mapping_key=region)


@op(tags={QUEUE_TAG: LONG_QUEUE})
def price(
    context: OpExecutionContext, amounts: list[int], exchange_rates: dict[str, float]
) -> float:
    """A region's revenue in dollars; they run side by side on the slots of the long worker."""
    time.sleep(0.8)
    revenue = round(sum(amounts) * exchange_rates["USD"], 2)
    context.log.info("%d orders, %.2f USD", len(amounts), revenue)
    return revenue


@op(tags={QUEUE_TAG: SHORT_QUEUE, PRIORITY_TAG: "8"}, out=Out(float))
def add_up(revenues: list[float]) -> Iterator[Output[float]]:
    """All regions together, once the last one is there."""
    total = round(sum(revenues), 2)
    yield Output(total, metadata={"revenue in USD": MetadataValue.float(total)})


@graph_asset
def daily_report(orders: Orders, exchange_rates: dict[str, float]) -> float:
    """An asset of several steps: a dynamic fan-out over the regions, and their sum."""
    revenues = split(orders).map(lambda amounts: price(amounts, exchange_rates))
    return add_up(revenues.collect())  # type: ignore[no-any-return]


def _mailing(name: str, priority: int) -> AssetsDefinition:
    @asset(
        name=name,
        op_tags={QUEUE_TAG: SHORT_QUEUE, PRIORITY_TAG: str(priority)},
        description=f"Mails with priority {priority}: ready at once, sent when their turn comes.",
    )
    def mailing(context: AssetExecutionContext) -> int:
        time.sleep(0.2)
        context.log.info("%s: sent", name)
        return 100

    return mailing


# listed in the opposite of the order in which they are sent
newsletter = _mailing("newsletter", 1)
reminders = _mailing("reminders", 4)
invoices = _mailing("invoices", 7)

shop_day = define_asset_job(
    "shop_day", selection=AssetSelection.all(), executor_def=taskiq_executor
)

assets = [newsletter, reminders, invoices, orders, exchange_rates, daily_report]

defs = Definitions(assets=assets, jobs=[shop_day])
