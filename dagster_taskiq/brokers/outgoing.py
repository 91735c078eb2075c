"""What a broker reads off the messages that it sends: queue, priority, and how many at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dagster_taskiq._taskiq import BrokerMessage
from dagster_taskiq.defaults import DEFAULT_STEP_PRIORITY, MAX_PRIORITY, MIN_PRIORITY
from dagster_taskiq.errors import ConfigError

#: How many bytes of messages are sent in one go. One round trip for a usual fan-out, and still
#: little enough to get through within the time that a server has for its answer.
MAX_BATCH_BYTES = 4 * 2**20


def queue_of(message: BrokerMessage) -> str:
    """The physical queue that a message goes to.

    Raises:
        ConfigError: it names none.
    """
    queue = message.labels.get("queue_name")
    if not queue:
        raise ConfigError(
            f"Task {message.task_id} cannot be sent: its label queue_name is missing."
        )
    return str(queue)


def priority_of(message: BrokerMessage) -> int:
    """The priority of a message, 0..10; that of a step that names none where it has none."""
    try:
        priority = int(message.labels.get("priority", DEFAULT_STEP_PRIORITY))
    except (TypeError, ValueError):
        priority = DEFAULT_STEP_PRIORITY
    return max(MIN_PRIORITY, min(MAX_PRIORITY, priority))


def batches(messages: Sequence[BrokerMessage]) -> Iterator[list[BrokerMessage]]:
    """The messages in their order, in lists of at most ``MAX_BATCH_BYTES`` or of one message."""
    batch: list[BrokerMessage] = []
    size = 0
    for message in messages:
        size += len(message.message)
        if batch and size > MAX_BATCH_BYTES:
            yield batch
            batch, size = [], len(message.message)
        batch.append(message)
    if batch:
        yield batch
