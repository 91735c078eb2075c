"""The code location of a task. A child executes tasks of one only.

Two locations may have modules of the same name, and a process finds what it has imported first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

#: Keys of a step's payload, of which the second names its code, and of a run's.
ARGS_KEY = "execute_step_args_packed"
EXECUTABLE_KEY = "executable_dict"
RUN_ARGS_KEY = "execute_job_args_packed"

#: Keys of a pointer to code that name something within its module, or arguments of a call there.
_WITHIN_MODULE = ("fn_name", "attribute", "reconstructable_args", "reconstructable_kwargs")


def code_location(payload: Mapping[str, Any]) -> str:
    """The code location of a step, see ``location_of``.

    Args:
        payload: of the step's task.

    Returns:
        empty where the payload has none.
    """
    found: Any = payload
    for key in (EXECUTABLE_KEY, "repository", "pointer"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return location_of(found) if found else ""


def location_of(pointer: Any) -> str:
    """The place that decides which modules code is of: file or module, and directory.

    Args:
        pointer: Dagster's pointer to the code, packed.

    Returns:
        a digest that is the same for all jobs of a location.
    """
    text = json.dumps(_without_names(pointer), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _without_names(pointer: Any) -> Any:
    if not isinstance(pointer, Mapping):
        return pointer
    kept = {key: value for key, value in pointer.items() if key not in _WITHIN_MODULE}
    return {key: _without_names(value) for key, value in kept.items()}
