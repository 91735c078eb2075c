"""Reading JSON that anybody may have written."""

from __future__ import annotations

import json
from typing import Any


def parse_object(data: bytes, max_bytes: int) -> dict[str, Any]:
    """The JSON object in strict UTF-8 that ``data`` is.

    Raises:
        ValueError: it is longer than ``max_bytes``, which bounds the time that this takes, or it
            is anything else.
    """
    if len(data) > max_bytes:
        raise ValueError(f"it has {len(data):,} bytes, {max_bytes:,} are allowed")
    try:
        # decoded here, as the parser would also guess UTF-16 and let surrogates pass
        value = json.loads(data.decode())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:  # it tells where, and shows nothing of the data
        raise ValueError(f"it is no JSON in UTF-8: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")  # noqa: TRY004 - for one kind of error
    return value
