"""Every error that the package raises on purpose, in one tree; ``unit/test_errors.py`` keeps it so.

    DagsterTaskiqError
    ├── ConfigError              a setting, tag, YAML file or URL that cannot be used
    │   └── TagError             a tag of a step or run
    ├── ServerError              a broker or backend, with its address
    │   ├── UnreachableServerError   away, or takes nothing just now
    │   └── RefusedByServerError     wrong password, no permission, wrong kind of queue
    ├── EmbeddedServerError      the embedded server cannot be started
    ├── ForeignPathError         a file or directory that must be ours is somebody else's
    ├── MalformedTaskError       a message that is no task of ours
    ├── MalformedResultError     a result that cannot be decoded
    ├── SoftTimeLimitError       raised in a step's code when its soft time limit is over
    ├── EventsNotWrittenError    Dagster's event log did not take what was to be written
    ├── DatabaseAwayError        Dagster's database did not come back in time
    ├── OtherBackendError        a task of a run that has another backend than the worker
    ├── UntrustedError           not signed with a key of ours, or a replay
    │   └── TooLargeError            longer than max_message_bytes
    ├── TaskRefusedError         a task that a worker has claimed, and must not or cannot execute
    │   └── WrongInstanceError       it is of another Dagster instance than the worker's
    ├── CopyOfStepError          an attempt of a step that Dagster's log has as begun
    ├── UnloadableCodeError      the code of a job is not where a worker looks for it, or raises
    ├── PatchedLibraryError      user code has replaced parts of the standard library
    ├── SupersededLoopError      a newer execution loop of the same run has taken over
    ├── LauncherClosedError      the launcher was asked for something after its end
    ├── WorkerFailedError        a part of a worker ended that must not end
    ├── SlotError                a worker's child process did not become ready
    │   ├── NoProcessError           no process can be started now
    │   └── UnusableTemplateError    no children can be forked from code that was loaded
    ├── ChannelLostError         a child's connection to its worker was closed by user code
    └── DemoError                the demo cannot go on

Not in it are the errors by which a library is told something (Click's, argparse's, Dagster's
interrupt), and the ValueError or TypeError of a function that parses, of which its caller makes one
of these.

Messages are for the reader at 3 a.m.: what failed, where, what to do; never a password.
"""

from __future__ import annotations


class DagsterTaskiqError(Exception):
    """Root of the tree."""


class ConfigError(DagsterTaskiqError):
    """A setting cannot be used; the message names it and what is allowed."""


class TagError(ConfigError):
    """A tag's value cannot be used."""

    def __init__(self, tag: str, value: str, expected: str) -> None:
        super().__init__(f"Tag {tag!r} has the value {value!r}, expected {expected}.")
        self.tag = tag
        self.value = value


class ServerError(DagsterTaskiqError):
    """A broker or backend did not do what it was asked.

    Args:
        address: the server's URL without its password.
        message: what went wrong and what to do.
    """

    def __init__(self, address: str, message: str) -> None:
        super().__init__(message)
        self.address = address


class UnreachableServerError(ServerError):
    """Nothing answers at the address, or not in time, or the server takes nothing just now."""


class RefusedByServerError(ServerError):
    """The server answered, and refused: credentials, permissions, or a conflicting declaration.

    Args:
        is_final: whether no waiting mends it. Anything else, such as refused credentials, is a
            mistake where nothing has worked yet, and may pass where it has.
    """

    def __init__(self, address: str, message: str, *, is_final: bool = False) -> None:
        super().__init__(address, message)
        self.is_final = is_final


class EmbeddedServerError(DagsterTaskiqError):
    """The embedded server cannot be started or did not come up."""


class ForeignPathError(DagsterTaskiqError):
    """A path that must belong to the user of this process belongs to somebody else."""


class MalformedTaskError(DagsterTaskiqError):
    """A message is not a task of ours, or of a version that this worker does not know."""


class MalformedResultError(DagsterTaskiqError):
    """A stored result cannot be decoded."""


class EventsNotWrittenError(DagsterTaskiqError):
    """Dagster's event log did not take what was to be written."""


class DatabaseAwayError(DagsterTaskiqError):
    """Dagster's database is away, and was waited for in vain."""


class UntrustedError(DagsterTaskiqError):
    """What was read is not signed with a key of ours, is for somebody else, or a replay."""


class OtherBackendError(DagsterTaskiqError):
    """A task is of a run whose claims and results are in another backend than this worker's.

    Args:
        run_id: of the run.
        note: for the run, ready to be sent.
    """

    def __init__(self, text: str, run_id: str, note: bytes) -> None:
        super().__init__(text)
        self.run_id = run_id
        self.note = note


class TooLargeError(UntrustedError):
    """A message or result is longer than the setting ``max_message_bytes``."""

    def __init__(self, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"it has {size_bytes:,} bytes, and the setting max_message_bytes allows {limit_bytes:,}"
        )
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes

    def of(self, what: str) -> TooLargeError:
        """The same error as a sentence that begins with what it happened to."""
        error = TooLargeError(self.size_bytes, self.limit_bytes)
        error.args = (f"{what}: {self}.",)
        return error


class TaskRefusedError(DagsterTaskiqError):
    """The step or run must not or cannot be executed here; the message says why."""


class WrongInstanceError(TaskRefusedError):
    """The step or run belongs to another Dagster instance than this worker's."""


class CopyOfStepError(DagsterTaskiqError):
    """Dagster's log has this attempt of the step as begun; the message says where."""


class UnloadableCodeError(DagsterTaskiqError):
    """The code of a job cannot be loaded; the message says what was looked for and where."""


class PatchedLibraryError(DagsterTaskiqError):
    """User code has replaced a part of the standard library that is needed as it is."""


class SupersededLoopError(DagsterTaskiqError):
    """Another execution loop of the same run, started later, has taken over."""


class SoftTimeLimitError(DagsterTaskiqError):
    """A step has run for longer than its soft time limit.

    Raised in the middle of the step's code, which may catch it to clean up; otherwise the attempt
    fails with it and the step's retry policy decides.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(f"The step's soft time limit of {seconds:g} s is over.")
        self.seconds = seconds


class LauncherClosedError(DagsterTaskiqError):
    """The launcher has left its servers, and was asked for something that needs them."""


class WorkerFailedError(DagsterTaskiqError):
    """A part of the worker ended that must not end; the message names it."""


class SlotError(DagsterTaskiqError):
    """A child process did not become ready; the message has the reason it gave."""


class NoProcessError(SlotError):
    """The system is short of processes, memory or file descriptors, or the fork server is gone.

    It says nothing about the task: another worker can execute it, or this one later.
    """


class UnusableTemplateError(SlotError):
    """No children can be forked from code that was loaded; the message has the reason.

    Args:
        reason: in words.
        title: of the code, for people; empty where it is not known.
        is_final: whether it would be the same the next time.
    """

    def __init__(self, reason: str, title: str = "", *, is_final: bool = False) -> None:
        super().__init__(reason)
        self.title = title
        self.is_final = is_final


class ChannelLostError(DagsterTaskiqError, ConnectionError):
    """The descriptor of a child's socket is not the socket any more: user code has closed it."""


class DemoError(DagsterTaskiqError):
    """The demo cannot go on; the message has the last lines of the logs that say why."""
