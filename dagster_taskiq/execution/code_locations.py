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
    for key in (EXECUTABLE_KEY, "repository"):
        found = found.get(key) if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping) or not found.get("pointer"):
        return ""
    return location_of(found["pointer"], digest_of(found.get("repository_load_data")))


def location_of(pointer: Any, load_data_digest: str = "") -> str:
    """What decides which definitions code has: file or module, directory, and state.

    Args:
        pointer: Dagster's pointer to the code, packed.
        load_data_digest: of what Dagster's code server has found out for the definitions when it
            made them, such as what an API has said. Modules read it when they are loaded.

    Returns:
        a digest that is the same for all jobs of a location.
    """
    place = _without_names(pointer)
    return digest_of([place, load_data_digest] if load_data_digest else place)


def digest_of(packed: Any) -> str:
    """A digest of what Dagster has packed; empty for None."""
    if packed is None:
        return ""
    return hashlib.sha256(json.dumps(packed, sort_keys=True).encode()).hexdigest()


def _without_names(pointer: Any) -> Any:
    if not isinstance(pointer, Mapping):
        return pointer
    kept = {key: value for key, value in pointer.items() if key not in _WITHIN_MODULE}
    return {key: _without_names(value) for key, value in kept.items()}
