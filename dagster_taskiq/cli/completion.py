"""``dagster-taskiq completion``: what makes a shell complete our commands."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from dagster_taskiq.errors import ConfigError

#: The command, and the variable by which the shell's script asks it, as Click names it.
_COMMAND, _VARIABLE = "dagster-taskiq", "_DAGSTER_TASKIQ_COMPLETE"


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a script for a shell that completes commands, options, workers and queues.

    \b
    bash  source <(dagster-taskiq completion bash)        in ~/.bashrc
    zsh   source <(dagster-taskiq completion zsh)         in ~/.zshrc, behind compinit
    fish  dagster-taskiq completion fish | source         in ~/.config/fish/config.fish
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise ConfigError(f"Click knows no completion for {shell}.")
    click.echo(kind(context.find_root().command, {}, _COMMAND, _VARIABLE).source())
