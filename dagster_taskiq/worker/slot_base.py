"""What a slot must do: the contract between those that give it tasks and the child behind it."""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from dagster_taskiq.worker.child_messages import Answer, Order

#: Of a process that has ended after what had forked it: nobody can know its own, below 256.
UNKNOWN_EXIT_CODE = 256


@dataclass(frozen=True)
class ChildDied:
    """The child ended while it had a task.

    Attributes:
        exit_code: negative for the number of the signal that ended it; or ``UNKNOWN_EXIT_CODE``.
        pid: it had.
        is_out_of_memory: whether the kernel has killed for lack of memory meanwhile.
        fault: for which the worker has killed it, in words; empty if it has ended by itself.
    """

    exit_code: int
    pid: int
    is_out_of_memory: bool = False
    fault: str = ""

    def __str__(self) -> str:
        if self.fault:
            return f"its process {self.fault}, and was killed"
        if self.exit_code < 0:
            try:
                name = signal.Signals(-self.exit_code).name
            except ValueError:
                name = f"signal {-self.exit_code}"
            cause = " (out of memory, as the kernel says)" if self.is_out_of_memory else ""
            return f"its process was killed by {name}{cause}"
        if self.exit_code == UNKNOWN_EXIT_CODE:
            return "its process ended, and how is not known, as the one that had forked it was gone"
        return f"its process ended with exit code {self.exit_code}"


class ReplaceReason(str, Enum):
    """Why a slot gives up its child between two tasks."""

    TASKS = "it has executed its number of tasks"
    MEMORY = "it holds more memory than it may"
    LEFTOVERS = "a task has left something behind in it"
    OTHER_CODE = "it has executed other code"
    OLD_CODE = "its code has changed since it was loaded"
    LOADS_CODE = "another one has its task's code loaded"
    FRESH = "it was asked for a fresh one"
    INTERRUPTED = "its task was interrupted"
    SOFT_LIMIT = "its task was over its soft time limit"
    KILLED = "it was killed"
    ENDED = "it has ended"


class Slot(ABC):
    """Executes one task at a time in a process of its own.

    Attributes:
        number: of the slot in its station, from 1.
        location: the code location that its child has loaded; empty where there is none.
    """

    number: int
    location: str = ""

    @property
    @abstractmethod
    def pid(self) -> int:
        """Of the child, which is also its process group's; 0 when there is none."""

    @abstractmethod
    async def prepare(self, location: str = "") -> None:
        """Have a child that is ready for a task, unless there is one that executes a task.

        Args:
            location: of the task; empty for any. See ``code_locations``.

        Raises:
            NoProcessError: none can be started now.
            SlotError: the child could not import the user's modules, or did not come up.
        """

    @abstractmethod
    def retire(self) -> None:
        """Have the child replaced when it has no task any more: the next ``prepare`` does it."""

    @abstractmethod
    async def run(
        self,
        order: Order,
        on_child: Callable[[int], None],
        on_order_taken: Callable[[], None] = lambda: None,
        on_run_start_logged: Callable[[], None] = lambda: None,
    ) -> Answer | ChildDied:
        """Give the child an order; its answer, or how it died.

        Args:
            on_child: called with the child's process group before it is given the order.
            on_order_taken: called when the child has the order, and has executed nothing of it.
            on_run_start_logged: called when Dagster's log has the start of a run; not for steps.

        Raises:
            SlotError: the child died before it had the order, and no other one comes up.
        """

    @abstractmethod
    def interrupt(self) -> None:
        """SIGTERM to the child, for Dagster to end the step; the child is replaced afterwards."""

    @abstractmethod
    def warn(self) -> None:
        """Tell the child that its task's soft time limit is over."""

    @abstractmethod
    def kill(self) -> None:
        """SIGKILL to the child and everything it has started."""

    @abstractmethod
    async def stop(self) -> None:
        """Kill the child and everything it has started, and wait for its end."""
