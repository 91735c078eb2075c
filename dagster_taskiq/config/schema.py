"""The settings as Dagster's config schema, which the launchpad shows and Dagster checks."""

from __future__ import annotations

from typing import Any

from dagster import Any as AnyType
from dagster import (
    Array,
    Field,
    IntSource,
    Noneable,
    Permissive,
    ScalarUnion,
    Selector,
    StringSource,
)

from dagster_taskiq._dagster.names import tag_concurrency_limits_field
from dagster_taskiq.config import shapes
from dagster_taskiq.config.setting import Setting, settings_of
from dagster_taskiq.config.settings import Settings

_TYPES: dict[type[shapes.Shape], Any] = {
    shapes.Anything: AnyType,
    shapes.Options: Permissive(),
    shapes.Text: StringSource,
    shapes.Integer: IntSource,
    shapes.Number: ScalarUnion(scalar_type=float, non_scalar_schema={"env": str}),
}


def _type_of(shape: shapes.Shape | None) -> Any:
    """Dagster's type of what has a shape."""
    if isinstance(shape, shapes.Nullable):
        return Noneable(_type_of(shape.inner))
    if isinstance(shape, shapes.ListOf):
        return Array(_type_of(shape.item))
    if isinstance(shape, shapes.Choice):
        return Selector({**{name: {} for name in shape.names}, "env": str})
    assert shape is not None
    return _TYPES[type(shape)]


def _field_of(row: Setting) -> Field:
    """A setting in Dagster's schema."""
    if isinstance(row.shape, shapes.ListOf) and isinstance(row.shape.item, shapes.TagLimit):
        field: Field = tag_concurrency_limits_field()  # type: ignore[no-untyped-call]
        return field
    given: dict[str, Any] = {
        "is_required": False,
        "description": f"{row.text} Default: {row.default_text}.",
    }
    if row.schema_default is not None:
        given["default_value"] = row.schema_default
    return Field(_type_of(row.shape), **given)


#: What the executor takes, and the YAML of a worker.
EXECUTOR_SCHEMA: dict[str, Field] = {row.name: _field_of(row) for row in settings_of(Settings)}

#: What the launcher takes.
CONNECTION_SCHEMA: dict[str, Field] = {
    row.name: EXECUTOR_SCHEMA[row.name] for row in settings_of(Settings) if row.is_of_launcher
}
