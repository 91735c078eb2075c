"""What servers' errors become: passing, final, or unclear. The texts are the servers' own."""

from __future__ import annotations

import asyncio

import psycopg
import pytest
from aiormq import exceptions as amqp
from pamqp.commands import Basic
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.connection import DefaultParser

from dagster_taskiq.brokers.amqp_errors import amqp_errors
from dagster_taskiq.errors import RefusedByServerError, ServerError, UnreachableServerError
from dagster_taskiq.servers.postgresql_client import server_errors as postgresql_errors
from dagster_taskiq.servers.redis_client import server_errors as redis_errors
from dagster_taskiq.servers.redis_rights import check_rights
from dagster_taskiq_tests.server_processes import free_port

ADDRESS = "redis://host/0"

PASSING_ON_REDIS = [
    "OOM command not allowed when used memory > 'maxmemory'.",
    "ERR Error running script (call to f_1): @user_script:9: -OOM command not allowed.",
    "LOADING Redis is loading the dataset in memory",
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    "READONLY You can't write against a read only replica.",
    "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist",
    "NOREPLICAS Not enough good replicas to write.",
    "CLUSTERDOWN The cluster is down",
    "TRYAGAIN Multiple keys request during rehashing of slot",
    "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
    "ERR max number of clients reached",
    "NOSCRIPT No matching script. Please use EVAL.",
]
UNCLEAR_ON_REDIS = [
    "WRONGPASS invalid username-password pair or user is disabled.",
    "NOAUTH Authentication required.",
    "NOPERM User worker has no permissions to run the 'info' command",
    "ERR something that no table knows",
]
FINAL_ON_REDIS = [
    "WRONGTYPE Operation against a key holding the wrong kind of value",
    "ERR unknown command 'EVALSHA', with args beginning with: ",
    "CROSSSLOT Keys in request don't hash to the same slot",
]


def of_redis(answer: str) -> ServerError:
    error = DefaultParser.parse_error(answer)
    with pytest.raises(ServerError) as caught, redis_errors(ADDRESS):
        raise error
    return caught.value


@pytest.mark.parametrize("answer", PASSING_ON_REDIS)
def test_a_redis_that_takes_nothing_just_now_passes(answer: str) -> None:
    assert isinstance(of_redis(answer), UnreachableServerError)


@pytest.mark.parametrize("answer", UNCLEAR_ON_REDIS)
def test_a_refusal_of_redis_that_may_be_a_change_under_way_is_not_final(answer: str) -> None:
    error = of_redis(answer)
    assert isinstance(error, RefusedByServerError)
    assert not error.is_final


@pytest.mark.parametrize("answer", FINAL_ON_REDIS)
def test_a_refusal_of_redis_that_no_waiting_mends_is_final(answer: str) -> None:
    error = of_redis(answer)
    assert isinstance(error, RefusedByServerError)
    assert error.is_final


@pytest.mark.parametrize(
    "error",
    [
        exceptions.ConnectionError("Error -2 connecting to nowhere:6379. Name does not resolve."),
        exceptions.TimeoutError("Timeout reading from host:6379"),
        ConnectionResetError("reset"),
    ],
)
def test_a_redis_that_does_not_answer_passes(error: Exception) -> None:
    """Refused, not resolving, silent."""
    with pytest.raises(UnreachableServerError, match="Cannot reach"), redis_errors(ADDRESS):
        raise error


def test_what_redis_says_is_named_with_advice() -> None:
    assert "'info' command" in str(of_redis(UNCLEAR_ON_REDIS[2]))
    assert "maxmemory" in str(of_redis(PASSING_ON_REDIS[0]))


PASSING_ON_RABBITMQ = [
    amqp.ChannelNotFoundEntity(
        "NOT_FOUND - home node 'rabbit@two' of durable queue 'q' in vhost '/' is down or "
        "inaccessible"
    ),
    amqp.ConnectionNotAllowed(
        "NOT_ALLOWED - access to vhost 'v' refused for user 'u': connection limit (1) is reached"
    ),
    amqp.ConnectionNotAllowed(
        "NOT_ALLOWED - access to vhost '/' refused for user 'u': user connection limit (1) is "
        "reached"
    ),
    amqp.ConnectionNotAllowed(
        "NOT_ALLOWED - access to vhost 'v' refused for user 'u': vhost 'v' is down"
    ),
    amqp.ChannelPreconditionFailed(
        "PRECONDITION_FAILED - cannot declare queue 'q': queue limit in vhost '/' (1) is reached"
    ),
    amqp.DeliveryError(None, Basic.Nack(1)),
    amqp.ConnectionClosed(320, "CONNECTION_FORCED - broker forced connection closure"),
    amqp.ConnectionInternalError("INTERNAL_ERROR - "),
    amqp.ConnectionResourceError("RESOURCE_ERROR - "),
    ConnectionRefusedError("refused"),
]
UNCLEAR_ON_RABBITMQ = [
    amqp.ProbableAuthenticationError("ACCESS_REFUSED - Login was refused"),
    amqp.ChannelAccessRefused("ACCESS_REFUSED - access to queue 'q' in vhost '/' refused"),
    amqp.ConnectionNotAllowed("NOT_ALLOWED - vhost v not found"),
]
FINAL_ON_RABBITMQ = [
    amqp.ChannelPreconditionFailed("PRECONDITION_FAILED - inequivalent arg 'durable'"),
    amqp.ChannelPreconditionFailed(
        "PRECONDITION_FAILED - message size 3 is larger than configured max size 2"
    ),
]


def of_rabbitmq(error: Exception) -> ServerError:
    with pytest.raises(ServerError) as caught, amqp_errors("amqp://host/"):
        raise error
    return caught.value


@pytest.mark.parametrize("error", PASSING_ON_RABBITMQ, ids=lambda error: type(error).__name__)
def test_a_rabbitmq_that_takes_nothing_just_now_passes(error: Exception) -> None:
    assert isinstance(of_rabbitmq(error), UnreachableServerError)


@pytest.mark.parametrize("error", UNCLEAR_ON_RABBITMQ, ids=lambda error: type(error).__name__)
def test_a_refusal_of_rabbitmq_that_may_be_a_change_under_way_is_not_final(
    error: Exception,
) -> None:
    ours = of_rabbitmq(error)
    assert isinstance(ours, RefusedByServerError)
    assert not ours.is_final


@pytest.mark.parametrize("error", FINAL_ON_RABBITMQ, ids=lambda error: type(error).__name__)
def test_a_refusal_of_rabbitmq_that_no_waiting_mends_is_final(error: Exception) -> None:
    ours = of_rabbitmq(error)
    assert isinstance(ours, RefusedByServerError)
    assert ours.is_final


PASSING_ON_POSTGRESQL = [
    psycopg.errors.lookup(code)("words of the server")
    for code in (
        *("08006", "0A000", "25006", "3F000", "40001", "40P01", "42P01", "42883", "53100"),
        *("53200", "53300", "55P03", "57014", "57P01", "57P02", "57P03", "57P05"),
    )
] + [
    psycopg.OperationalError("connection failed: FATAL:  sorry, too many clients already"),
    psycopg.OperationalError("connection failed: FATAL:  the database system is starting up"),
    psycopg.OperationalError("server closed the connection unexpectedly"),
    psycopg.OperationalError("Verbindung fehlgeschlagen"),
    psycopg.OperationalError("connection failed: session is read-only"),
    ConnectionRefusedError("refused"),
]
UNCLEAR_ON_POSTGRESQL = [
    psycopg.errors.lookup("28P01")("password authentication failed"),
    psycopg.errors.lookup("3D000")("no such database"),
    psycopg.errors.lookup("42501")("permission denied for table tasks"),
    psycopg.errors.lookup("XX000")("something that no table knows"),
    psycopg.OperationalError('connection failed: FATAL:  password authentication failed for "u"'),
    psycopg.OperationalError('connection failed: FATAL:  database "d" does not exist'),
    psycopg.OperationalError("connection failed: FATAL:  no pg_hba.conf entry for host"),
]
FINAL_ON_POSTGRESQL = [
    psycopg.errors.lookup("42703")("no such column"),
    psycopg.OperationalError("server does not support SSL, but SSL was required"),
    psycopg.OperationalError("SSL error: certificate verify failed"),
    psycopg.OperationalError('root certificate file "/no.crt" does not exist'),
]


def of_postgresql(error: Exception) -> ServerError:
    with pytest.raises(ServerError) as caught, postgresql_errors("postgresql://host/d"):
        raise error
    assert "postgresql://host/d" in str(caught.value)
    return caught.value


@pytest.mark.parametrize("error", PASSING_ON_POSTGRESQL, ids=lambda error: type(error).__name__)
def test_a_postgresql_that_takes_nothing_just_now_passes(error: Exception) -> None:
    assert isinstance(of_postgresql(error), UnreachableServerError)


@pytest.mark.parametrize("error", UNCLEAR_ON_POSTGRESQL, ids=lambda error: type(error).__name__)
def test_a_refusal_of_postgresql_that_may_be_a_change_under_way_is_not_final(
    error: Exception,
) -> None:
    ours = of_postgresql(error)
    assert isinstance(ours, RefusedByServerError)
    assert not ours.is_final


@pytest.mark.parametrize("error", FINAL_ON_POSTGRESQL, ids=lambda error: type(error).__name__)
def test_a_refusal_of_postgresql_that_no_waiting_mends_is_final(error: Exception) -> None:
    ours = of_postgresql(error)
    assert isinstance(ours, RefusedByServerError)
    assert ours.is_final


async def _check_rights() -> None:
    async with Redis(port=free_port()) as client:
        await check_rights(client, ADDRESS, "key", ["PING"])


def test_a_server_that_goes_before_its_rights_are_looked_at() -> None:
    """It is away, as it is for all that comes before and after, so a worker waits for it."""
    with pytest.raises(UnreachableServerError, match=ADDRESS):
        asyncio.run(_check_rights())
