"""``python -m dagster_taskiq``: the same as the command ``dagster-taskiq``."""

from dagster_taskiq.cli import main

if __name__ == "__main__":
    main(prog_name="dagster-taskiq")
