"""TLS as settings say it: kombu's ``broker_use_ssl``, and the parameters of a ``rediss://`` URL.

Celery's users write the same in several ways, of which redis-py understands one; all of them
become a ``Tls`` here, and the URL is left without them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlunsplit

from dagster_taskiq.errors import ConfigError
from dagster_taskiq.servers.kinds import Tls, scheme_of, split_url

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

#: The scheme that says what ``broker_use_ssl`` says beside another one, as Celery reads it.
_WITH_TLS = {"amqp": "amqps", "pyamqp": "amqps", "redis": "rediss"}


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


def read_tls(url: str, tls: Tls | None) -> tuple[str, Tls]:
    """The URL as its client reads it, and how its server is verified.

    Args:
        tls: of ``broker_use_ssl``; with it a URL without TLS becomes one with it. What the URL
            itself says goes before it.

    Raises:
        ConfigError: the URL's scheme is unknown, or a parameter of it cannot be used.
    """
    scheme = scheme_of(url)
    if tls is not None and scheme in _WITH_TLS:
        scheme = _WITH_TLS[scheme]
        url = f"{scheme}{url[url.index('://') :]}"
    if scheme != "rediss":
        return url, tls or Tls()
    parts = split_url(url)
    parameters = parse_qsl(parts.query, keep_blank_values=True)
    ours = {key: value for key, value in parameters if key in _FIELDS and key.startswith("ssl_")}
    if not ours:
        return url, tls or Tls()
    others = urlencode([(key, value) for key, value in parameters if key not in ours])
    given = parse_tls("The server's URL", ours) or Tls()
    changed = {_FIELDS[key]: getattr(given, _FIELDS[key]) for key in ours}
    return urlunsplit(parts._replace(query=others)), replace(tls or Tls(), **changed)
