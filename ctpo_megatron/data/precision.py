"""Numbers of 32 bits in columns, as the decimal numbers that they were written for."""

from __future__ import annotations

from typing import Any


def as_written(batch: Any) -> Any:
    """Returns an Arrow batch in which numbers of 32 bits, at any depth of structs and lists, are 64-bit ones of the same digits.

    Widened as they are, they would get digits that nobody wrote: 9536.7 would be 9536.7001953125. What is left as it is keeps
    its digits: 9536.7431640625, which 32 bits hold exactly, is 2.5 to the power of 10 where 64 bits hold it.
    """
    import pyarrow as pa

    columns = [_as_written(column) for column in batch.columns]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _as_written(column: Any) -> Any:
    import pyarrow as pa

    texts = _with_singles_as(column.type, pa.string())  # Arrow writes the fewest digits that tell numbers of a width apart
    return column if texts == column.type else column.cast(texts).cast(_with_singles_as(column.type, pa.float64()))


def _with_singles_as(kind: Any, other: Any) -> Any:
    """The Arrow type `kind` with `other` in place of 32-bit numbers."""
    import pyarrow as pa

    if pa.types.is_float32(kind):
        return other
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_with_singles_as(field.type, other)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_with_singles_as(kind.value_type, other)))
    return kind
