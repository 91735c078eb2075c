"""URLs: which server they name, how they are shown, and dagster-celery's way to write them."""

from __future__ import annotations

import ssl
import time
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dagster_taskiq.errors import ConfigError
from dagster_taskiq.servers.kinds import (
    ServerOptions,
    Tls,
    is_amqp,
    is_redis,
    is_same_address,
    normalize_amqp,
    redact,
    scheme_of,
    split_url,
)

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
        split_url(f"{scheme}://sesame:secret{character}mouse@host:1/2")
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
        split_url(url)
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
    assert is_amqp(f"{scheme}://h")
    assert not is_redis(f"{scheme}://h")


@pytest.mark.parametrize("scheme", ["redis", "rediss", "unix", "Redis"])
def test_rediss_schemes(scheme: str) -> None:
    """Redis and Valkey share them."""
    assert is_redis(f"{scheme}://h")
    assert not is_amqp(f"{scheme}://h")


@pytest.mark.parametrize("url", ["", "h", "h:1", "redis:h", "sqs://h", "//h", "redis"])
def test_other_texts_are_refused(url: str) -> None:
    """The error lists every scheme there is."""
    with pytest.raises(ConfigError, match=r"amqps://.*unix://"):
        scheme_of(url)


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
    ],
)
def test_which_addresses_name_one_server(one: str, other: str, is_same: bool) -> None:
    """Whoever logs in, and with or without what is the default anyway."""
    assert is_same_address(one, other) is is_same_address(other, one) is is_same
