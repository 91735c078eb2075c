"""Notes of workers to runs whose tasks they give back: the only word of theirs that gets there."""

from __future__ import annotations

from dagster_taskiq.errors import UntrustedError
from dagster_taskiq.messages.plain_text import plain_reason
from dagster_taskiq.messages.signing import Purpose, Signer

#: The longest note that is believed, in bytes.
_MAX_NOTE_BYTES = 4096


def write_note(signer: Signer, run_id: str, text: str) -> bytes:
    """A note to a run, ready to be sent."""
    return signer.seal(Purpose.NOTE, run_id, text.encode(errors="replace"))


def read_note(signer: Signer, run_id: str, data: bytes) -> str | None:
    """The text of a note, safe to show; None where it is too long, or not signed as it must be."""
    try:
        text = signer.unseal(Purpose.NOTE, run_id, data[: _MAX_NOTE_BYTES + 1])
    except UntrustedError:
        return None
    if len(text) > _MAX_NOTE_BYTES:
        return None
    return plain_reason(text.decode(errors="replace"))
