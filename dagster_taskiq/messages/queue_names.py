"""What queues are called on a server: by kind of task, and by version of the protocol.

Apart from ``envelope``, since who only asks after workers needs no Taskiq.
"""

from __future__ import annotations

from enum import Enum

#: Raised when what runs and workers send each other changes. Tasks of each version wait in physical
#: queues of their own, so that no worker takes one that only a worker of another version can run.
PROTOCOL = 2


class QueueKind(str, Enum):
    """Steps and runs wait in separate physical queues, so that runs never starve their steps."""

    STEPS = "steps"
    RUNS = "runs"


def physical_queue(key_prefix: str, kind: QueueKind, queue: str, protocol: int = PROTOCOL) -> str:
    """The name on the server of the queue for tasks of one kind and version.

    Args:
        queue: as people name it.
    """
    version = "" if protocol == 1 else f"-{protocol}"
    return f"{key_prefix}.{kind.value}{version}.{queue}"
