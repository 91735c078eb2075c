"""URLs: which server they name, how they are shown, and dagster-celery's way to write them."""

from __future__ import annotations

import ssl
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from urllib.parse import quote, unquote, urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dagster_taskiq.backend import Backend, open_backend
from dagster_taskiq.brokers import TaskBroker, open_broker
from dagster_taskiq.config import server_urls
from dagster_taskiq.config.settings import Settings
from dagster_taskiq.errors import ConfigError, UnreachableServerError
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.servers import kinds
from dagster_taskiq.servers.kinds import (
    BACKEND_KINDS,
    KINDS,
    RABBITMQ,
    REDIS,
    Scheme,
    ServerKind,
    ServerOptions,
    is_same_address,
    kind_of,
    uses_tls,
)
from dagster_taskiq.servers.redis_client import server_errors
from dagster_taskiq.servers.tls import Tls
from dagster_taskiq.servers.urls import normalize_amqp, redact, split_url

pytestmark = pytest.mark.once

SCHEMES = st.sampled_from(["amqp", "amqps", "pyamqp", "redis", "rediss", "unix", "REDIS"])
USERS = st.text("abc.@-_/%40", max_size=8)
PASSWORDS = st.text(min_size=1)


@given(SCHEMES, USERS, PASSWORDS)
@example("redis", "", "p@ss")
@example("redis", "", "a b")
@example("redis", "", "p:w/d?x#y")
@example("amqp", "user@example.com", "pw")
@example("amqp", "us/er", "pw")
@example("redis", "", "a://b@c")
@example("redis", "", "new\nline")
def test_an_address_never_shows_the_password(scheme: str, user: str, password: str) -> None:
    """Whatever the user name and the password are made of, quoted or not."""
    for written in (password, quote(password, safe="")):
        options = ServerOptions(url=f"{scheme}://{user}:{written}@host:1/2")
        assert options.address == f"{scheme}://{user}:***@host:1/2"
        assert options.address in repr(options)


@given(SCHEMES, USERS, st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1))
def test_texts_do_not_show_passwords(scheme: str, user: str, password: str) -> None:
    """In the middle of a sentence, and of two URLs both."""
    url = f"{scheme}://{user}:{quote(password, safe='@:!$()*+;=,')}@host"
    hidden = f"{scheme}://{user}:***@host"
    assert redact(f"Cannot reach {url} (from {url}).") == f"Cannot reach {hidden} (from {hidden})."
    assert redact(f"'{url}'") == f"'{hidden}'"


@given(st.sampled_from(["password", "passwd", "PASSWORD", "ssl_password"]), PASSWORDS)
def test_passwords_in_the_query_are_not_shown(key: str, password: str) -> None:
    """redis-py takes the password there too."""
    written = quote(password, safe="")
    for before, after in (("?", ""), ("?db=1&", ""), ("?", "&db=1")):
        options = ServerOptions(url=f"redis://host/0{before}{key}={written}{after}")
        assert options.address == f"redis://host/0{before}{key}=***{after}"


@pytest.mark.parametrize(
    "text",
    [
        "amqp://host:5672//",
        "amqp://guest@localhost:5672//",
        "redis://host:6379/0?db=1",
        "unix:///run/user/redis.sock?db=2",
        "rediss://[::1]:6379/0",
        "no URL at all: a@b",
        "",
    ],
)
def test_what_has_no_password_is_shown_as_it_is(text: str) -> None:
    """Addresses stay readable."""
    assert redact(text) == text


@given(st.text())
def test_redacting_twice_changes_nothing_more(text: str) -> None:
    """Messages pass through several hands."""
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    "text", ["a://" * 100_000, "a." * 200_000, "?passw" * 50_000, ":" * 400_000]
)
def test_redacting_takes_a_time_that_grows_with_the_length(text: str) -> None:
    """Not with its square: some errors quote what somebody else has written."""
    began = time.process_time()
    redact(text)
    assert time.process_time() - began < 2


# --- what cannot be read ---


@pytest.mark.parametrize("character", "/?#[] \t\n\x1b")
@pytest.mark.parametrize("scheme", ["amqp", "redis", "unix"])
def test_an_unescaped_character_in_a_password_is_an_error_that_hides_it(
    scheme: str, character: str
) -> None:
    """It says what must be percent-encoded, and repeats nothing."""
    with pytest.raises(ConfigError, match="must be percent-encoded") as caught:
        kind_of(f"{scheme}://sesame:secret{character}mouse@host:1/2")
    for part in ("secret", "mouse", "sesame"):
        assert part not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:12?secret@h",
        "redis://:secret",
        "redis://user:secret",
        "user:secret@host",
        "secret",
        "sqs://:secret@h",
    ],
)
def test_a_url_without_its_other_parts_is_an_error_that_hides_it(url: str) -> None:
    """What stands at the place of a port or a scheme may be the password."""
    with pytest.raises(ConfigError) as caught:
        kind_of(url)
    assert "secret" not in str(caught.value)


@given(SCHEMES, st.text(), st.text(min_size=1))
def test_every_password_can_be_written(scheme: str, user: str, password: str) -> None:
    """Percent-encoded, whatever it is made of."""
    parts = split_url(f"{scheme}://{quote(user, safe='')}:{quote(password, safe='')}@host:1/2")
    assert unquote(parts.password or "") == password


# --- kinds ---


@pytest.mark.parametrize("scheme", ["amqp", "amqps", "pyamqp", "AMQP"])
def test_rabbitmqs_schemes(scheme: str) -> None:
    """Also Celery's, in any case."""
    assert kind_of(f"{scheme}://h") is RABBITMQ


@pytest.mark.parametrize("scheme", ["redis", "rediss", "unix", "Redis"])
def test_rediss_schemes(scheme: str) -> None:
    """Redis and Valkey share them."""
    assert kind_of(f"{scheme}://h") is REDIS


@pytest.mark.parametrize("url", ["", "h", "h:1", "redis:h", "sqs://h", "//h", "redis"])
def test_other_texts_are_refused(url: str) -> None:
    """The error lists every scheme there is."""
    with pytest.raises(ConfigError, match=r"amqps://.*unix://"):
        kind_of(url)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_row_says_all_of_its_kind(kind: ServerKind) -> None:
    """Broker and backend are there, and what a scheme refers to is a scheme of the same row."""
    assert issubclass(resolve_name(f"dagster_taskiq.brokers.{kind.broker}"), TaskBroker)
    if kind.backend is not None:
        assert issubclass(resolve_name(f"dagster_taskiq.backend.{kind.backend}"), Backend)
    for scheme in kind.schemes.values():
        assert {scheme.tls_scheme, scheme.stands_for} <= {*kind.schemes, None}
        if scheme.tls_scheme is not None:
            assert uses_tls(f"{scheme.tls_scheme}://h")


def test_no_two_kinds_share_a_scheme() -> None:
    """A URL names one kind of server."""
    schemes = [scheme for kind in KINDS for scheme in kind.schemes]
    assert len(schemes) == len(set(schemes))


def test_one_row_adds_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else knows which servers there are: settings, brokers, backends, addresses, TLS."""
    row = replace(
        REDIS,
        names=("Sparrow",),
        schemes={"sparrow": Scheme(7000, "sparrows"), "sparrows": Scheme(7001, "sparrows")},
    )
    for name, value in (("KINDS", (*KINDS, row)), ("BACKEND_KINDS", (*BACKEND_KINDS, row))):
        monkeypatch.setattr(kinds, name, value)
        monkeypatch.setattr(server_urls, name, value, raising=False)
    config = {"broker": "sparrow://h", "config_source": {"broker_use_ssl": True}}
    settings = Settings.from_config(config)
    options = settings.server_options(str(settings.broker_url), settings.source.broker_use_ssl)
    assert (options.url, options.kind, options.uses_tls) == ("sparrows://h", row, True)
    assert settings.backend_url is None
    assert is_same_address("sparrow://h", "sparrow://u:***@H:7000/0")
    with pytest.raises(ConfigError, match="sparrow://, sparrows://"):
        Settings.from_config({"broker": "eagle://h"})
    with pytest.raises(ConfigError, match=r"or a Sparrow \(sparrow:// or sparrows://\), not Rabb"):
        Settings.from_config({"broker": "amqp://h", "backend": "amqp://h"})


def test_rabbitmq_is_no_backend() -> None:
    """Where the settings did not see to it."""
    with pytest.raises(ConfigError, match=r"amqp://h cannot be the backend: it is a RabbitMQ\."):
        open_backend(ServerOptions("amqp://h"), Signer())


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "PostgreSQL", "postgresql+psycopg2"])
def test_a_postgresql_is_broker_and_backend(scheme: str) -> None:
    """By libpq's schemes and SQLAlchemy's; beside any other server, or alone."""
    url = f"{scheme}://u:secret@h/d?sslmode=require"
    for broker in ("amqp://h", "redis://h"):
        assert Settings.from_config({"broker": broker, "backend": url}).backend_url == url
    settings = Settings.from_config({"broker": url})
    assert (settings.broker_url, settings.backend_url) == (url, None)
    broker = open_broker(ServerOptions(url))
    assert "secret" not in broker.address


def test_a_client_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to install."""
    for name in ("backend.postgresql", "brokers.postgresql", "servers.postgresql_client"):
        monkeypatch.delitem(sys.modules, f"dagster_taskiq.{name}", raising=False)
        monkeypatch.delattr(f"dagster_taskiq.{name}", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "psycopg"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"pip install 'dagster-taskiq\[postgres\]'"):
        open_backend(ServerOptions("postgresql://h/d"), Signer())
    with pytest.raises(ConfigError, match=r"pip install 'dagster-taskiq\[postgres\]'"):
        open_broker(ServerOptions("postgresql://h/d"))


def test_the_faces_of_brokers_and_backend_load_no_client_library() -> None:
    """Each takes time and memory, and is loaded by who opens a server of its kind."""
    libraries = ("redis", "aio_pika", "psycopg")
    code = (
        "import sys; from dagster_taskiq import backend, brokers; "
        f"print(sorted(sys.modules.keys() & set({libraries})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- AMQP ---


@pytest.mark.parametrize(
    ("written", "read"),
    [
        # dagster-celery's default, and its documentation's
        ("pyamqp://guest@localhost:5672//", "amqp://guest:guest@localhost:5672/"),
        ("pyamqp://guest@localhost//", "amqp://guest:guest@localhost/"),
        ("PYAMQP://h", "amqp://h"),
        ("amqp://h", "amqp://h"),
        ("amqp://h/", "amqp://h/"),
        ("amqp://h//", "amqp://h/"),
        ("amqp://h/vhost", "amqp://h/vhost"),
        ("amqp://h/%2fvhost", "amqp://h/%2fvhost"),
        ("amqp://guest:other@h//", "amqp://guest:other@h/"),
        ("amqp://other@h//", "amqp://other@h/"),
        ("amqp://guest@[::1]:5672//", "amqp://guest:guest@[::1]:5672/"),
        ("amqps://u:p@h:5671//?heartbeat=5", "amqps://u:p@h:5671/?heartbeat=5"),
    ],
)
def test_celerys_way_to_write_amqp_urls(written: str, read: str) -> None:
    """``pyamqp``, ``//`` for the default virtual host, and ``guest`` without a password."""
    assert normalize_amqp(written) == read


@given(st.sampled_from(["amqp", "amqps", "pyamqp"]), st.text(min_size=1), st.text())
def test_normalizing_keeps_user_and_password(scheme: str, user: str, password: str) -> None:
    """And it is the same when done twice."""
    login = f"{quote(user, safe='')}:{quote(password, safe='')}"
    once = normalize_amqp(f"{scheme}://{login}@host:1//")
    assert once == normalize_amqp(once)
    parts = urlsplit(once)
    assert (parts.username, parts.password) == tuple(login.split(":"))
    assert (parts.hostname, parts.port, parts.path) == ("host", 1, "/")


# --- TLS ---


def test_tls_verifies_by_default() -> None:
    """Certificate and host name, unless it is said otherwise."""
    context = Tls().context()
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED
    context = Tls(verify=False).context()
    assert not context.check_hostname
    assert context.verify_mode is ssl.CERT_NONE


def test_tls_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    """A missing file, and one that is no certificate."""
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no certificate")
    for path in (str(tmp_path / "missing.pem"), str(garbage)):
        for tls in (Tls(ca_file=path), Tls(cert_file=path)):
            with pytest.raises(ConfigError, match="TLS files") as caught:
                tls.context()
            assert path in str(caught.value)


@pytest.mark.parametrize(
    ("text", "is_explained"),
    [
        ("Error while reading from host:6379 : (104, 'Connection reset by peer')", True),
        ("Connection closed by server.", True),
        ("Error UNKNOWN while writing to socket. Connection lost.", True),
        ("Error 111 connecting to host:6379. Connect call failed.", False),
    ],
)
def test_a_tls_connection_that_is_lost_may_lack_a_client_certificate(
    text: str, is_explained: bool
) -> None:
    """A server may close before it has said what it wants; redis-py's texts for that differ."""
    with pytest.raises(UnreachableServerError) as caught, server_errors("rediss://host"):
        raise ConnectionError(text)
    assert ("set certfile and keyfile" in str(caught.value)) is is_explained


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("redis://h", "redis://:***@h:6379/0", True),
        ("redis://h/1", "redis://h", False),
        ("amqp://u:***@h//", "pyamqp://guest@H:5672", True),
        ("amqp://h/%2Fteam", "amqp://h/team", True),
        ("amqp://h/team", "amqp://h/", False),
        ("amqp://h", "amqps://h", False),
        ("unix:///a/socket?db=1", "unix:///a/socket?db=1", True),
        ("unix:///a/socket?db=1", "unix:///a/socket?db=2", False),
        ("unix:///a/socket", "unix:///b/socket", False),
        ("redis://h:port", "redis://h", False),
        ("redis://h:port", "redis://h:port", True),
        ("postgres://u:***@h/d", "postgresql://h:5432/d", True),
        ("postgresql://h/d", "postgresql://h/e", False),
    ],
)
def test_which_addresses_name_one_server(one: str, other: str, is_same: bool) -> None:
    """Whoever logs in, and with or without what is the default anyway."""
    assert is_same_address(one, other) is is_same_address(other, one) is is_same
