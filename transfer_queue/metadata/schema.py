"""What the columns of a meta look like: data types and shapes of rows.

Data types are kept by their torch name ("bfloat16"), so that metas are made, cut, pickled and shown without
importing torch; they turn into `torch.dtype` where a caller asks for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from transfer_queue.errors import InvalidArgument, UnknownName, WrongType
from transfer_queue.metadata.columns import Coded, Rows

Shape: TypeAlias = "tuple[int, ...]"

_ENTRIES = ("dtype", "shape", "is_nested", "is_non_tensor", "per_sample_shapes")


class UnknownField(UnknownName, KeyError):
    """A field that the meta does not have; also the `KeyError` of a table that is asked for it."""


@dataclass(frozen=True, slots=True)
class FieldSchema:
    """One column. `shape` is that of a row; None where rows differ, or are no tensors.

    `row_shapes` has the shape of each row where it is known (ragged columns written by this process).
    """

    dtype: Any = None  # the name of a torch dtype, None for Python values
    shape: Shape | None = None
    is_nested: bool = False
    is_non_tensor: bool = False
    row_shapes: Coded[Shape | None] | None = None  # [B]

    @classmethod
    def from_dict(cls, name: str, entries: Any, size: int) -> FieldSchema:
        """Check one entry of a `field_schema`; missing entries have their defaults."""
        if not isinstance(entries, Mapping):
            raise WrongType(f"field_schema[{name!r}] must be a dict, not {type(entries).__name__} {entries!r}")
        unknown = sorted(set(map(str, entries)) - set(_ENTRIES))
        if unknown:
            raise InvalidArgument(
                f"field_schema[{name!r}] has unknown entries {unknown} (known: {', '.join(_ENTRIES)})"
            )
        shape, shapes = entries.get("shape"), entries.get("per_sample_shapes")
        if shapes is not None and len(shapes) != size:
            raise InvalidArgument(f"field_schema[{name!r}] has {len(shapes)} per_sample_shapes for {size} samples")
        return cls(
            dtype=dtype_name(entries.get("dtype")),
            shape=None if shape is None else _as_shape(shape),
            is_nested=bool(entries.get("is_nested", False)),
            is_non_tensor=bool(entries.get("is_non_tensor", False)),
            row_shapes=None if shapes is None else Coded.of(None if one is None else _as_shape(one) for one in shapes),
        )

    def as_dict(self) -> dict[str, Any]:
        entries = {
            "dtype": torch_dtype(self.dtype),
            "shape": self.shape,
            "is_nested": self.is_nested,
            "is_non_tensor": self.is_non_tensor,
        }
        if self.row_shapes is not None:
            entries["per_sample_shapes"] = self.row_shapes.rows()
        return entries

    def shapes(self, size: int) -> list[Shape | None]:
        """The shape of each of `size` rows, as far as it is known."""
        return [self.shape] * size if self.row_shapes is None else self.row_shapes.rows()

    def take(self, rows: Rows) -> FieldSchema:
        return self if self.row_shapes is None else replace(self, row_shapes=self.row_shapes.take(rows))

    @classmethod
    def concat(cls, pieces: Sequence[FieldSchema], sizes: Sequence[int]) -> FieldSchema:
        """One column behind the other: nested if a piece is, or if rows of tensors differ in shape."""
        first = pieces[0]
        same_shape = all(piece.shape == first.shape for piece in pieces)
        non_tensor = any(piece.is_non_tensor for piece in pieces)
        if same_shape and all(piece.row_shapes is None for piece in pieces):
            row_shapes = None
        else:
            row_shapes = Coded.concat([piece._row_shapes(size) for piece, size in zip(pieces, sizes, strict=True)])
        return cls(
            dtype=first.dtype,
            shape=first.shape if same_shape else None,
            is_nested=any(piece.is_nested for piece in pieces) or (not same_shape and not non_tensor),
            is_non_tensor=non_tensor,
            row_shapes=row_shapes,
        )

    def _row_shapes(self, size: int) -> Coded[Shape | None]:
        return Coded.constant(self.shape, size) if self.row_shapes is None else self.row_shapes


class FieldView(Mapping[str, Any]):
    """One field of one row: `view["shape"]` and `view.shape` say the same."""

    __slots__ = ("_row", "_schema")

    def __init__(self, schema: FieldSchema, row: int) -> None:
        self._schema = schema
        self._row = row

    @property
    def dtype(self) -> Any:
        return torch_dtype(self._schema.dtype)

    @property
    def shape(self) -> Shape | None:
        known = self._schema.row_shapes
        return self._schema.shape if known is None else known[self._row]

    @property
    def is_nested(self) -> bool:
        return self._schema.is_nested

    @property
    def is_non_tensor(self) -> bool:
        return self._schema.is_non_tensor

    def column(self) -> FieldSchema:
        """The field as a column of this row alone."""
        return self._schema.take(slice(self._row, self._row + 1))

    def __reduce__(self) -> tuple[Any, ...]:
        return FieldView, (self.column(), 0)  # without the shapes of the other rows

    def __getitem__(self, entry: str) -> Any:
        if entry not in _ENTRIES[:4]:
            raise KeyError(entry)
        return getattr(self, entry)

    def __iter__(self) -> Iterator[str]:
        return iter(_ENTRIES[:4])

    def __len__(self) -> int:
        return 4

    def __repr__(self) -> str:
        return f"<field: {self._schema.dtype or 'Python values'} {self.shape or ''}>".replace(" >", ">")


def check_fields(field_schema: Any, size: int) -> dict[str, FieldSchema]:
    """Check a whole `field_schema`; columns come out sorted by name."""
    if field_schema is None:
        return {}
    if not isinstance(field_schema, Mapping):
        raise WrongType(f"field_schema must be a dict {{field: dict}}, not {type(field_schema).__name__}")
    wrong = [name for name in field_schema if not isinstance(name, str)]
    if wrong:
        raise WrongType(f"field names must be str, not {type(wrong[0]).__name__} {wrong[0]!r}")
    return {name: FieldSchema.from_dict(name, field_schema[name], size) for name in sorted(field_schema)}


def dtype_name(dtype: Any) -> Any:
    """The name of a torch dtype; anything else as it is."""
    if type(dtype).__module__ == "torch" and type(dtype).__name__ == "dtype":
        return str(dtype).removeprefix("torch.")
    return dtype


def torch_dtype(name: Any) -> Any:
    """The torch dtype of this name; anything that is no such name as it is."""
    if not isinstance(name, str):
        return name
    import torch

    dtype = getattr(torch, name, None)
    return dtype if isinstance(dtype, torch.dtype) else name


def schema_of(data: Any) -> dict[str, FieldSchema]:
    """Derive the columns of a TensorDict [B]. Nested TensorDicts are no columns."""
    from tensordict import TensorDictBase, is_tensor_collection

    if not isinstance(data, TensorDictBase):
        raise WrongType(f"data must be a TensorDict, not {type(data).__name__}")
    fields = {}
    for name in sorted(data.keys()):
        column = data.get(name)
        if isinstance(column, TensorDictBase) and not _holds_objects(column):
            raise InvalidArgument(f"field {name!r} is a nested TensorDict: give its entries as fields of their own")
        fields[name] = FieldSchema(is_non_tensor=True) if is_tensor_collection(column) else _tensor_schema(column)
    return fields


def _holds_objects(column: Any) -> bool:
    from tensordict import is_non_tensor

    return bool(is_non_tensor(column))


def _tensor_schema(column: Any) -> FieldSchema:
    name = dtype_name(column.dtype)
    if not column.is_nested:
        return FieldSchema(dtype=name, shape=tuple(column.shape[1:]))
    return FieldSchema(dtype=name, is_nested=True, row_shapes=_nested_shapes(column))


def _nested_shapes(column: Any) -> Coded[Shape | None]:
    import torch

    first_is_ragged = column.layout == torch.jagged and isinstance(column.shape[1], torch.SymInt)
    if first_is_ragged and column.lengths() is None:
        lengths, codes = np.unique(column.offsets().diff().cpu().numpy(), return_inverse=True)
        rest = tuple(column.shape[2:])
        return Coded([(length, *rest) for length in lengths.tolist()], codes.astype(np.int64))
    return Coded.of(tuple(row.shape) for row in column.unbind())


def _as_shape(shape: Any) -> Shape:
    if isinstance(shape, int):
        raise WrongType(f"a shape must be a sequence of integers, not the int {shape}")
    return tuple(int(extent) for extent in shape)
