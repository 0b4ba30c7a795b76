"""Messages of every kind with any values that their types allow, made from the types themselves.

A message or a field that is added to the protocol is in the tests that use these from then on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from hypothesis import strategies as st
from msgspec import inspect

from nbrunner.protocol.messages import AnyMessage

KINDS: tuple[type, ...] = get_args(AnyMessage)

Fields = Mapping[str, st.SearchStrategy[Any]]


def any_message(
    kinds: Sequence[type] = KINDS, *, fields: Fields | None = None, most: int = 3
) -> st.SearchStrategy[Any]:
    """Messages of these kinds.

    Parameters
    ----------
    fields
        Strategies by the name of a field, instead of what its type allows: a model that exists, blocks near those
        that are served.
    most
        Length of lists and texts.
    """
    return st.one_of([_values(inspect.type_info(kind), fields or {}, most) for kind in kinds])


def _values(node: inspect.Type, fields: Fields, most: int) -> st.SearchStrategy[Any]:
    match node:
        case inspect.StructType():
            made = {
                field.name: fields[field.name] if field.name in fields else _values(field.type, fields, most)
                for field in node.fields
            }
            return st.builds(node.cls, **made)
        case inspect.UnionType():
            return st.one_of([_values(one, fields, most) for one in node.types])
        case inspect.ListType():
            least = node.min_length or 0
            return st.lists(_values(node.item_type, fields, most), min_size=least, max_size=max(least, most))
        case inspect.DictType():
            keys, held = _values(node.key_type, fields, most), _values(node.value_type, fields, most)
            return st.dictionaries(keys, held, max_size=most)
        case inspect.IntType():
            return st.integers(_or(node.ge, -(2**53)), _or(node.le, 2**53))
        case inspect.FloatType():
            most = _or(node.le, _or(node.lt, 1e9))
            return st.floats(_or(node.ge, -1e9), most, exclude_max=node.lt is not None)
        case inspect.StrType():
            hexadecimal = node.pattern is not None  # of all patterns there is only this one
            least = node.min_length or 0
            letters = st.sampled_from("0123456789abcdef") if hexadecimal else st.characters(codec="utf-8")
            return st.text(letters, min_size=least, max_size=max(least, most))
        case inspect.BytesType():
            return st.binary(min_size=node.min_length or 0, max_size=node.max_length or 40)
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
        case inspect.LiteralType():
            return st.sampled_from(node.values)
    raise NotImplementedError(f"the protocol has a type that these tests do not know: {node}")


def _or(bound: float | None, usual: float) -> Any:
    return usual if bound is None else bound
