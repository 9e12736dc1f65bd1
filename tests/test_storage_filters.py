"""Filters: the text means what Python would make of it, missing values apart; errors say where."""

import ast
import operator

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.filters import check_columns, parse_filter

SCHEMA = pa.schema(
    [
        ("width", pa.int32()),
        ("score", pa.float32()),
        ("big", pa.int64()),
        ("caption", pa.string()),
        ("flag", pa.bool_()),
    ]
)
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "width": st.none() | st.integers(-5, 60_000),
            "score": st.none() | st.sampled_from([-1.0, 0.0, 0.5, 1.0, float("nan")]),
            "big": st.none() | st.integers(-(2**52), 2**52),
            "caption": st.none() | st.text("aé犬z ", max_size=3),
            "flag": st.none() | st.booleans(),
        }
    ),
    max_size=8,
)
NUMBERS = st.sampled_from(["width", "score", "big", "len(caption)"])
LITERALS = st.integers(-5, 60_000).map(str) | st.sampled_from(["0.5", "-1.5", "1e3", "-3"])
TERMS = NUMBERS | st.builds(
    "({} {} {})".format, NUMBERS, st.sampled_from("+-*"), NUMBERS | LITERALS
)
MEMBERSHIP = st.sampled_from(["in", "not in"])
COMPARED = st.sampled_from(["<", "<=", "==", "!=", ">", ">="])
LEAVES = (
    st.builds("{} {} {}".format, TERMS, COMPARED, LITERALS)
    | st.builds("{} {} width {} {}".format, LITERALS, COMPARED, COMPARED, LITERALS)
    | st.builds("caption {} '{}'".format, COMPARED, st.text("aé犬z", max_size=2))
    | st.builds("caption {} ['a', 'z']".format, MEMBERSHIP)
    | st.builds("width {} [1, 2, -3, {}]".format, MEMBERSHIP, LITERALS)
    | st.builds("'{}' {} caption".format, st.text("aé犬", max_size=2), MEMBERSHIP)
    | st.builds("{} is {}".format, NUMBERS, st.sampled_from(["None", "not None"]))
    | st.sampled_from(["flag", "flag == True", "flag != False", "flag is None"])
)  # fmt: skip
CONDITIONS = st.recursive(
    LEAVES,
    lambda inner: (
        st.builds("({}) {} ({})".format, inner, st.sampled_from(["and", "or"]), inner)
        | st.builds("not ({})".format, inner)
    ),
    max_leaves=5,
)


OPERATORS = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Eq: operator.eq, ast.NotEq: operator.ne,
    ast.GtE: operator.ge, ast.Gt: operator.gt, ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip


def truth(node, row):
    """A condition's truth over a row of Python values, None for unknown (SQL's three values)."""
    if isinstance(node, ast.BoolOp):
        answers = [truth(value, row) for value in node.values]
        decisive = isinstance(node.op, ast.Or)
        return decisive if decisive in answers else None if None in answers else not decisive
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        answer = truth(node.operand, row)
        return None if answer is None else not answer
    if not isinstance(node, ast.Compare):
        return value_of(node, row)
    values = [value_of(term, row) for term in [node.left, *node.comparators]]
    answers = []
    for left, op, right in zip(values, node.ops, values[1:], strict=False):
        if isinstance(op, ast.Is | ast.IsNot):
            answers.append((left is None) == isinstance(op, ast.Is))
        else:
            known = left is not None and right is not None
            answers.append(OPERATORS[type(op)](left, right) if known else None)
    return False if False in answers else None if None in answers else True


def value_of(node, row):
    try:
        return eval(compile(ast.Expression(node), "", "eval"), {"len": len}, row)
    except TypeError:  # arithmetic or len of None
        return None


@settings(max_examples=300, deadline=None)
@given(ROWS, CONDITIONS)
def test_a_filter_means_what_python_makes_of_it(rows, text):
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    table = table.append_column("row", pa.array(range(len(rows)), pa.int64()))
    condition = parse_filter(text)
    check_columns(condition, SCHEMA)
    found = table.filter(condition.expression)["row"].to_pylist()
    tree = ast.parse(text, mode="eval").body
    assert found == [index for index, row in enumerate(rows) if truth(tree, row) is True]


def test_arithmetic_neither_overflows_nor_truncates():
    table = pa.table({"width": pa.array([50_000, 1, 0], pa.int32())})
    for text, expected in {
        "width * width > 2_400_000_000": [50_000],
        "width / 2 == 0.5": [1],
        "1 / width > 1e9": [0],
        "-width <= -1 and -(width) != -1": [50_000],
    }.items():
        assert table.filter(parse_filter(text).expression)["width"].to_pylist() == expected


def test_what_it_names():
    condition = parse_filter("score >= 5\n  and len(caption) < 10 and not big in [1]")
    assert condition.columns == ["big", "caption", "score"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("score >", "at character 8: invalid syntax"),
        ("", "invalid syntax"),
        ("5 > 3", "no column is named"),
        ("score + 1", "not a condition"),
        ("caption == 'é' and low(score) > 1", r"at character 20, 'low\(score\)': not a column"),
        ("score == None", "None is compared with `is` only"),
        ("score in [1, None]", "None is compared with `is` only"),
        ("score in [1, 'a']", "not all of one type"),
        ("score in big", "not a list"),
        ("score is big", "`is` goes with None only"),
        ("score > {[]}", "not a column, number or string"),
        ("score > 9223372036854775808", "beyond 64 bits"),
        ("(score > 1) == True", "not a column, number or string"),
        ("score.__class__ == 1", "'score.__class__': not a column"),
        ("__import__('os') == score", "not a column"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_filter(text)
    assert "legal are columns, numbers" in str(error.value)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from("score 1 'a' ( ) [ ] { } , . : < == in not is None and - * len".split())
    )
)
def test_any_text_is_a_filter_or_a_valueerror(words):
    try:
        assert parse_filter(" ".join(words)).columns in (["score"], ["len"], ["len", "score"])
    except ValueError:
        pass


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scores > 1", "no column 'scores'; there is score"),
        ("caption > 1", "caption is string: .* no kernel"),
        ("score", "score is float"),
        ("flag and big", "flag is bool"),
        ("width in ['a']", "width is int32"),
    ],
)
def test_columns_are_checked_before_any_row_is_read(text, message):
    with pytest.raises(ValueError, match=message):
        check_columns(parse_filter(text), SCHEMA)


def test_a_dataset_reads_only_row_groups_that_can_pass(tmp_path):
    table = pa.table(
        {"score": pa.array(np.arange(100) / 10, pa.float32()), "class_id": list(range(100))}
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    dataset = ds.dataset(tmp_path)
    for text, rows, groups in [("score > 7.45", 25, 3), ("class_id in [3, 4, 95]", 3, 2)]:
        expression = parse_filter(text).expression
        fragment = next(iter(dataset.get_fragments()))
        assert len(fragment.subset(expression).row_groups) == groups
        assert dataset.to_table(filter=expression).num_rows == rows
