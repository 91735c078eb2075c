"""What a server's refusal means: which pass, which are final, and which may be either.

One table for each kind of server, of one shape; the kinds that may be broker or backend name
theirs in ``kinds``. A row is found by the server's code and text. The first one that matches
counts, and what no row knows may be either.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from dagster_taskiq.errors import RefusedByServerError, ServerError, UnreachableServerError


class Outlook(Enum):
    """Whether it is of use to ask again later."""

    #: The server will take it: it starts, is full, changes over, has a limit that others use up.
    PASSES = "passes"
    #: A mistake where nothing has worked yet; a change under way where it has.
    UNCLEAR = "unclear"
    #: No waiting mends it.
    FINAL = "final"


@dataclass(frozen=True)
class Refusal:
    """One row.

    Attributes:
        pattern: regular expression that finds it in the code and text.
        outlook: whether it is of use to ask again.
        advice: sentence for people, or nothing.
    """

    pattern: str
    outlook: Outlook
    advice: str = ""


#: Redis and Valkey: the error's prefix and text, as the server sends them.
REDIS_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        r"\bOOM\b|maxmemory",
        Outlook.PASSES,
        "Make room or raise maxmemory; the policy must be noeviction.",
    ),
    Refusal(
        r"\bMISCONF\b",
        Outlook.PASSES,
        "It cannot write its file: look for a full disk, or its log.",
    ),
    Refusal(r"\b(?:READONLY|MASTERDOWN)\b", Outlook.PASSES, "It is a replica."),
    Refusal(r"\b(?:LOADING|NOREPLICAS|CLUSTERDOWN|TRYAGAIN|BUSY|UNKILLABLE)\b", Outlook.PASSES),
    Refusal(
        r"max number of clients",
        Outlook.PASSES,
        "Raise maxclients, or look for unused connections.",
    ),
    Refusal(r"\bNOSCRIPT\b", Outlook.PASSES, "It was restarted in the middle of a command."),
    Refusal(r"\b(?:WRONGPASS|NOAUTH)\b|invalid password|AUTH", Outlook.UNCLEAR, "Check the URL."),
    Refusal(
        r"\bNOPERM\b",
        Outlook.UNCLEAR,
        "Give the user all commands but @admin and @dangerous, INFO, and all keys and channels "
        "under the key_prefix.",
    ),
    Refusal(
        r"\b(?:CROSSSLOT|MOVED|ASK)\b",
        Outlook.FINAL,
        "Redis Cluster is not supported: use a server, or Sentinel's or a proxy's address.",
    ),
    Refusal(
        r"\bWRONGTYPE\b", Outlook.FINAL, "Another program uses the key: set another key_prefix."
    ),
    Refusal(r"unknown command|wrong number of arguments|DB index", Outlook.FINAL),
)

#: RabbitMQ: the AMQP reply code and text; "nack" where it refuses a message without a word.
AMQP_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        r"limit\b.*\breached|reached the maximum",
        Outlook.PASSES,
        "Raise the limit, or look for what else uses it up.",
    ),
    Refusal(r"\bis down\b|inaccessible|\bprocess is stopped\b", Outlook.PASSES),
    Refusal(
        r"^nack\b",
        Outlook.PASSES,
        "Its queue rejects messages: look at x-max-length and x-overflow of its policy.",
    ),
    Refusal(r"^(?:311|313|320|404|405|506|541)\b", Outlook.PASSES),
    Refusal(r"^406\b.*\binequivalent\b", Outlook.FINAL),
    Refusal(r"^406\b.*\bsize\b", Outlook.FINAL, "Raise its max_message_size."),
    Refusal(r"^540\b", Outlook.FINAL),
    Refusal(r"^403\b.*(?:queue|exchange|vhost)", Outlook.UNCLEAR, "Give the user all rights."),
    Refusal(r"^(?:403|530)\b", Outlook.UNCLEAR, "Check the URL."),
)

#: PostgreSQL: the SQLSTATE, which is empty where libpq could not connect, and the text. A full disk
#: is not among those that pass: a server that answers so may do it for days.
POSTGRESQL_REFUSALS: tuple[Refusal, ...] = (
    Refusal(r"^08", Outlook.PASSES),  # the connection is lost, or was not made
    Refusal(r"^25006\b", Outlook.PASSES),  # read-only: a standby, after a failover
    Refusal(r"^(?:40001|40P01|55P03)\b", Outlook.PASSES),  # lost against another statement
    Refusal(r"^53300\b", Outlook.PASSES),  # too many connections
    Refusal(r"^57P0[1235]\b", Outlook.PASSES),  # it starts, stops or recovers; an idle timeout
    # in other languages than English such a connection is waited for as well
    Refusal(
        r"^ .*(?:authentication failed|no pg_hba\.conf entry|does not exist|permission denied|"
        r"certificate|does not support SSL|invalid (?:connection option|port)|"
        r"no password supplied)",
        Outlook.FINAL,
    ),
    Refusal(r"^ ", Outlook.PASSES),
)

#: The same for a server that is broker or backend: its errors about our own tables, and what keeps
#: runs waiting rather than failing. ``client`` stands for an SQLSTATE where psycopg itself objects.
POSTGRESQL_SERVER_REFUSALS: tuple[Refusal, ...] = (
    Refusal(r"^53100\b", Outlook.PASSES, "Make room on its disk."),
    Refusal(
        r"^53300\b|^ .*(?:too many (?:clients|connections)|remaining connection slots)",
        Outlook.PASSES,
        "Raise max_connections, or look for unused connections.",
    ),
    Refusal(r"^53", Outlook.PASSES),  # it is short of memory or of something else
    Refusal(r"^(?:25006|0A000)\b", Outlook.PASSES, "It is a standby, or read-only."),
    Refusal(r"^57014\b", Outlook.PASSES),  # a statement_timeout of the user's
    Refusal(r"^(?:3F000|42P01|42883)\b", Outlook.PASSES, "The schema is made again."),
    Refusal(
        r"^(?:28\w{3}|3D000)\b|^ .*(?:authentication failed|no pg_hba\.conf entry|"
        r"no password supplied|(?:role|user|database) .* does not exist|permission denied)",
        Outlook.UNCLEAR,
        "Check the URL.",
    ),
    Refusal(
        r"^42501\b",
        Outlook.UNCLEAR,
        "Give the user USAGE on the schema, and SELECT, INSERT, UPDATE and DELETE on its tables.",
    ),
    Refusal(r"^42", Outlook.FINAL),
    *POSTGRESQL_REFUSALS,
)

#: MySQL and MariaDB: the error number and the text.
MYSQL_REFUSALS: tuple[Refusal, ...] = (
    Refusal(r"^(?:1040|1203)\b", Outlook.PASSES),  # too many connections
    Refusal(r"^1053\b", Outlook.PASSES),  # it shuts down
    Refusal(r"^(?:1205|1213)\b", Outlook.PASSES),  # lost against another statement
    Refusal(r"^(?:1290|1792|1836)\b", Outlook.PASSES),  # read-only
    Refusal(r"^(?:2002|2003|2005)\b", Outlook.PASSES),  # cannot be reached
    Refusal(r"^(?:2006|2013|2055)\b", Outlook.PASSES),  # the connection is lost
)


def find_refusal(table: Sequence[Refusal], text: str) -> Refusal:
    """The row of a table for a server's code and text."""
    for row in table:
        if re.search(row.pattern, text, re.IGNORECASE | re.DOTALL):
            return row
    return Refusal("", Outlook.UNCLEAR)


def refusal_error(address: str, refusal: Refusal, sentence: str) -> ServerError:
    """The error to raise for a refusal.

    Args:
        sentence: what was refused where, in the server's words, with its full stop.
    """
    text = f"{sentence} {refusal.advice}".rstrip()
    if refusal.outlook is Outlook.PASSES:
        return UnreachableServerError(address, text)
    return RefusedByServerError(address, text, is_final=refusal.outlook is Outlook.FINAL)
