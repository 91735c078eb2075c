"""Errors of RabbitMQ and its libraries, as errors of ours with the server's words."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import pamqp.commands
from aio_pika.exceptions import CONNECTION_EXCEPTIONS
from aiormq import exceptions

from dagster_taskiq.brokers.amqp_properties import is_ours
from dagster_taskiq.defaults import MAX_PRIORITY
from dagster_taskiq.errors import ServerError, UnreachableServerError
from dagster_taskiq.servers.kinds import RABBITMQ, uses_tls
from dagster_taskiq.servers.server_refusals import Outlook, find_refusal, refusal_error
from dagster_taskiq.servers.tls import reset_hint, tls_refusal
from dagster_taskiq.servers.urls import redact


def words_of_close(error: BaseException) -> str:
    """RabbitMQ's words in the frame that aiormq did not expect; its error leaves them out.

    Empty where it is not found. Only these words tell a limit from a virtual host that is missing.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        close = frame.f_locals.get("frame")
        if isinstance(close, pamqp.commands.Connection.Close):
            return str(close.reply_text)
    return ""


#: aiormq logs the first for each try to connect, of which an outage has many, and the second, with
#: a traceback, for each lost connection. Our own error or warning says it.
_SAID_BY_US = ("error when creating transport", "Cancelling cause reader exited abnormally")


@contextmanager
def our_message_is_enough() -> Iterator[None]:
    """Connect without the client library's log lines about what we say ourselves."""
    token = is_ours.set(True)
    try:
        yield
    finally:
        is_ours.reset(token)


def _is_of_use(record: logging.LogRecord) -> bool:
    return not (is_ours.get() and str(record.msg).startswith(_SAID_BY_US))


logging.getLogger("aiormq.connection").addFilter(_is_of_use)


@contextmanager
def amqp_errors(address: str) -> Iterator[None]:
    """Raise what the client library raises as an error of ours.

    Args:
        address: of the server, without a password.

    Raises:
        ServerError: with the server's words, and what to do.
    """
    try:
        yield
    except CONNECTION_EXCEPTIONS as error:
        if (code := _reply_code(error)) is not None:
            raise _refusal(address, code, error) from error
        if refusal := tls_refusal(address, error):
            raise refusal from error
        hint = reset_hint(error) if uses_tls(address) else ""
        raise _unreachable(address, redact(str(error)), hint) from error
    except asyncio.CancelledError as error:
        # not ours: one of aiormq's ways to end the calls on a lost connection
        raise _unreachable(address) from error
    except Exception as error:
        if type(error) is not Exception:
            raise
        # the other one of its ways
        raise _unreachable(address) from error


def _unreachable(address: str, text: str = "", hint: str = "") -> UnreachableServerError:
    reason = text.rstrip(".") or "the connection was lost"
    return UnreachableServerError(address, f"Cannot reach {address}: {reason}.{hint}")


#: Those of aiormq's errors that are answers of RabbitMQ, with the reply code that it leaves out.
_REPLY_CODES: tuple[tuple[type[Exception], str], ...] = (
    (exceptions.AuthenticationError, "403"),
    (exceptions.ProbableAuthenticationError, "403"),
    (exceptions.ConnectionNotAllowed, "530"),
    (exceptions.ConnectionResourceError, "506"),
    (exceptions.ConnectionNotImplemented, "540"),
    (exceptions.ConnectionInternalError, "541"),
    (exceptions.ChannelAccessRefused, "403"),
    (exceptions.ChannelNotFoundEntity, "404"),
    (exceptions.ChannelLockedResource, "405"),
    (exceptions.ChannelPreconditionFailed, "406"),
    (exceptions.AMQPChannelError, "channel closed"),
    (exceptions.DeliveryError, "nack"),
)


def _reply_code(error: BaseException) -> str | None:
    """The code of RabbitMQ's answer; None where the error is no answer."""
    for kind, code in _REPLY_CODES:
        if isinstance(error, kind):
            return code
    is_close = isinstance(error, exceptions.ConnectionClosed) and len(error.args) == 2
    return str(error.args[0]) if is_close and error.args[0] else None


def _refusal(address: str, code: str, error: BaseException) -> ServerError:
    text = redact(str(error)).rstrip(".")
    refusal = find_refusal(RABBITMQ.refusals, f"{code} {text}")
    if refusal.outlook is Outlook.PASSES:
        return refusal_error(address, refusal, f"{address} takes nothing now: {text}.")
    if code == "406" and "inequivalent" in text:
        sentence = (
            f"{address} has a queue of that name which is of another kind: {text}. Delete it while "
            "it is empty, or set another key_prefix; it must be a durable classic queue with "
            f"x-max-priority {MAX_PRIORITY}."
        )
    elif isinstance(error, exceptions.AMQPConnectionError):
        sentence = f"{address} refuses the connection: {text}."
    else:
        sentence = f"{address} refuses: {text}."
    return refusal_error(address, refusal, sentence)
