"""What a run holds back: as a text, and how it is told."""

from __future__ import annotations

import asyncio
import json

import pytest

from dagster_taskiq.backend.memory import MemoryBackend, MemoryServer
from dagster_taskiq.backend.withheld_log import WithheldLog
from dagster_taskiq.messages.signing import Purpose, Signer
from dagster_taskiq.messages.withheld_steps import (
    MOST_WITHHELD,
    Withheld,
    WithheldGroup,
    read_withheld,
    write_withheld,
)

KEYED, PLAIN = Signer(["k" * 32]), Signer()
WITHHELD = Withheld((WithheldGroup("db", "It is full.", (("a", 1.5), ("b", 2.5))),), 7)
NOTHING = Withheld()


# --- as a text ---


@pytest.mark.parametrize("signer", [KEYED, PLAIN])
def test_what_is_written_is_read(signer: Signer) -> None:
    """For the same run only, where there is a key."""
    data = write_withheld(signer, "run", WITHHELD)
    assert read_withheld(signer, "run", data) == WITHHELD
    assert (read_withheld(signer, "other", data) == NOTHING) is (signer is KEYED)
    assert read_withheld(signer, "run", b"") == NOTHING


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "x",
        "{}",
        '{"groups": [], "more": null}',
        '{"groups": {"a": 1}, "more": 0}',
        '{"groups": [{"pool": "", "reason": "", "steps": [["a", NaN]]}], "more": 0}',
        '{"groups": [{"pool": "", "reason": "", "steps": [["a"]]}], "more": 0}',
        json.dumps(
            {
                "groups": [{"pool": "", "reason": "", "steps": [["a", 1]] * (MOST_WITHHELD + 1)}],
                "more": 0,
            }
        ),
    ],
)
def test_what_is_nothing_of_the_kind_is_nothing(text: str) -> None:
    assert read_withheld(PLAIN, "run", PLAIN.seal(Purpose.WITHHELD, "run", text.encode())) == (
        NOTHING
    )


def test_it_is_safe_to_show_and_short() -> None:
    """However long names are, and whatever they are made of."""
    steps = tuple((f"{number}{chr(0x1F600) * 9999}\x1b[31m", 1.0) for number in range(2))
    long = Withheld((WithheldGroup("p\n" * 999, "r\x07" * 9999, steps),))
    data = write_withheld(KEYED, "run", long)
    assert len(data) < 16 * 2**10
    (group,) = read_withheld(KEYED, "run", data).groups
    assert len(group.steps) == 2
    for text in (group.pool, group.reason, *(key for key, _ in group.steps)):
        assert text.isprintable()


def test_the_longest_text_is_believed() -> None:
    """Twenty steps, each of a pool of its own, in characters of four bytes."""
    wide = 9999 * "\N{GRINNING FACE}"
    groups = tuple(
        WithheldGroup(f"{it} {wide}", f"{it} {wide}", ((f"{it} {wide}", 1e9 + it / 7),))
        for it in range(MOST_WITHHELD)
    )
    told = read_withheld(KEYED, "run", write_withheld(KEYED, "run", Withheld(groups, 2**50)))
    assert [it.pool.split()[0] for it in told.groups] == [str(it) for it in range(MOST_WITHHELD)]
    assert told.more == 2**50


def test_half_a_character_is_no_error() -> None:
    """Python's names may have what UTF-8 has not."""
    withheld = Withheld((WithheldGroup("\ud800", "\udfff", (("a\ud83d", 1.0),)),))
    (group,) = read_withheld(KEYED, "run", write_withheld(KEYED, "run", withheld)).groups
    assert group.steps == (("a\N{REPLACEMENT CHARACTER}", 1.0),)


def test_steps_of_which_more_is_known_are_left_out() -> None:
    assert WITHHELD.without({"a"}).groups[0].steps == (("b", 2.5),)
    assert WITHHELD.without({"a", "b"}) == Withheld(more=7)


# --- how it is told ---


class Told:
    """A run whose loop tells what it holds back, and the calls that this takes."""

    def __init__(self) -> None:
        self.server = MemoryServer()
        self.backend = MemoryBackend(self.server)
        self.calls: list[Withheld] = []
        self.called = asyncio.Event()
        tell = self.backend.tell_withheld

        async def counted(run_id: str, withheld: Withheld, *, token: str) -> bool:
            self.calls.append(withheld)
            try:
                return await tell(run_id, withheld, token=token)
            finally:
                self.called.set()

        self.backend.tell_withheld = counted  # type: ignore[method-assign]
        self.log = WithheldLog(self.backend, "run", "t", seconds=0.001)

    async def open(self) -> None:
        await self.backend.open_run(
            "run", generation=0, token="t", is_resumable=False, lease_seconds=600
        )

    async def seen(self) -> Withheld:
        return next((it.withheld for it in await self.backend.runs()), NOTHING)


def test_only_what_has_changed_is_told() -> None:
    async def go() -> None:
        told = Told()
        await told.open()
        await told.log.send()
        assert told.calls == []
        for withheld in (WITHHELD, NOTHING):
            told.log.note(withheld)
            await told.log.send()
            await told.log.send()
            assert await told.seen() == withheld
        assert told.calls == [WITHHELD, NOTHING]

    asyncio.run(go())


def test_what_the_backend_does_not_take_is_told_later() -> None:
    """Away, or without the run's loop, whose renewal brings that back."""

    async def go() -> None:
        told = Told()
        await told.log.send()
        told.log.note(WITHHELD)
        await told.log.send()
        told.server.freeze()
        await told.log.send()
        told.server.thaw()
        await told.open()
        await told.log.send()
        assert await told.seen() == WITHHELD

    asyncio.run(go())


def test_a_backend_that_has_gone_back_is_told_again() -> None:
    """Also that nothing is held back any more."""

    async def go() -> None:
        told = Told()
        await told.open()
        told.log.note_new_epoch()
        await told.log.send()
        assert told.calls == []
        told.log.note(WITHHELD)
        await told.log.send()
        snapshot = told.server.snapshot()
        told.server.forget()
        await told.open()
        told.log.note_new_epoch()
        await told.log.send()
        assert await told.seen() == WITHHELD
        told.log.note(NOTHING)
        await told.log.send()
        told.server.restore(snapshot)
        told.log.note_new_epoch()
        await told.log.send()
        assert await told.seen() == NOTHING

    asyncio.run(go())


def test_an_answer_that_is_lost_proves_nothing() -> None:
    async def go() -> None:
        told = Told()
        await told.open()
        told.log.note(WITHHELD)
        await told.log.send()
        told.log.note(NOTHING)
        told.server.freeze()
        await told.log.send()
        told.server.thaw()
        told.log.note(WITHHELD)
        await told.log.send()
        assert told.calls == [WITHHELD, NOTHING, WITHHELD]

    asyncio.run(go())


def test_no_error_ends_it_and_it_tells_by_itself() -> None:
    async def go() -> None:
        told = Told()
        await told.open()
        told.log.note(Withheld((WithheldGroup("", "", ((None, 1.0),)),)))  # type: ignore[arg-type]
        task = asyncio.create_task(told.log.run())
        await told.called.wait()
        told.called.clear()
        told.log.note(WITHHELD)
        await told.called.wait()
        assert await told.seen() == WITHHELD
        task.cancel()

    asyncio.run(asyncio.wait_for(go(), 30))
