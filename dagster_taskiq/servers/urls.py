"""URLs as texts: their parts, and how they are shown without their passwords."""

from __future__ import annotations

import re
from urllib.parse import SplitResult, urlsplit, urlunsplit

from dagster_taskiq.errors import ConfigError

_PASSWORD_IN_QUERY = re.compile(r"(?P<head>[?&]\w*passw(?:or)?d=)[^&\s]+", re.IGNORECASE)

#: What must be written with a percent sign in user names and passwords, in words.
_TO_BE_ESCAPED = (
    "in its user name and password '/', '?', '#', '[', ']', '%' and white space must be "
    "percent-encoded, as %2F, %3F, %23, %5B, %5D, %25 and %20"
)


def split_url(url: str) -> SplitResult:
    """The parts of a URL ``scheme://...``, which all readers of it agree on.

    Raises:
        ConfigError: it is none. The error says what is wrong and never repeats a part of the URL,
            which could be of a password.
    """
    _, _, rest = url.partition("://")
    if re.search(r"[\s\x00-\x1f\x7f]", url):
        raise _unreadable("it has white space or control characters")
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    path, _, query = rest[len(authority) :].partition("?")
    if "@" in path or "@" in query.partition("#")[2] or ("@" in query and "@" not in authority):
        raise _unreadable("an '@' stands after a '/', '?' or '#'")
    login, _, _ = authority.rpartition("@")
    if re.search(r"[\[\]]", login):
        raise _unreadable("its user name or password has a '[' or ']' in it")
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        problem = "its host or port is none (is the '@' before the host missing?)"
        raise _unreadable(problem) from None
    return parts


def _unreadable(problem: str) -> ConfigError:
    return ConfigError(f"The URL of a server cannot be read: {problem}; {_TO_BE_ESCAPED}.")


def with_scheme(url: str, scheme: str) -> str:
    """The URL with another scheme."""
    return f"{scheme}{url[url.index('://') :]}"


def normalize_postgresql(url: str) -> str:
    """The URL as libpq reads it: the scheme in lower case, without the driver of SQLAlchemy's."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme.partition('+')[0].lower()}{separator}{rest}"


def normalize_amqp(url: str) -> str:
    """An AMQP URL as aio-pika reads it.

    dagster-celery's ``pyamqp`` is ``amqp`` by another name, and both of Celery's ways to say the
    default virtual host, no path and the path ``//``, become the one that aio-pika knows.
    """
    parts = split_url(url)
    scheme = "amqp" if parts.scheme.lower() == "pyamqp" else parts.scheme.lower()
    path = "/" if parts.path == "//" else parts.path
    netloc = parts.netloc
    if "@" in netloc and ":" not in netloc.rpartition("@")[0]:
        # kombu takes a missing password for "guest" as the default one
        user, _, host = netloc.rpartition("@")
        netloc = f"{user}:guest@{host}" if user == "guest" else netloc
    # urlunsplit would drop the "//" of a host-less URL, which no AMQP URL is
    return urlunsplit((scheme, netloc, path, parts.query, parts.fragment))


def redact(text: str) -> str:
    """The text with the password of every URL in it replaced by ``***``."""
    words = re.split(r"(\s+)", text)
    return _PASSWORD_IN_QUERY.sub(r"\g<head>***", "".join(map(_without_password, words)))


def redact_url(url: str) -> str:
    """The same for a text that is one URL and nothing else, where a password may have spaces."""
    return redact(re.sub(r"\s", "%20", url)) if "://" in url else "(no URL)"


def _without_password(word: str) -> str:
    """A word without the password of the URL in it, which may go up to the last "@" of the word.

    Not a regular expression: it would take a time that grows with the square of the length.
    """
    end = word.rfind("@")
    start = 0
    while (start := word.find("://", start, max(0, end))) != -1:
        if start and re.match(r"[a-z0-9+.-]", word[start - 1], re.IGNORECASE):
            login = word[start + 3 : end]
            user, colon, _ = login.partition(":")
            return f"{word[: start + 3]}{user}{':***' if colon else ''}{word[end:]}"
        start += 3
    return word
