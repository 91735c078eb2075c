"""Who may see the page, and from where: names of the host, login, forms of our own alone.

Three things are to be kept out. A page of somebody else that has its own name lead to this host
(DNS rebinding) is told by the name that the browser asks for. A form of somebody else's page is
told by where it comes from, and by a token that only our forms have. Whoever has no login sees
nothing, where one is set.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from dagster_taskiq.errors import ConfigError

#: Names that every host has for itself.
_OWN_NAMES = frozenset(["localhost"])

#: The shortest token that cannot be guessed by trying.
MIN_TOKEN_CHARACTERS = 16

#: What a browser is told of each answer. Styles and scripts come from files of ours alone.
SECURITY_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # not no-referrer, with which a browser does not say where a form of ours comes from
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Access:
    """What is set of who may see the page.

    Attributes:
        token: that opens it; None for none.
        basic: ``user:password`` that opens it; None for none.
        hosts: names, beside IP addresses and localhost, by which the page may be asked for.
    """

    token: str | None = field(default=None, repr=False)
    basic: str | None = field(default=None, repr=False)
    hosts: Collection[str] = ()
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    @property
    def is_open(self) -> bool:
        """Whether anybody may see it who reaches it."""
        return self.token is None and self.basic is None

    # --- names of the host ---

    def is_own_host(self, host: str) -> bool:
        """Whether a ``Host`` header may be of this page: NAME or NAME:PORT.

        An IP address is believed: nobody else's page has one as its name.
        """
        name = _name_of(host)
        known = {it.lower() for it in self.hosts} | _OWN_NAMES
        return bool(name) and (name in known or _is_address(name))

    def is_own_form(self, host: str, origin: str | None, fetch_site: str | None) -> bool:
        """Whether a POST comes from a page of ours, by what the browser says of it.

        Args:
            host: header ``Host``.
            origin: header ``Origin``; None where the client is no browser.
            fetch_site: header ``Sec-Fetch-Site``, which not every browser sends.
        """
        if fetch_site not in (None, "same-origin", "none"):
            return False
        if origin is None:
            return True
        place = _netloc_of(origin)
        # a proxy may ask under another name than the browser did
        named = {it.lower() for it in self.hosts}
        return bool(place) and (place == host.lower() or _name_of(place) in named)

    # --- login ---

    def user_of(self, authorization: str | None, cookie: str | None) -> str | None:
        """Who asks, by the header ``Authorization`` or the cookie of a login; None for a stranger.

        The user of an open page and of a token has no name: it is empty.
        """
        if self.is_open:
            return ""
        kind, _, given = (authorization or "").partition(" ")
        if kind.lower() == "bearer" and self.is_token(given.strip()):
            return ""
        if kind.lower() == "basic" and self.basic is not None:
            said = _decoded(given)
            if hmac.compare_digest(said, self.basic.encode()):
                return self.basic.partition(":")[0]
        if cookie and self.token is not None and _same(cookie, self.login_cookie()):
            return ""
        return None

    def is_token(self, text: str) -> bool:
        """Whether a text is the token that opens the page."""
        return self.token is not None and _same(text, self.token)

    def login_cookie(self) -> str:
        """What a browser keeps of a login; the token cannot be read from it."""
        return _digest((self.token or "").encode(), b"login to the dashboard")

    # --- forms ---

    def form_token(self, session: str) -> str:
        """What a form of ours has in it; ``session`` is the cookie of the browser that got it."""
        return _digest(self.secret, session.encode())

    def is_form_token(self, session: str | None, text: str) -> bool:
        """Whether a text is what a form has that this browser got."""
        return bool(session) and _same(text, self.form_token(str(session)))


def check_login(
    token: str | None, basic: str | None, token_variable: str, basic_variable: str
) -> None:
    """Check what is set of a login.

    Args:
        token_variable, basic_variable: what sets it.

    Raises:
        ConfigError: it cannot be used.
    """
    if token is not None and len(token) < MIN_TOKEN_CHARACTERS:
        raise ConfigError(
            f"{token_variable} has less than {MIN_TOKEN_CHARACTERS} characters, and could be "
            "guessed: set it to what `openssl rand -hex 16` prints."
        )
    if basic is not None and not all(basic.partition(":")):
        raise ConfigError(f"{basic_variable} must be user:password.")


def _same(one: str, other: str) -> bool:
    """Compared in a time that says nothing of where they differ."""
    return hmac.compare_digest(one.encode(errors="replace"), other.encode(errors="replace"))


def _digest(key: bytes, text: bytes) -> str:
    return hmac.new(key, text, hashlib.sha256).hexdigest()


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        return b""


def _netloc_of(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _name_of(host: str) -> str:
    """The name of NAME:PORT, of an IPv6 address without its brackets; empty for nonsense."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
