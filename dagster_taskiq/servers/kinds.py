"""Servers: which kind a URL names, how it is reached, and how it is shown without its password."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from dagster_taskiq.defaults import CONNECT_TIMEOUT_SECONDS, KEY_PREFIX
from dagster_taskiq.errors import ConfigError, RefusedByServerError

AMQP_SCHEMES = ("amqp", "amqps", "pyamqp")
REDIS_SCHEMES = ("redis", "rediss", "unix")


@dataclass(frozen=True)
class Tls:
    """How a ``rediss://`` or ``amqps://`` server is verified; by default by the system's CAs.

    Attributes:
        ca_file: PEM file of the authorities to trust instead of the system's.
        cert_file, key_file: PEM files of the certificate that we show.
        verify: whether the server's certificate is checked, and with it its host name.
        check_hostname: whether that is, too.
    """

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    verify: bool = True
    check_hostname: bool = True

    def context(self) -> ssl.SSLContext:
        """The same as Python's TLS library takes it.

        Raises:
            ConfigError: a file is missing or is no certificate.
        """
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
            if self.cert_file:
                context.load_cert_chain(self.cert_file, self.key_file)
        except OSError as error:
            files = ", ".join(filter(None, (self.ca_file, self.cert_file, self.key_file)))
            raise ConfigError(f"Cannot load the TLS files {files}: {error}.") from None
        context.check_hostname = self.verify and self.check_hostname
        if not self.verify:
            context.verify_mode = ssl.CERT_NONE
        return context


@dataclass(frozen=True)
class ServerOptions:
    """What it takes to reach a broker or backend.

    Attributes:
        url: with its password; never log it, log ``address``.
        key_prefix: start of the name of every key and physical queue of ours.
        connect_timeout_seconds: after which a server that does not answer is unreachable.
        heartbeat_seconds: of an AMQP connection; None is the server's own.
        tls: for ``rediss://`` and ``amqps://``.
    """

    url: str
    key_prefix: str = KEY_PREFIX
    connect_timeout_seconds: float = CONNECT_TIMEOUT_SECONDS
    heartbeat_seconds: int | None = None
    tls: Tls = Tls()

    @property
    def address(self) -> str:
        """The URL without its password."""
        return redact_url(self.url)

    def __repr__(self) -> str:
        return f"ServerOptions({self.address!r}, key_prefix={self.key_prefix!r})"


#: What OpenSSL calls a failure, in the texts of all libraries above it, and its explanation.
_TLS_FAILURE = re.compile(r"\[SSL: (?P<name>\w+)\] ?(?P<text>[^(\[]*)")


_TLS_SETTING = "config_source.broker_use_ssl (of the backend: redis_backend_use_ssl)"


def tls_refusal(address: str, error: BaseException) -> RefusedByServerError | None:
    """The error to raise where TLS failed, which no second try mends; None where it did not."""
    match = _TLS_FAILURE.search(_texts(error))
    if match is None:
        return None
    name = match["name"]
    text = match["text"].strip(" .:").removeprefix("certificate verify failed: ")
    if name == "CERTIFICATE_VERIFY_FAILED":
        problem = f"its certificate cannot be trusted: {text}"
        advice = (
            "Use a host name that is in it"
            if "mismatch" in text
            else f"Set ca_certs in {_TLS_SETTING} to the file of the CA that has signed it"
        )
    elif "ALERT" in name:
        problem = f"it refuses our side of TLS: {text}"
        advice = (
            f"Set certfile and keyfile in {_TLS_SETTING} to a client certificate that it accepts"
        )
    else:
        problem = f"TLS failed: {name} {text}".rstrip()
        advice = "Check the scheme and the port of the URL"
    return RefusedByServerError(address, f"Cannot use {address}: {problem}. {advice}.")


def reset_hint(address: str, error: BaseException) -> str:
    """What a connection that was reset may mean; empty for another error."""
    is_tls = address.lower().startswith(("rediss://", "amqps://"))
    if not is_tls or not re.search("reset|closed|EOF", _texts(error), re.IGNORECASE):
        return ""
    return (
        " (A server that demands a client certificate and gets none may do this too: set certfile "
        f"and keyfile in {_TLS_SETTING}.)"
    )


def _texts(error: BaseException | None) -> str:
    """The texts of an error and of what it came from."""
    texts: list[str] = []
    while error is not None and len(texts) < 10:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


_PASSWORD_IN_QUERY = re.compile(r"(?P<head>[?&]\w*passw(?:or)?d=)[^&\s]+", re.IGNORECASE)

#: What must be written with a percent sign in user names and passwords, in words.
_TO_BE_ESCAPED = (
    "in its user name and password '/', '?', '#', '[', ']', '%' and white space must be "
    "percent-encoded, as %2F, %3F, %23, %5B, %5D, %25 and %20"
)


def split_url(url: str) -> SplitResult:
    """The parts of a server's URL, which all readers of it agree on.

    Raises:
        ConfigError: it is none, or of a scheme that neither broker nor backend speaks. The error
            says what is wrong and never repeats a part of the URL, which could be of a password.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme.lower() not in (*AMQP_SCHEMES, *REDIS_SCHEMES):
        known = ", ".join(f"{name}://" for name in (*AMQP_SCHEMES, *REDIS_SCHEMES))
        raise ConfigError(f"The URL of a server must start with {known}, and this one does not.")
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


def scheme_of(url: str) -> str:
    """The URL's scheme in lower case.

    Raises:
        ConfigError: see ``split_url``.
    """
    return split_url(url).scheme.lower()


def is_amqp(url: str) -> bool:
    """Whether the URL names a RabbitMQ server."""
    return scheme_of(url) in AMQP_SCHEMES


def is_redis(url: str) -> bool:
    """Whether the URL names a Redis or Valkey server."""
    return scheme_of(url) in REDIS_SCHEMES


def normalize_amqp(url: str) -> str:
    """The URL as aio-pika reads it.

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


_DEFAULT_PORTS = {"amqp": 5672, "amqps": 5671, "redis": 6379, "rediss": 6379}


def is_same_address(one: str, other: str) -> bool:
    """Whether two addresses name the same server, and the same virtual host or database there.

    Who logs in makes no difference. Different names of one host count as different servers.
    """
    return _place_of(one) == _place_of(other)


def _place_of(address: str) -> tuple[object, ...]:
    try:
        parts = urlsplit(address)
        scheme = parts.scheme.removeprefix("py")
        port = parts.port or _DEFAULT_PORTS.get(scheme)
    except ValueError:  # an address that a stranger has written
        return (address,)
    nothing = "" if scheme.startswith("amqp") else "0"
    path = unquote(parts.path).strip("/") or nothing
    return scheme, parts.hostname, port, path, parts.query if scheme == "unix" else ""


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
