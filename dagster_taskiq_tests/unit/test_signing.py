"""Signatures: what was signed is taken, and nothing else; keys are never shown."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagster_taskiq.errors import ConfigError, TooLargeError, UntrustedError
from dagster_taskiq.messages.signing import MIN_KEY_CHARACTERS, Purpose, Signer, parse_keys

KEY, OTHER = "k" * MIN_KEY_CHARACTERS, "o" * MIN_KEY_CHARACTERS


@given(st.binary(), st.sampled_from(Purpose), st.text())
def test_what_was_sealed_is_taken(text: bytes, purpose: Purpose, subject: str) -> None:
    """Whatever the bytes are."""
    sealed = Signer([KEY]).seal(purpose, subject, text)
    assert Signer([KEY]).unseal(purpose, subject, sealed) == text


@given(st.binary(), st.binary())
def test_nothing_else_is_taken_with_its_signature(text: bytes, other: bytes) -> None:
    """The signature of one text is none of another."""
    signer = Signer([KEY])
    sealed = signer.seal(Purpose.TASK, "", text)
    forged = sealed.removesuffix(text) + other
    if text == other:
        assert signer.unseal(Purpose.TASK, "", forged) == text
    else:
        with pytest.raises(UntrustedError, match="another signing_key, or for something else"):
            signer.unseal(Purpose.TASK, "", forged)


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
    sealed = Signer([KEY], "prefix").seal(Purpose.RESULT, "task", b"{}")
    assert Signer([KEY], "prefix").unseal(Purpose.RESULT, "task", sealed) == b"{}"
    with pytest.raises(UntrustedError):
        Signer([KEY], scope).unseal(purpose, subject, sealed)


@pytest.mark.parametrize(
    "line", [b"", b"signature \n", b"signature 0\n", b"signature " + b"0" * 64 + b"\n", b"\xff\n"]
)
def test_a_missing_or_odd_signature_is_refused(line: bytes) -> None:
    """With one error, whatever stands in its place."""
    with pytest.raises(UntrustedError):
        Signer([KEY]).unseal(Purpose.RESULT, "task", line + b"{}")


def test_what_is_too_large_is_neither_written_nor_read() -> None:
    """The error names both sizes and the setting; a reader looks at nothing else before."""
    short, long = Signer([KEY], max_bytes=10), Signer([KEY], max_bytes=11)
    assert short.unseal(Purpose.TASK, "", long.seal(Purpose.TASK, "", b"x" * 10)) == b"x" * 10
    for use in (
        lambda: short.seal(Purpose.TASK, "", b"x" * 11),
        lambda: short.unseal(Purpose.TASK, "", long.seal(Purpose.TASK, "", b"x" * 11)),
        lambda: short.unseal(Purpose.TASK, "", b"x" * 11),
        lambda: Signer(max_bytes=10).unseal(Purpose.TASK, "", b"x" * 11),
    ):
        with pytest.raises(TooLargeError, match=r"11 bytes, .* max_message_bytes allows 10"):
            use()


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
        sealed = one.seal(Purpose.RESULT, "task", b"{}")
        assert two.unseal(Purpose.RESULT, "task", sealed) == b"{}"
        assert one.is_accepted_by(two.key_ids)
    with pytest.raises(UntrustedError):
        new.unseal(Purpose.RESULT, "task", old.seal(Purpose.RESULT, "task", b"{}"))
    assert not old.is_accepted_by(new.key_ids)


def test_without_a_key_nothing_is_signed_and_signatures_are_ignored() -> None:
    """So that whoever has none notices nothing."""
    none = Signer()
    assert not none.is_active
    assert none.seal(Purpose.RESULT, "task", b"{}") == b"{}"
    for signer in (none, Signer([OTHER])):
        sealed = signer.seal(Purpose.RESULT, "task", b"{}")
        assert none.unseal(Purpose.RESULT, "task", sealed) == b"{}"
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
