"""TLS: how a server is verified, what settings and URLs say about it, and what its errors mean.

Celery's users write the same in several ways, kombu's ``broker_use_ssl`` and the parameters of a
``rediss://`` URL, of which redis-py understands one. All of them become a ``Tls`` here.
"""

from __future__ import annotations

import difflib
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlunsplit

from dagster_taskiq.errors import ConfigError, RefusedByServerError
from dagster_taskiq.servers.urls import split_url


@dataclass(frozen=True)
class Tls:
    """How a server is verified; by default by the system's CAs.

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


#: The options in kombu's two spellings, and the field of ``Tls`` each one sets.
_FIELDS = {
    f"{prefix}{name}": field
    for prefix in ("", "ssl_")
    for name, field in (
        ("ca_certs", "ca_file"),
        ("certfile", "cert_file"),
        ("keyfile", "key_file"),
        ("cert_reqs", "verify"),
        ("check_hostname", "check_hostname"),
    )
}

#: What says no, in the spellings of Python's ``ssl``, of redis-py, of Celery and of YAML.
_NO = ("0", "NONE", "CERT_NONE", "VERIFYMODE.CERT_NONE", "FALSE", "NO")


def parse_tls(name: str, value: Any) -> Tls | None:
    """The value of ``broker_use_ssl`` or ``redis_backend_use_ssl``; None for no TLS.

    Args:
        name: of the setting, for errors.

    Raises:
        ConfigError: it is no mapping, or has an unknown option or an empty one.
    """
    if not value:
        return None
    if value is True:
        return Tls()
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a mapping, true or false, not {type(value).__name__}.")
    values: dict[str, Any] = {}
    for key, option in value.items():
        if key not in _FIELDS:
            nearest = difflib.get_close_matches(str(key), _FIELDS, n=1)
            hint = (
                f"Did you mean {nearest[0]!r}?" if nearest else f"Known are: {', '.join(_FIELDS)}."
            )
            raise ConfigError(f"{name} has no option {key!r}. {hint}")
        # the number of an ssl.VerifyMode is what it is known by
        text = str(int(option)) if isinstance(option, int) else str(option).strip()
        if option is None or not text:
            raise ConfigError(f"{name}.{key} is {option!r}, expected a text that is not empty.")
        is_switch = _FIELDS[key] in ("verify", "check_hostname")
        values[_FIELDS[key]] = text.upper() not in _NO if is_switch else text
    return Tls(**values)


def take_ssl_parameters(url: str, tls: Tls | None) -> tuple[str, Tls]:
    """A URL without its ``ssl_`` parameters, and what they and the settings say together.

    Args:
        tls: of the settings; a parameter of the URL goes before it.

    Raises:
        ConfigError: the URL cannot be read, or one of the parameters cannot be used.
    """
    parts = split_url(url)
    parameters = parse_qsl(parts.query, keep_blank_values=True)
    ours = {key: value for key, value in parameters if key in _FIELDS and key.startswith("ssl_")}
    if not ours:
        return url, tls or Tls()
    others = urlencode([(key, value) for key, value in parameters if key not in ours])
    given = parse_tls("The server's URL", ours) or Tls()
    changed = {_FIELDS[key]: getattr(given, _FIELDS[key]) for key in ours}
    return urlunsplit(parts._replace(query=others)), replace(tls or Tls(), **changed)


#: What OpenSSL calls a failure, in the texts of all libraries above it, and its explanation.
_TLS_FAILURE = re.compile(r"\[SSL: (?P<name>\w+)\] ?(?P<text>[^(\[]*)")

#: The settings that say how a server is verified, in words.
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


def reset_hint(error: BaseException) -> str:
    """What it may mean that a connection with TLS was reset; empty for another error."""
    if not re.search("reset|closed|lost|EOF", _texts(error), re.IGNORECASE):
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
