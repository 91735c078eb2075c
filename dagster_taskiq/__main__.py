"""``python -m dagster_taskiq``: the same as the command ``dagster-taskiq``."""

import gc
import os
import signal


def main() -> None:
    """Run the command line."""
    # a command may take a second to import; Ctrl-C ends it without a traceback until a command has
    # something to stop, and then listens itself
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    # a quarter of that second would be collections that find nothing: what modules make stays, and
    # forked children share it for as long as no collection writes into it; ``cli.later`` turns them
    # on again, when the command is imported
    gc.disable()
    from dagster_taskiq.cli import main as command_line  # noqa: PLC0415

    command_line(prog_name="dagster-taskiq")


if __name__ == "__main__":
    main()
