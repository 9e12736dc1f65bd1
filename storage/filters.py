"""Filters: a condition on table columns, written as text, as a pyarrow expression.

    aesthetic_score >= 5 and not watermark_score > 0.5
    class_id in [1, 7] and caption is not None and len(caption) < 200
    "dog" in caption or original_width * original_height >= 65536

Python's syntax, read with `ast`, never run. As in SQL, a comparison with a missing value is neither
true nor false, nor is its `not`: such a row does not pass; `is None` asks for it. Arithmetic is in
float64 (x / 0 is infinite). Evaluated by TokenStore.rows_where and by pyarrow datasets, which skip
what Parquet statistics rule out.
"""

import ast
import difflib
from dataclasses import dataclass, field
from functools import reduce
from operator import and_, eq, ge, gt, le, lt, ne, or_
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

LEGAL = (
    "columns, numbers, strings, True, False; < <= == != >= >, in [...], not in [...], is None, "
    'is not None, "text" in column; and, or, not, parentheses; + - * /, len(column)'
)
COMPARISONS: dict[type, Any] = {
    ast.Lt: lt, ast.LtE: le, ast.Eq: eq, ast.NotEq: ne, ast.GtE: ge, ast.Gt: gt
}  # fmt: skip
ARITHMETIC: dict[type, Any] = {
    ast.Add: pc.add, ast.Sub: pc.subtract, ast.Mult: pc.multiply, ast.Div: pc.divide
}  # fmt: skip
UNKNOWN = pc.scalar(pa.scalar(None, pa.bool_()))


@dataclass(frozen=True)
class Filter:
    """A condition: as written, as pyarrow evaluates it, and the columns that it names, sorted."""

    text: str
    expression: pc.Expression = field(compare=False, repr=False)
    columns: list[str] = field(compare=False)


class _Illegal(Exception):
    """(what is wrong, the part of the condition where it is)."""


def parse_filter(text: str) -> Filter:
    """Reads a condition. Raises ValueError naming the place and what is legal there."""
    source = text.replace("\n", " ").strip()
    try:
        tree = ast.parse(source, mode="eval").body
        columns = sorted(_names(tree))
        if not columns:
            raise _Illegal("no column is named", tree)
        return Filter(text, _condition(tree), columns)
    except SyntaxError as error:
        place, problem = f" at character {error.offset or len(source) + 1}", error.msg
    except _Illegal as error:
        problem, node = error.args
        before = source.encode()[: node.col_offset].decode()  # ast counts bytes
        place = f" at character {len(before) + 1}, {ast.get_source_segment(source, node)!r}"
    raise ValueError(f"filter {source!r}{place}: {problem}; legal are {LEGAL}") from None


def check_columns(condition: Filter, schema: pa.Schema) -> None:
    """Raises ValueError for a column that `schema` lacks or that is of an unfit type."""
    for name in condition.columns:
        if name not in schema.names:
            near = difflib.get_close_matches(name, schema.names) or schema.names
            raise ValueError(
                f"filter {condition.text!r}: no column {name!r}; there is {', '.join(near)}"
            )
    try:
        schema.empty_table().filter(condition.expression)
    except pa.ArrowException as error:
        types = ", ".join(f"{name} is {schema.field(name).type}" for name in condition.columns)
        raise ValueError(f"filter {condition.text!r}: {types}: {error}") from None


def _condition(node: ast.expr) -> pc.Expression:
    """What is true, false or unknown of a row."""
    match node:
        case ast.BoolOp():
            combine = and_ if isinstance(node.op, ast.And) else or_
            return reduce(combine, map(_condition, node.values))
        case ast.UnaryOp(op=ast.Not()):
            return ~_condition(node.operand)
        case ast.Compare():
            terms = [node.left, *node.comparators]
            pairs = zip(terms, node.ops, terms[1:], strict=False)
            return reduce(and_, [_comparison(*pair) for pair in pairs])
        case ast.Name():
            return pc.field(node.id)
    raise _Illegal("not a condition", node)


def _comparison(left: ast.expr, operator: ast.cmpop, right: ast.expr) -> pc.Expression:
    match operator:
        case ast.Is() | ast.IsNot():
            if not (isinstance(right, ast.Constant) and right.value is None):
                raise _Illegal("`is` goes with None only", right)
            value = _value(left)
            return value.is_null() if isinstance(operator, ast.Is) else value.is_valid()
        case ast.In() | ast.NotIn():
            found = _membership(left, right)
            return found if isinstance(operator, ast.In) else ~found
    return COMPARISONS[type(operator)](_value(left), _value(right))


def _membership(left: ast.expr, right: ast.expr) -> pc.Expression:
    if isinstance(left, ast.Constant) and isinstance(left.value, str):
        return pc.match_substring(_value(right), left.value)
    if not isinstance(right, ast.List | ast.Tuple | ast.Set):
        raise _Illegal("not a list", right)
    try:
        values = pa.array([_literal(item) for item in right.elts])
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        raise _Illegal("not all of one type", right) from None
    value = _value(left)
    return value.isin(values) | (value.is_null() & UNKNOWN)  # isin alone is false for null


def _value(node: ast.expr) -> pc.Expression:
    """What can be compared: a column, a literal, a result of arithmetic."""
    match node:
        case ast.Name():
            return pc.field(node.id)
        case ast.BinOp() if type(node.op) in ARITHMETIC:
            return ARITHMETIC[type(node.op)](_number(node.left), _number(node.right))
        case ast.UnaryOp(op=ast.USub()) if not isinstance(node.operand, ast.Constant):
            return pc.negate(_number(node.operand))
        case ast.Call(func=ast.Name(id="len"), args=[ast.Name() as column], keywords=[]):
            return pc.utf8_length(pc.field(column.id))
    value = _literal(node)
    if isinstance(value, float):  # arrow would narrow 0.5 to float32, and integers with it
        return pc.scalar(value).cast(pa.float64())
    return pc.scalar(value)


def _number(node: ast.expr) -> pc.Expression:
    return _value(node).cast(pa.float64(), safe=False)


def _literal(node: ast.expr) -> bool | int | float | str:
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError):
        raise _Illegal("not a column, number or string", node) from None
    if value is None:
        raise _Illegal("None is compared with `is` only", node)
    if not isinstance(value, bool | int | float | str):
        raise _Illegal("not a number or string", node)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise _Illegal("an integer beyond 64 bits", node)
    return value


def _names(tree: ast.expr) -> set[str]:
    calls = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node not in calls}
