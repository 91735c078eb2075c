"""Signatures: what was signed is taken, and nothing else; keys are never shown."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagster_taskiq.errors import ConfigError, UntrustedError
from dagster_taskiq.signing import MIN_KEY_CHARACTERS, Purpose, Signer, parse_keys

KEY, OTHER = "k" * MIN_KEY_CHARACTERS, "o" * MIN_KEY_CHARACTERS

#: Whatever JSON can say; numbers in both of its kinds.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text().filter(lambda key: key != "signature"), JSON)


def over_the_wire(value: Any) -> Any:
    return json.loads(json.dumps(value))


@given(OBJECTS, st.sampled_from(Purpose), st.text())
def test_what_was_signed_is_taken(content: dict[str, Any], purpose: Purpose, subject: str) -> None:
    """Whatever it is, after the way through JSON."""
    signed = over_the_wire(Signer([KEY]).signed(purpose, subject, content))
    verified = Signer([KEY]).verified(purpose, subject, signed)
    assert json.dumps(verified) == json.dumps(over_the_wire(content))


@given(OBJECTS, OBJECTS)
def test_nothing_else_is_taken_with_its_signature(
    content: dict[str, Any], other: dict[str, Any]
) -> None:
    """The signature of one object is none of another."""
    signer = Signer([KEY])
    signature = signer.sign(Purpose.TASK, "", content)
    if json.dumps(content, sort_keys=True) == json.dumps(other, sort_keys=True):
        signer.verify(Purpose.TASK, "", other, signature)
    else:
        with pytest.raises(UntrustedError, match="another signing_key, or for something else"):
            signer.verify(Purpose.TASK, "", other, signature)


@pytest.mark.parametrize(
    ("purpose", "subject", "scope"),
    [
        (Purpose.CONTROL, "task", "prefix"),
        (Purpose.RESULT, "other", "prefix"),
        (Purpose.RESULT, "task", "staging"),
    ],
)
def test_a_signature_counts_for_one_thing(purpose: Purpose, subject: str, scope: str) -> None:
    """Not for another kind of message, another task, or another deployment with the same key."""
    signed = Signer([KEY], "prefix").signed(Purpose.RESULT, "task", {"a": 1})
    assert Signer([KEY], "prefix").verified(Purpose.RESULT, "task", signed) == {"a": 1}
    with pytest.raises(UntrustedError):
        Signer([KEY], scope).verified(purpose, subject, signed)


@pytest.mark.parametrize("signature", [None, "", 1, [], {}, "0" * 64, "é" * 64, "\ud800"])
def test_a_missing_or_odd_signature_is_refused(signature: Any) -> None:
    """With one error, whatever stands in its place."""
    with pytest.raises(UntrustedError):
        Signer([KEY]).verified(Purpose.RESULT, "task", {"a": 1, "signature": signature})


def test_deep_nesting_is_refused() -> None:
    """What was read although it is deep does not end its reader when it is verified."""
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(UntrustedError):
        Signer([KEY]).verified(Purpose.TASK, "", {"a": deep, "signature": "0" * 64})


def test_keys_are_rotated_without_a_gap() -> None:
    """The first key signs, all verify: give the new one to all as the second, then as the first."""
    old, both, turned, new = (
        Signer([KEY]),
        Signer([KEY, OTHER]),
        Signer([OTHER, KEY]),
        Signer([OTHER]),
    )
    neighbours = [(old, both), (both, turned), (turned, new)]
    for one, two in [*neighbours, *((b, a) for a, b in neighbours)]:
        signed = one.signed(Purpose.RESULT, "task", {})
        assert two.verified(Purpose.RESULT, "task", signed) == {}
        assert one.is_accepted_by(two.key_ids)
    with pytest.raises(UntrustedError):
        new.verified(Purpose.RESULT, "task", old.signed(Purpose.RESULT, "task", {}))
    assert not old.is_accepted_by(new.key_ids)


def test_without_a_key_nothing_is_signed_and_signatures_are_ignored() -> None:
    """So that whoever has none notices nothing."""
    none = Signer()
    assert not none.is_active
    assert none.signed(Purpose.RESULT, "task", {"a": 1}) == {"a": 1}
    for signature in (None, "wrong"):
        signed = {"a": 1, "signature": signature}
        assert none.verified(Purpose.RESULT, "task", signed) == {"a": 1}
    assert none.is_accepted_by([])
    assert not none.is_accepted_by(Signer([KEY]).key_ids)
    assert Signer([KEY]).is_accepted_by([])


def test_a_signer_does_not_show_its_keys() -> None:
    """Nor do the names that people see of them."""
    signer = Signer([KEY, OTHER])
    for text in (repr(signer), str(signer), f"{signer.key_ids}"):
        assert KEY[:8] not in text
        assert OTHER[:8] not in text


@pytest.mark.parametrize(
    "texts",
    [
        [f"{KEY},{OTHER}"],
        [f" {KEY}\n{OTHER}\n"],
        [f"{KEY} , {OTHER},"],
        [KEY, OTHER],
        [KEY, f"{OTHER} {KEY}"],
    ],
)
def test_several_keys_in_one_text(texts: list[str]) -> None:
    """Between commas or white space, as a variable or a file with lines has them."""
    assert parse_keys("x", texts) == (KEY, OTHER)


@pytest.mark.parametrize("text", ["", " ", ",", None, 1, {"a": 1}, True, ["x"]])
def test_what_is_no_key_is_refused(text: Any) -> None:
    """An empty key must not mean that nothing is verified."""
    with pytest.raises(ConfigError, match="signing_key is empty or no text; make one by: openssl"):
        parse_keys("signing_key", [text])


def test_a_short_key_is_refused_without_being_shown() -> None:
    """The error says which one, how long it is and how long it must be."""
    short = "hunter2hunter2"
    with pytest.raises(ConfigError, match=r"key 2 has 14 characters, .* at least 32") as caught:
        parse_keys("signing_key", [KEY, short])
    assert short not in str(caught.value)
