"""The web shop of ``dagster-taskiq demo``, deployed: its assets, two jobs and a schedule.

What the steps do, and the tags that send them to a queue with a priority, is in
``dagster_taskiq/demo/jobs.py``, so that the demo and this example cannot differ.
"""

import os
from pathlib import Path

import yaml
from dagster import AssetSelection, Definitions, ScheduleDefinition, define_asset_job

from dagster_taskiq import taskiq_executor
from dagster_taskiq.demo import jobs

# the same file that the workers are started with; its {env: ...} are read when a run starts
settings = yaml.safe_load(Path(os.environ.get("TASKIQ_YAML", "taskiq.yaml")).read_text())
executor = taskiq_executor.configured(settings["execution"]["config"])

shop_day = define_asset_job("shop_day", selection=AssetSelection.all(), executor_def=executor)

# no mails; and where it competes with other runs, each of its steps goes before theirs
report_now = define_asset_job(
    "report_now",
    selection=AssetSelection.assets("daily_report").upstream(),
    tags={"dagster-taskiq/run_priority": "2"},
    executor_def=executor,
)

defs = Definitions(
    assets=jobs.assets,
    jobs=[shop_day, report_now],
    schedules=[ScheduleDefinition(job=shop_day, cron_schedule="0 6 * * *")],
    executor=executor,
)
