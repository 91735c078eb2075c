"""``python -m dagster_taskiq_tests.soak``."""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import get_args

from dagster_taskiq_tests.server_sources import stop_session_servers
from dagster_taskiq_tests.soak.report import table
from dagster_taskiq_tests.soak.soak import soak
from dagster_taskiq_tests.soak.stack import Kind


def main() -> int:
    """Read the arguments, soak, report; 1 where a promise was broken."""
    parser = argparse.ArgumentParser(
        prog="python -m dagster_taskiq_tests.soak", description=__doc__
    )
    parser.add_argument("--broker", choices=get_args(Kind), default="redis")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, help="default: a new one, which is printed")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--keep", action="store_true", help="keep logs and trace in any case")
    arguments = parser.parse_args()
    seed = random.randrange(10**6) if arguments.seed is None else arguments.seed
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stdout)
    for noisy in ("dagster", "dagster_taskiq", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    directory = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"seed {seed}, logs in {directory}", flush=True)
    try:
        values = soak(arguments.broker, arguments.seconds, seed, directory)
    finally:
        stop_session_servers()
    print(table(values))
    text = json.dumps(values, indent=1)
    (directory / "figures.json").write_text(text)
    if arguments.json:
        arguments.json.write_text(text)
    if values["good"] and not arguments.keep:
        shutil.rmtree(directory)
    return 0 if values["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
