"""The child's end of its slot's socket.

Every message names the child and the task that it is about, so that the worker takes no word of a
forked copy, or of an earlier task, for an answer.
"""

from __future__ import annotations

import os
import socket
import weakref

from dagster_taskiq.errors import ChannelLostError
from dagster_taskiq.worker import frames
from dagster_taskiq.worker.child_messages import Order, Word, pack, unpack_order

_channels: weakref.WeakSet[Channel] = weakref.WeakSet()


class Channel:
    """Receives orders and says what becomes of them, in the process that has made it.

    Args:
        connection: to the worker.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._pid = os.getpid()
        self._task = 0
        self._identity = _identity_of(connection)
        _channels.add(self)

    def receive(self) -> Order | None:
        """The next order; None when the worker is gone.

        Raises:
            ChannelLostError: there is no connection any more.
            ValueError: what came is no order.
        """
        self._check()
        values = frames.receive(self._connection)
        if values is None:
            return None
        self._task = values.pop("number")
        return unpack_order(values)

    def say(self, word: Word) -> None:
        """Say something about the present task.

        Raises:
            ChannelLostError: there is no connection any more.
            ConnectionError: the worker is gone.
        """
        self._check()
        head = {"pid": self._pid, "task": self._task}
        self._connection.sendall(frames.encode({**head, **pack(word)}))

    def close(self) -> None:
        """Hang up, in this process only."""
        self._connection.close()

    def _check(self) -> None:
        """Neither speak in the name of another process, nor into what user code has opened."""
        if os.getpid() != self._pid:
            os._exit(1)
        if _identity_of(self._connection) != self._identity:
            raise ChannelLostError(
                "a step has closed or replaced the descriptor of this process's connection to its "
                "worker"
            )


def _identity_of(connection: socket.socket) -> tuple[int, int]:
    try:
        found = os.fstat(connection.fileno())
    except OSError:
        return (-1, -1)
    return (found.st_dev, found.st_ino)


def _close_after_fork() -> None:
    for channel in _channels:
        channel.close()


os.register_at_fork(after_in_child=_close_after_fork)
