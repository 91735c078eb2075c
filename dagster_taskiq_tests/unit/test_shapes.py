"""The shapes of settings and Dagster's config types say the same."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dagster_taskiq._dagster.names import process_schema
from dagster_taskiq.config.schema import EXECUTOR_SCHEMA
from dagster_taskiq.config.setting import settings_of
from dagster_taskiq.config.settings import Settings, check_config
from dagster_taskiq.errors import ConfigError

SHAPES = {row.name: row for row in settings_of(Settings)}

#: Texts that mean something somewhere, and one that means nothing.
TEXTS = st.sampled_from(["enabled", "deferred", "7", "7.5", "env", "key", "limit", "value", "SET"])
KEYS = st.sampled_from(["env", "enabled", "key", "limit", "value", "applyLimitPerUniqueValue", "x"])
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-3, 9), st.floats(allow_nan=False), TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=5,
)


def by_dagster(config: dict[str, Any]) -> Any:
    """What Dagster hands over for a value; None where it refuses it."""
    value, problems = process_schema(EXECUTOR_SCHEMA, config)
    return None if problems else value


def by_us(config: dict[str, Any]) -> Any:
    try:
        return check_config(config, "test")
    except ConfigError:
        return None


def meaning(checked: Any) -> Any:
    """The settings of a checked value; None where it was refused, or they refuse it.

    Dagster leaves some variables for the settings to read, which refuse one that is not set.
    """
    if checked is None:
        return None
    try:
        return Settings.from_config(checked)
    except ConfigError:
        return None


@pytest.fixture(scope="module", autouse=True)
def _variables() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SET", "7")
        for name in ("enabled", "deferred", "7", "7.5", "env", "key", "limit", "value", "x"):
            patch.delenv(name, raising=False)
        yield


@pytest.mark.parametrize("name", sorted(SHAPES))
@settings(max_examples=150, deadline=None)
@given(value=VALUES)
def test_a_value_is_taken_by_both_or_by_none(name: str, value: Any) -> None:
    """And means the same: the YAML of a worker is checked here, that of a run by Dagster."""
    assert meaning(by_us({name: value})) == meaning(by_dagster({name: value}))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"retries": {"disabled": None}}, {"retries": {"disabled": {}}}),
        ({"retries": {"disabled": {}, "enabled": {}}}, None),
        ({"include": None}, None),
        ({"include": ["a", {"env": "SET"}]}, {"include": ["a", "7"]}),
        ({"max_message_bytes": {"env": "SET"}}, {"max_message_bytes": 7}),
        ({"lease_seconds": {"env": "SET", "x": "y"}}, None),
        ({"tag_concurrency_limits": [{"key": "a", "limit": 1, "value": "b"}]}, ...),
        (
            {
                "tag_concurrency_limits": [
                    {"key": "a", "limit": 1, "value": {"applyLimitPerUniqueValue": True}}
                ]
            },
            ...,
        ),
        ({"tag_concurrency_limits": [{"key": "a", "limit": 1, "value": {"x": True}}]}, None),
        ({"tag_concurrency_limits": [{"key": "a", "limit": 1, "value": None}]}, None),
        ({"tag_concurrency_limits": [{"key": "a", "limit": True}]}, None),
        ({"brokr": "x"}, None),
    ],
    ids=str,
)
def test_what_random_values_seldom_are(config: dict[str, Any], expected: Any) -> None:
    """Each taken or refused by both, ``...`` standing for as it is."""
    assert by_us(config) == (config if expected is ... else expected)
    assert meaning(by_us(config)) == meaning(by_dagster(config))


def test_everything_that_is_wrong_is_said_at_once() -> None:
    """In one line, with the nearest name of one that there is not."""
    with pytest.raises(ConfigError) as caught:
        check_config({"brokr": "x", "max_concurrent": "many", "include": 5}, "a.yaml")
    text = str(caught.value)
    assert text.startswith("a.yaml: There is no setting 'brokr'. Did you mean 'broker'?")
    assert "max_concurrent: expected an integer or {env: NAME}, not a value of type str." in text
    assert "include: expected a list" in text
