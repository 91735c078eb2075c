"""The steps that a run holds back, in ``run show``."""

from __future__ import annotations

import click

from dagster_taskiq.cli.tables import echo_sentence, echo_table, time_since
from dagster_taskiq.messages.withheld_steps import Withheld

#: What holds steps back where no pool does.
_OWN_LIMITS = "limits of the run"


def echo_withheld(withheld: Withheld) -> None:
    """Write a table of the steps, and below it why they are held back; nothing where none are."""
    rows = [
        (key, time_since(since), f"pool {group.pool}" if group.pool else _OWN_LIMITS)
        for group in withheld.groups
        for key, since in group.steps
    ]
    if not rows and not withheld.more:
        return
    click.echo("\nheld back: ready, but not sent")
    if rows:
        echo_table([("step", "for", "by"), *rows], indent="  ")
    for group in withheld.groups:
        echo_sentence(group.reason, indent="  ")
    if withheld.more:
        more = "more step is" if withheld.more == 1 else "more steps are"
        echo_sentence(f"{withheld.more} {more} held back.", indent="  ")
