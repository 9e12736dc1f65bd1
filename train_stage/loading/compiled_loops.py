"""Loops that numba compiles where it is installed, and numpy's way where it is not.

Half a second to import numba, and seconds more the first time, which later processes find cached.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

try:
    from llvmlite import ir
    from numba import njit, types
    from numba.extending import intrinsic
except ImportError:  # numba lags behind new Pythons
    njit = None  # type: ignore[assignment]

AHEAD = 32  # rows: under way to the second-level cache
LINE_BYTES = 64


def compile_loops(loops: Callable, fallback: Callable, *signatures: str) -> Callable:
    """`loops` compiled by numba, without the GIL; `fallback` where numba is not installed.

    It is compiled, or loaded from the cache, at once, so that no batch waits for it.
    """
    if njit is None:
        return fallback
    try:
        return njit(list(signatures), nogil=True, cache=True)(loops)
    except RuntimeError:  # no folder to cache in: a read-only installation, and no home
        return njit(list(signatures), nogil=True)(loops)


def copy_rows_numpy(flat: np.ndarray, index: np.ndarray, out: np.ndarray) -> None:
    """out[i] = flat[index[i] : index[i] + width], for an array of any span."""
    windows = np.lib.stride_tricks.sliding_window_view(flat, out.shape[1])
    out[:] = windows[index[: len(out)]]


def copy_rows_loops(flat: Any, index: Any, out: Any) -> None:
    """The same; rows that are wanted soon, also beyond `out`, are on their way meanwhile."""
    width, line = out.shape[1], LINE_BYTES // out.itemsize
    for row in range(len(out)):
        if row + AHEAD < len(index):
            for place in range(0, width, line):
                prefetch(flat, index[row + AHEAD] + place)  # type: ignore[call-arg]
        source, target = flat[index[row] : index[row] + width], out[row]
        for place in range(width):
            target[place] = source[place]


def _prefetch_code(context: Any, flat: Any, place: Any) -> Any:
    """numba's recipe for LLVM's prefetch of flat[place], for reading, to the second-level cache."""

    def emit(target: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = target.make_array(signature.args[0])(target, builder, values[0]).data
        address, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [address], kind)
        pointer = builder.bitcast(builder.gep(data, [values[1]]), address)
        builder.call(function, [pointer, number(0), number(2), number(1)])
        return target.get_dummy_value()

    return types.void(flat, place), emit


prefetch = intrinsic(_prefetch_code) if njit is not None else None
copy_rows = compile_loops(
    copy_rows_loops,
    copy_rows_numpy,
    "void(u2[::1], i8[::1], u2[:, ::1])",
    "void(u4[::1], i8[::1], u4[:, ::1])",
)


def gather(
    flat: np.ndarray,
    index: np.ndarray,
    rows: int,
    shape: tuple[int, ...],
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Rows (rows, *shape) that begin at index (rows or more,) int64 of a flat unsigned array.

    What index has beyond `rows` will be wanted next. out: filled and returned, where given. One
    thread: more of them only wait for each other here.
    """
    if out is None:
        out = np.empty((rows, *shape), flat.dtype)
    copy_rows(flat, index, out if out.ndim == 2 else out.reshape(rows, math.prod(shape)))
    return out
