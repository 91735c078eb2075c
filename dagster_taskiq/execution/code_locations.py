"""The code location of a task. A child executes tasks of one only.

Two locations may have modules of the same name, and a process finds what it has imported first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

#: Where a step's payload names its code.
EXECUTABLE_KEY = "executable_dict"

#: Keys of a pointer to code that name something within its module, or arguments of a call there.
_WITHIN_MODULE = ("fn_name", "attribute", "reconstructable_args", "reconstructable_kwargs")


def code_location(payload: Mapping[str, Any]) -> str:
    """The place that decides which modules a step's code is: file or module, and directory.

    Args:
        payload: of a step's task.

    Returns:
        a digest that is the same for all jobs of a location; empty where the payload has none, as a
        run's, whose child is a fresh one anyway.
    """
    found: Any = payload
    for key in (EXECUTABLE_KEY, "repository", "pointer"):
        found = found.get(key) if isinstance(found, Mapping) else None
    if not found:
        return ""
    return hashlib.sha256(json.dumps(_without_names(found), sort_keys=True).encode()).hexdigest()


def _without_names(pointer: Any) -> Any:
    if not isinstance(pointer, Mapping):
        return pointer
    kept = {key: value for key, value in pointer.items() if key not in _WITHIN_MODULE}
    return {key: _without_names(value) for key, value in kept.items()}
