"""Settings: every way to give one, every way to get one wrong, and dagster-celery's files."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from dagster_taskiq import defaults
from dagster_taskiq.config.celery_names import CELERY_SETTINGS
from dagster_taskiq.config.config_source import ConfigSource
from dagster_taskiq.config.schema import EXECUTOR_SCHEMA
from dagster_taskiq.config.server_urls import WITH_THE_INSTANCE
from dagster_taskiq.config.settings import Settings, check_config
from dagster_taskiq.config.settings_file import load_yaml
from dagster_taskiq.errors import ConfigError
from dagster_taskiq.messages.signing import Signer
from dagster_taskiq.servers.tls import Tls

SECRET = "s3cr3t-w0rd"


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(defaults.BROKER_URL_VARIABLE, raising=False)
    monkeypatch.delenv(defaults.BACKEND_URL_VARIABLE, raising=False)
    for name in defaults.BROKER_HOST_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    """Whatever warns without a test that asks for it fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def settings(**config: Any) -> Settings:
    """Settings as Dagster hands them over: checked, with the defaults set."""
    return Settings.from_config(check_config(config, "test"))


def source(**values: Any) -> ConfigSource:
    return ConfigSource.from_mapping(values)


def refusal(**config: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        settings(**config)
    return one_line(caught.value)


def one_line(error: Exception) -> str:
    text = str(error)
    assert "\n" not in text
    assert SECRET not in text
    return text


def yaml_file(directory: Path, text: str) -> Path:
    path = directory / "worker.yaml"
    path.write_text(text, encoding="utf8")
    return path


# --- defaults and schema ---


def test_nothing_configured_gives_the_documented_defaults() -> None:
    """Without any configuration it is the embedded server, queue dagster, lease 30 s."""
    assert settings() == Settings()
    assert Settings().default_queue == "dagster"
    assert Settings().source.task_default_priority == 5
    assert Settings().broker_url is None
    assert Settings().backend_url is None
    assert Settings().lease_seconds == 30
    assert Settings().retries == "enabled"


def test_the_schema_has_all_of_dagster_celerys_options_and_ours() -> None:
    """dagster-celery's broker, backend, include, config_source and retries keep their names."""
    celery = {"broker", "backend", "include", "config_source", "retries"}
    ours = {
        "default_queue",
        "max_concurrent",
        "tag_concurrency_limits",
        "lease_seconds",
        "cancel_grace_seconds",
        "server_patience_seconds",
        "max_message_bytes",
        "signing_key",
        "dashboard_url",
    }
    assert set(EXECUTOR_SCHEMA) == celery | ours
    assert not any(field.is_required for field in EXECUTOR_SCHEMA.values())


def test_every_option_has_a_description() -> None:
    """The launchpad shows what each option is for."""
    assert all(field.description for field in EXECUTOR_SCHEMA.values())


def test_every_value_arrives() -> None:
    """Each option of the schema ends up in the settings."""
    given = settings(
        broker="amqp://h",
        backend="redis://h",
        include=["a", "b"],
        config_source={"task_default_priority": 7},
        default_queue="q",
        retries={"deferred": {}},
        max_concurrent=4,
        tag_concurrency_limits=[{"key": "database", "limit": 2}],
        lease_seconds=12.5,
        cancel_grace_seconds=0,
    )
    assert given == Settings(
        broker_url="amqp://h",
        backend_url="redis://h",
        include=("a", "b"),
        source=ConfigSource(task_default_priority=7),
        default_queue="q",
        retries="deferred",
        max_concurrent=4,
        tag_concurrency_limits=({"key": "database", "limit": 2},),
        lease_seconds=12.5,
        cancel_grace_seconds=0,
    )


def test_options_may_be_null() -> None:
    """``broker:`` with nothing after it is the same as no broker."""
    empty = dict.fromkeys(("broker", "backend", "config_source", "default_queue", "max_concurrent"))
    assert settings(**empty) == Settings()


@pytest.mark.parametrize("mode", ["enabled", "disabled", "deferred"])
def test_retries_takes_dagsters_modes(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``retries`` is Dagster's selector, also by ``env``."""
    assert settings(retries={mode: {}}).retries == mode
    monkeypatch.setenv("MODE", mode)
    assert settings(retries={"env": "MODE"}).retries == mode


def test_settings_are_frozen() -> None:
    """Nobody changes settings after they were checked."""
    with pytest.raises(AttributeError):
        Settings().default_queue = "x"  # type: ignore[misc]


# --- env: ---


def test_options_take_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each option of the schema accepts ``{env: NAME}``."""
    for name, value in {
        "BROKER": "amqp://h",
        "BACKEND": "redis://h",
        "MODULE": "a.b",
        "QUEUE": "q",
        "MOST": "3",
        "LEASE": "7.5",
        "GRACE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    given = settings(
        broker={"env": "BROKER"},
        backend={"env": "BACKEND"},
        include=[{"env": "MODULE"}],
        default_queue={"env": "QUEUE"},
        max_concurrent={"env": "MOST"},
        lease_seconds={"env": "LEASE"},
        cancel_grace_seconds={"env": "GRACE"},
    )
    assert given == Settings(
        broker_url="amqp://h",
        backend_url="redis://h",
        include=("a.b",),
        default_queue="q",
        max_concurrent=3,
        lease_seconds=7.5,
        cancel_grace_seconds=1,
    )


@pytest.mark.parametrize(
    "config",
    [
        {"broker": {"env": "NOT_SET"}},
        {"backend": {"env": "NOT_SET"}},
        {"include": [{"env": "NOT_SET"}]},
        {"lease_seconds": {"env": "NOT_SET"}},
        {"retries": {"env": "NOT_SET"}},
        {"config_source": {"task_default_queue": {"env": "NOT_SET"}}},
        {"config_source": {"broker_use_ssl": {"ca_certs": {"env": "NOT_SET"}}}},
    ],
    ids=str,
)
def test_a_variable_that_is_not_set_is_named_in_one_line(
    config: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the variable, without a traceback through Dagster."""
    monkeypatch.delenv("NOT_SET", raising=False)
    text = refusal(**config)
    assert "NOT_SET" in text
    assert "site-packages" not in text


def test_config_source_takes_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """``env:`` works inside ``config_source`` too, where Dagster does not resolve it."""
    monkeypatch.setenv("PRIORITY", "8")
    monkeypatch.setenv("EAGER", "true")
    monkeypatch.setenv("CA", "/ca.pem")
    given = source(
        task_default_priority={"env": "PRIORITY"},
        task_always_eager={"env": "EAGER"},
        broker_use_ssl={"ca_certs": {"env": "CA"}},
    )
    assert given == ConfigSource(
        task_default_priority=8, task_always_eager=True, broker_use_ssl=Tls(ca_file="/ca.pem")
    )


# --- broker and backend ---


def test_broker_and_backend_fall_back_to_their_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``broker`` and ``backend`` the two documented variables count."""
    monkeypatch.setenv(defaults.BROKER_URL_VARIABLE, "amqp://from-env")
    monkeypatch.setenv(defaults.BACKEND_URL_VARIABLE, "redis://from-env")
    assert settings().broker_url == "amqp://from-env"
    assert settings().backend_url == "redis://from-env"
    given = settings(broker="redis://given", backend="redis://given-too")
    assert (given.broker_url, given.backend_url) == ("redis://given", "redis://given-too")


def test_empty_variables_count_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that a compose file sets to nothing is no URL."""
    monkeypatch.setenv(defaults.BROKER_URL_VARIABLE, "")
    monkeypatch.setenv(defaults.BACKEND_URL_VARIABLE, "")
    assert settings() == Settings()


@pytest.mark.parametrize("url", ["redis://h", "rediss://h", "unix:///s", "REDIS://h"])
def test_a_redis_broker_is_its_own_backend(url: str) -> None:
    """Without ``backend`` a Redis broker's own server keeps the state."""
    assert settings(broker=url).backend_url is None


@pytest.mark.parametrize("url", ["postgresql://h/d", "postgres:///d?host=/run", "dagster"])
def test_a_postgresql_broker_is_its_own_backend(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also that of Dagster's instance, by its name; another backend is possible beside it."""
    given = settings(broker=url)
    assert (given.broker_url, given.backend_url) == (url, None)
    assert settings(broker=url, backend="redis://h").backend_url == "redis://h"
    monkeypatch.setenv(defaults.BROKER_URL_VARIABLE, url)
    assert settings().broker_url == url


@pytest.mark.parametrize("url", ["amqp://h", "amqps://h", "pyamqp://guest@localhost//"])
@pytest.mark.parametrize("backend", [None, "rpc://"])
def test_rabbitmq_alone_leaves_the_state_to_the_instance(url: str, backend: str | None) -> None:
    """As dagster-celery's users have it, with and without its default backend."""
    assert settings(broker=url, backend=backend).backend_url == WITH_THE_INSTANCE


def test_rabbitmq_is_no_backend() -> None:
    """``backend: amqp://`` is refused, with what it may be."""
    assert "redis://" in refusal(broker="amqp://h", backend="amqp://h")


def test_rpc_warns_and_uses_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is named goes before one that is not, and that is said."""
    monkeypatch.setenv(defaults.BACKEND_URL_VARIABLE, "redis://h")
    with pytest.warns(UserWarning, match=r"DAGSTER_TASKIQ_BACKEND_URL.*rpc"):
        given = settings(broker="pyamqp://guest@localhost//", backend="rpc://")
    assert given.backend_url == "redis://h"


@pytest.mark.parametrize("broker", ["redis://h", "postgresql://h/d", "dagster", None])
def test_rpc_is_for_rabbitmq(broker: str | None) -> None:
    """Beside a broker that keeps the state itself it is a mistake."""
    text = refusal(broker=broker, backend="rpc://")
    assert "rpc://" in text
    assert "leave 'backend' out" in text


@pytest.mark.parametrize("variable", defaults.BROKER_HOST_VARIABLES)
def test_the_host_of_the_default_broker(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes dagster-celery's default URL; a whole URL goes before it."""
    monkeypatch.setenv(variable, "rabbit.example.org")
    assert settings().broker_url == "pyamqp://guest@rabbit.example.org:5672//"
    assert settings().backend_url == WITH_THE_INSTANCE
    given = settings(backend="redis://h")
    assert given.broker_url == "pyamqp://guest@rabbit.example.org:5672//"
    assert settings(broker="redis://h").broker_url == "redis://h"
    monkeypatch.setenv(defaults.BROKER_URL_VARIABLE, "redis://other")
    assert settings().broker_url == "redis://other"


def test_our_name_of_the_brokers_host_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both are set, and they are read as nothing where they are empty."""
    ours, theirs = defaults.BROKER_HOST_VARIABLES
    monkeypatch.setenv(ours, "ours")
    monkeypatch.setenv(theirs, "theirs")
    assert settings(backend="redis://h").broker_url == "pyamqp://guest@ours:5672//"
    monkeypatch.setenv(ours, "")
    assert settings(backend="redis://h").broker_url == "pyamqp://guest@theirs:5672//"
    monkeypatch.setenv(theirs, "")
    assert settings() == Settings()


@pytest.mark.parametrize("host", ["h:5673", f"u:{SECRET}@h", "amqp://h", "h/v", " "])
def test_a_brokers_host_that_is_more_than_one(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end up in the wrong part of the URL."""
    monkeypatch.setenv("DAGSTER_CELERY_BROKER_HOST", host)
    assert "DAGSTER_CELERY_BROKER_HOST must be the name of a host" in refusal(backend="redis://h")


def test_of_several_servers_the_first_is_taken() -> None:
    """Celery's URLs with ``;`` are for servers that stand in for each other: we say that we do not.

    A ``;`` in a password is a part of it.
    """
    with pytest.warns(UserWarning, match="only the first") as caught:
        given = settings(
            broker=f"amqp://u:{SECRET}@a;amqp://u:{SECRET}@b",
            backend=f"redis://:{SECRET}@c;redis://:{SECRET}@d;redis://e",
        )
    assert given.broker_url == f"amqp://u:{SECRET}@a"
    assert given.backend_url == f"redis://:{SECRET}@c"
    assert [str(warning.message).split()[0] for warning in caught] == ["'broker'", "'backend'"]
    assert not any(SECRET in str(warning.message) for warning in caught)
    assert settings(broker="redis://:a;b@h").broker_url == "redis://:a;b@h"


def test_eager_needs_no_backend() -> None:
    """Tests that run eagerly keep the team's broker setting and need no server."""
    given = settings(broker="amqp://h", config_source={"task_always_eager": True})
    assert given.source.task_always_eager


@pytest.mark.parametrize("url", ["sqs://h", "localhost:6379", "http://h", "://", "rediss", " "])
def test_unknown_schemes_are_refused(url: str) -> None:
    """A URL that neither broker nor backend speaks is refused with what they do."""
    for config in ({"broker": url}, {"broker": "redis://h", "backend": url}):
        text = refusal(**config)
        assert "amqp://" in text
        assert "redis://" in text


# --- values ---


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"lease_seconds": 0.5}, "at least 1"),
        ({"lease_seconds": float("nan")}, "expected a number"),
        ({"lease_seconds": float("inf")}, "expected a number"),
        ({"lease_seconds": 86401}, "at most 86400"),
        ({"lease_seconds": "30"}, "lease_seconds"),
        ({"cancel_grace_seconds": -1}, "negative"),
        ({"cancel_grace_seconds": 86401}, "at most 86400"),
        ({"server_patience_seconds": -1}, "negative"),
        ({"max_message_bytes": 0}, "max_message_bytes is 0"),
        ({"max_concurrent": 0}, "at least 1"),
        ({"max_concurrent": 1.5}, "max_concurrent"),
        ({"retries": {"sometimes": {}}}, "retries"),
        ({"include": "module"}, "include"),
        ({"config_source": ["x"]}, "config_source"),
        ({"broker": 5}, "broker"),
        ({"tag_concurrency_limits": [{"key": "x"}]}, "limit"),
    ],
    ids=str,
)
def test_values_that_cannot_be_used(config: Mapping[str, Any], expected: str) -> None:
    """Each is an error of one line that names the option and what is allowed."""
    assert expected in refusal(**config)


def test_a_wrong_mode_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """``retries: {env: X}`` is checked after it is read."""
    monkeypatch.setenv("MODE", "sometimes")
    assert "'sometimes'" in refusal(retries={"env": "MODE"})


def test_a_wrong_number_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """So are the seconds."""
    monkeypatch.setenv("LEASE", "half a minute")
    assert "lease_seconds" in refusal(lease_seconds={"env": "LEASE"})


# --- config_source ---

GOOD: Mapping[str, tuple[Any, Any]] = {
    "task_default_priority": (3, 3),
    "task_default_queue": (" short ", "short"),
    "task_always_eager": ("yes", True),
    "result_expires": (3600, 3600.0),
    "broker_connection_timeout": ("2.5", 2.5),
    "broker_heartbeat": (30, 30),
    "broker_use_ssl": ({"ca_certs": "/ca"}, Tls(ca_file="/ca")),
    "redis_backend_use_ssl": ({"ssl_cert_reqs": "none"}, Tls(verify=False)),
    "worker_concurrency": (4, 4),
    "worker_max_tasks_per_child": ("100", 100),
    "worker_max_memory_per_child": (200_000, 200_000),
    "task_soft_time_limit": ("1.5", 1.5),
    "task_time_limit": (0, 0.0),
    "code_max_age_seconds": (3600, 3600.0),
    "database_short_lived_sessions": (True, True),
    "database_idle_seconds": ("0.5", 0.5),
    "key_prefix": ("staging", "staging"),
}

BAD: Mapping[str, tuple[Any, ...]] = {
    "task_default_priority": ("high", 2.5, True, None, [], "1" * 5000),
    "task_default_queue": ("", "  ", 5, None),
    "task_always_eager": ("maybe", 2, None),
    "code_max_age_seconds": (0, "an hour"),
    "database_short_lived_sessions": ("maybe", 2, None),
    "database_idle_seconds": (-1, "soon", float("nan"), None, 86401),
    "result_expires": (0, -1, "soon", float("nan"), float("inf"), 10**400, None),
    "broker_connection_timeout": (0, "x", float("nan")),
    "broker_heartbeat": (0, -5, "x", 1.5),
    "broker_use_ssl": ({"ca_cert": "x"}, "yes", {"ca_certs": ""}),
    "redis_backend_use_ssl": ({"certs": "x"}, 5),
    "worker_concurrency": (0, "many", True),
    "worker_max_tasks_per_child": (0, "x"),
    "worker_max_memory_per_child": (-1, "1GB"),
    "task_soft_time_limit": (-1, "soon", float("nan"), 1e10),
    "task_time_limit": (-1, None, float("inf")),
    "key_prefix": ("", None),
}


def test_the_tables_here_have_every_key() -> None:
    """A new key comes with a good and a bad value here."""
    names = {field.name for field in fields(ConfigSource)}
    assert set(GOOD) == names
    assert set(BAD) == names


@pytest.mark.parametrize("key", GOOD)
def test_every_key_of_config_source_is_read(key: str) -> None:
    """A good value is converted and ends up in its field alone."""
    given, expected = GOOD[key]
    assert source(**{key: given}) == ConfigSource(**{key: expected})


@pytest.mark.parametrize(("key", "value"), [(key, value) for key in BAD for value in BAD[key]])
def test_a_bad_value_of_config_source_is_named(key: str, value: Any) -> None:
    """The error names the key with its place."""
    with pytest.raises(ConfigError, match=f"config_source.{key}"):
        source(**{key: value})


def test_every_tls_option_of_kombu_in_both_spellings() -> None:
    """``broker_use_ssl`` is a boolean, or kombu's or redis-py's names."""
    for prefix in ("", "ssl_"):
        options = {
            f"{prefix}{'ca_certs'}": "/ca",
            f"{prefix}{'certfile'}": "/cert",
            f"{prefix}{'keyfile'}": "/key",
            f"{prefix}{'cert_reqs'}": "required",
        }
        assert source(broker_use_ssl=options).broker_use_ssl == Tls("/ca", "/cert", "/key")
    assert source(broker_use_ssl=True).broker_use_ssl == Tls()
    for unverified in (0, "none", "CERT_NONE"):
        assert source(broker_use_ssl={"cert_reqs": unverified}).broker_use_ssl == Tls(verify=False)
    for nothing in (False, None, {}):
        assert source(broker_use_ssl=nothing).broker_use_ssl is None


@pytest.mark.parametrize(
    ("url", "tls", "expected_url", "expected"),
    [
        ("rediss://h/0", None, "rediss://h/0", Tls()),
        ("rediss://h/0", Tls("/ca"), "rediss://h/0", Tls("/ca")),
        ("rediss://h/0?ssl_cert_reqs=CERT_NONE", None, "rediss://h/0", Tls(verify=False)),
        ("rediss://h?ssl_cert_reqs=none", Tls("/ca"), "rediss://h", Tls("/ca", verify=False)),
        ("rediss://h?ssl_cert_reqs=CERT_REQUIRED", Tls(verify=False), "rediss://h", Tls()),
        (
            "rediss://:p%40@h:1/2?ssl_ca_certs=%2Fca&timeout=3&ssl_certfile=/c&ssl_keyfile=/k",
            None,
            "rediss://:p%40@h:1/2?timeout=3",
            Tls("/ca", "/c", "/k"),
        ),
        ("rediss://h?ssl_check_hostname=false", None, "rediss://h", Tls(check_hostname=False)),
        ("redis://h:1/0", Tls("/ca"), "rediss://h:1/0", Tls("/ca")),
        ("pyamqp://u:p@h//", Tls("/ca"), "amqps://u:p@h//", Tls("/ca")),
        ("amqps://h/", None, "amqps://h/", Tls()),
        ("amqp://h/", None, "amqp://h/", Tls()),
        ("unix:///s", Tls(), "unix:///s", Tls()),
    ],
)
def test_tls_as_celerys_users_write_it(
    url: str, tls: Tls | None, expected_url: str, expected: Tls
) -> None:
    """In the URL, which goes first, or beside it, which turns it on as it does for Celery."""
    options = settings(broker=url, backend="redis://b").server_options(url, tls)
    assert (options.url, options.tls) == (expected_url, expected)


def test_a_tls_parameter_without_a_value_is_refused() -> None:
    """It must not turn verification off, or on with other authorities than were meant."""
    with pytest.raises(ConfigError, match="ssl_ca_certs"):
        settings().server_options("rediss://h?ssl_ca_certs=", None)


def test_default_queue_goes_before_celerys_key() -> None:
    """``default_queue`` counts, else ``task_default_queue``, else ``dagster``."""
    celery = {"task_default_queue": "celery"}
    assert settings(config_source=celery).default_queue == "celery"
    assert settings(config_source=celery, default_queue="ours").default_queue == "ours"


@pytest.mark.parametrize(
    "key", sorted(CELERY_SETTINGS - {field.name for field in fields(ConfigSource)})
)
def test_a_setting_of_celery_that_means_nothing_warns_by_name(key: str) -> None:
    """Any other setting of Celery's is ignored, and said to be."""
    with pytest.warns(UserWarning, match=rf"config_source\.{key} "):
        assert source(**{key: "whatever"}) == ConfigSource()


@pytest.mark.parametrize(
    ("misspelt", "right"),
    [
        ("task_default_priorty", "task_default_priority"),
        ("task_default_queu", "task_default_queue"),
        ("task_allways_eager", "task_always_eager"),
        ("results_expire", "result_expires"),
        ("brocker_heartbeat", "broker_heartbeat"),
        ("worker_concurency", "worker_concurrency"),
        ("key_prefixes", "key_prefix"),
    ],
)
def test_a_misspelt_key_is_an_error_with_the_nearest_name(misspelt: str, right: str) -> None:
    """It is not ignored: the error names the right one."""
    with pytest.raises(ConfigError, match=f"{misspelt!r}.*{right!r}"):
        source(**{misspelt: 1})


def test_a_key_like_nothing_lists_what_there_is() -> None:
    """Where no name is near, all are listed."""
    with pytest.raises(ConfigError, match=r"Known are: .*task_always_eager"):
        source(xyzzy=1)


# --- passwords ---


@pytest.mark.parametrize(
    "url", [f"amqp://u:{SECRET}@h", f"redis://:{SECRET}@h/0", f"redis://h?password={SECRET}"]
)
def test_passwords_are_not_shown(url: str) -> None:
    """Neither the settings' text nor that of a server has the password."""
    given = settings(broker=url, backend=f"redis://:{SECRET}@h/1")
    options = given.server_options(url, given.source.broker_use_ssl)
    for text in (repr(given), str(given), repr(options), str(options), options.address):
        assert SECRET not in text


@pytest.mark.parametrize(
    "config",
    [
        {"broker": f"sqs://u:{SECRET}@h"},
        {"broker": f"sqs://u@d:{SECRET} x@h"},
        {"broker": "redis://h", "backend": f"amqp://u:{SECRET}@h"},
        {"broker": [f"amqp://u:{SECRET}@h"]},
        {"brokr": f"amqp://u:{SECRET}@h"},
        {"lease_seconds": f"amqp://u:{SECRET}@h"},
        {"max_concurrent": f"amqp://u:{SECRET}@h"},
        {"retries": f"amqp://u:{SECRET}@h"},
    ],
    ids=str,
)
def test_errors_do_not_show_passwords(config: Mapping[str, Any]) -> None:
    """Also where the URL stands in the wrong place."""
    refusal(**config)


def test_errors_of_yaml_do_not_show_passwords(tmp_path: Path) -> None:
    """The parser quotes the line it fails at, which may be that of the broker."""
    for line in (f"broker: 'amqp://u:{SECRET}@h", f"broker: amqp://u:{SECRET}@h: x"):
        with pytest.raises(ConfigError, match="not YAML") as caught:
            load_yaml(yaml_file(tmp_path, f"execution:\n  config:\n    {line}\n"))
        one_line(caught.value)


# --- YAML ---


@pytest.mark.parametrize("block", ["config", "celery", "taskiq"])
def test_dagster_celerys_yaml_works_as_it_is(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``execution: config:`` or the executor's name, as once in Dagster, with env values."""
    monkeypatch.setenv("BROKER", "pyamqp://guest@localhost//")
    path = yaml_file(
        tmp_path,
        f"""
        execution:
          {block}:
            broker: {{env: BROKER}}
            backend: redis://localhost
            include: ['my_module']
            config_source:
              task_default_priority: 3
            retries:
              disabled:
        """,
    )
    assert Settings.from_config(load_yaml(path)) == Settings(
        broker_url="pyamqp://guest@localhost//",
        backend_url="redis://localhost",
        include=("my_module",),
        source=ConfigSource(task_default_priority=3),
        retries="disabled",
    )


def test_config_goes_before_the_legacy_block(tmp_path: Path) -> None:
    """As in dagster-celery, ``config`` counts where both are there."""
    text = "execution: {config: {default_queue: new}, celery: {default_queue: old}}"
    assert load_yaml(yaml_file(tmp_path, text))["default_queue"] == "new"


@pytest.mark.parametrize("executor", ["celery", "taskiq"])
def test_the_executor_s_block_may_have_config_in_it(executor: str, tmp_path: Path) -> None:
    """As a run's config had it in old versions of Dagster."""
    text = f"execution: {{{executor}: {{config: {{default_queue: q}}}}}}"
    assert load_yaml(yaml_file(tmp_path, text))["default_queue"] == "q"


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("execution: {confg: {broker: redis://h}}", "Did you mean 'config' by 'confg'"),
        ("execution: {multiprocess: {}}", "no 'multiprocess'. Known are: config, taskiq, celery"),
        ("execution: {broker: redis://h}", "'broker' stands directly below 'execution'"),
        ("broker: redis://h", "'broker' stands at the top level; it belongs below 'execution: con"),
        ("execution: {config: {}}\nbroker: redis://h", "'broker' stands at the top level"),
        ("exection: {config: {broker: redis://h}}", "Did you mean 'execution' by 'exection'"),
        ("config: {broker: redis://h}", "no 'execution: config:'"),
        ("run_launcher: {module: dagster_taskiq}", "no 'execution: config:'"),
    ],
)
def test_settings_at_another_place_are_not_passed_over(
    text: str, advice: str, tmp_path: Path
) -> None:
    """Else the embedded server would be used without a word."""
    path = yaml_file(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_yaml(path)
    assert advice in one_line(caught.value)
    assert str(path) in one_line(caught.value)


@pytest.mark.parametrize("text", ["", "# nothing\n", "execution:\n", "execution:\n  config:\n"])
def test_an_empty_file_is_no_configuration(text: str, tmp_path: Path) -> None:
    """A file that says nothing gives the defaults, as in dagster-celery."""
    assert Settings.from_config(load_yaml(yaml_file(tmp_path, text))) == Settings()


def test_other_parts_of_a_runs_yaml_are_not_ours(tmp_path: Path) -> None:
    """The file may be a whole run config."""
    text = "ops: {a: {config: 1}}\nresources: {}\nexecution: {config: {default_queue: q}}"
    assert load_yaml(yaml_file(tmp_path, text))["default_queue"] == "q"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n- b\n", "must be a mapping, not a list"),
        ("just a text", "must be a mapping, not a str"),
        ("execution: 5\n", "execution must be a mapping"),
        ("execution: {config: [a]}\n", "config must be a mapping"),
        ("execution: {config: {broker: redis://h, 5672: x}}\n", "5672"),
        ("execution: {config: {config_source: {1: x}}}\n", "no text"),
        ("execution: [\n", "is not YAML"),
        ("execution:\n\t- x\n", "is not YAML"),
        ("execution: !!python/object/apply:os.getcwd []\n", "is not YAML"),
    ],
)
def test_files_that_are_no_settings(text: str, expected: str, tmp_path: Path) -> None:
    """Each is an error of one line that names the file and runs nothing."""
    path = yaml_file(tmp_path, text)
    with pytest.raises(ConfigError, match=expected) as caught:
        load_yaml(path)
    assert str(path) in one_line(caught.value)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    """Binary files are not YAML."""
    path = tmp_path / "worker.yaml"
    path.write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(ConfigError, match="not YAML") as caught:
        load_yaml(path)
    one_line(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """So is a directory."""
    for path in (tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(ConfigError, match="Cannot read") as caught:
            load_yaml(path)
        assert str(path) in one_line(caught.value)


@pytest.mark.parametrize(
    ("misspelt", "right"),
    [("brokr", "broker"), ("includes", "include"), ("max_concurent", "max_concurrent")],
)
def test_an_unknown_option_is_named_with_the_nearest(
    misspelt: str, right: str, tmp_path: Path
) -> None:
    """The error has the file, the wrong name and the right one."""
    path = yaml_file(tmp_path, f"execution: {{config: {{{misspelt}: x}}}}")
    with pytest.raises(ConfigError, match=f"{misspelt}.*Did you mean {right!r}") as caught:
        load_yaml(path)
    assert str(path) in one_line(caught.value)


# --- config_source as a whole from the environment ---


def test_config_source_may_stand_in_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """``config_source: {env: NAME}`` holds the mapping as YAML or JSON."""
    for text in ('{"task_default_priority": 7}', "task_default_priority: 7\n", ""):
        monkeypatch.setenv("SOURCE", text)
        expected = ConfigSource(task_default_priority=7) if text else ConfigSource()
        assert settings(config_source={"env": "SOURCE"}).source == expected


@pytest.mark.parametrize(
    "text", ["[1]", "text", f"broker_url: 'amqp://u:{SECRET}@h", "{1: x}", "task_default_queu: x"]
)
def test_a_variable_that_is_no_config_source(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused in one line, which shows no password."""
    monkeypatch.setenv("SOURCE", text)
    assert "config_source" in refusal(config_source={"env": "SOURCE"})


KEY, OTHER_KEY = "k" * 32, "o" * 32


@pytest.mark.parametrize(
    "value",
    [
        f"{KEY},{OTHER_KEY}",
        [KEY, OTHER_KEY],
        {"env": "MY_KEYS"},
        [{"env": "MY_KEY"}, OTHER_KEY],
        None,
    ],
    ids=["text", "list", "variable", "list with a variable", "the usual variable"],
)
def test_signing_keys(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any of these forms; the settings know which variables may hold some."""
    monkeypatch.setenv("MY_KEYS", f"{KEY} {OTHER_KEY}")
    monkeypatch.setenv("MY_KEY", KEY)
    usual = "DAGSTER_TASKIQ_SIGNING_KEY"
    monkeypatch.setenv(usual, f"{KEY},{OTHER_KEY}" if value is None else "ignored")
    config = check_config({"signing_key": value}, "test")
    found = Settings.from_config(config)
    assert found.signing_keys == (KEY, OTHER_KEY)
    assert found.signer().key_ids == Signer([KEY, OTHER_KEY]).key_ids
    named = {name for name in ("MY_KEY", "MY_KEYS") if f"{name!r}}}" in repr(value)}
    assert set(found.signing_variables) == {usual, *named}


def test_a_key_prefix_is_a_deployment_of_its_own() -> None:
    """What was signed for one deployment is nothing to another with the same key."""
    sources = ({"key_prefix": "a"}, {"key_prefix": "b"})
    one, two = (settings(signing_key=KEY, config_source=source).signer() for source in sources)
    assert not one.is_accepted_by(two.key_ids)


def test_without_a_key_nothing_is_signed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before there were keys; an empty variable is none, as for the URLs."""
    monkeypatch.setenv("DAGSTER_TASKIQ_SIGNING_KEY", "")
    assert settings().signing_keys == ()


@pytest.mark.parametrize("value", ["", [], [KEY, ""], {"env": "EMPTY"}, {"x": 1}, "hunter2", 7])
def test_what_is_no_signing_key_is_an_error(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for signatures must not go without; the error does not show what was given."""
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(ConfigError, match="signing_key") as caught:
        settings(signing_key=value)
    assert "hunter2" not in str(caught.value)


def test_settings_do_not_show_signing_keys() -> None:
    """In no text that is made of them."""
    found = settings(signing_key=[KEY, OTHER_KEY])
    assert KEY not in f"{found!r} {found.signer()!r}"
    assert OTHER_KEY not in f"{found!r} {found.signer()!r}"


@pytest.mark.parametrize(
    "line",
    [
        'signing_key: "hunter2hunter2',
        "signing_key: hunter2hunter2'\n  x: ]",
        "signing_key: *hunter2hunter2",
        "signing_key: !hunter2hunter2 x",
        "signing_key: %hunter2hunter2",
        "signing_key: a: hunter2hunter2",
        "broker: [redis://:hunter2hunter2",
    ],
)
def test_yaml_errors_do_not_quote_the_text(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quote that is missing in YAML is no reason to show a key; the place of it is said."""
    file = tmp_path / "settings.yaml"
    file.write_text(f"execution:\n  config:\n    {line}\n")
    with pytest.raises(ConfigError, match="is not YAML") as caught:
        load_yaml(file)
    assert "hunter2" not in str(caught.value)
    assert "line" in str(caught.value)
    monkeypatch.setenv("SOURCE", line)
    with pytest.raises(ConfigError) as caught:
        Settings.from_config(check_config({"config_source": {"env": "SOURCE"}}, "x"))
    assert "hunter2" not in str(caught.value)


# --- the dashboard ---


def test_a_run_is_linked_to_its_page_in_the_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the setting, else by the variable; without either there is no link."""
    monkeypatch.delenv("DAGSTER_TASKIQ_DASHBOARD_URL", raising=False)
    assert Settings.from_config({}).page_of("r") == ""
    monkeypatch.setenv("DAGSTER_TASKIQ_DASHBOARD_URL", "http://host:3100")
    assert Settings.from_config({}).page_of("r") == "http://host:3100/runs/r"
    settings = Settings.from_config({"dashboard_url": " https://proxy/taskiq/ "})
    assert settings.page_of("r") == "https://proxy/taskiq/runs/r"


@pytest.mark.parametrize(
    "url", ["host:3100", "ftp://host", "https://", "http://u:secret@host", " "]
)
def test_an_address_that_no_browser_takes_is_an_error(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is a password shown to all who can read a run's log."""
    with pytest.raises(ConfigError, match="dashboard_url") as error:
        Settings.from_config({"dashboard_url": url})
    assert "secret" not in str(error.value)
    monkeypatch.setenv("DAGSTER_TASKIQ_DASHBOARD_URL", url)
    with pytest.raises(ConfigError, match=r"\$DAGSTER_TASKIQ_DASHBOARD_URL"):
        Settings.from_config({})
