"""Triton's interpreter, quick enough to run the kernels' tests.

It takes some 70 microseconds for a statement, nearly all of them to find out what dtype and shape the result has.
Most statements of our kernels are arithmetic on numbers or blocks of one dtype, where nothing has to be found out:
:func:`quicken` gives those their NumPy function at once, and leaves the others to the interpreter's own. Results are
the same bits, which tests/test_triton.py checks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle, Tensor, Block = interpreter.TensorHandle, tl.core.tensor, tl.core.block_type
FLOATS = {"fp32": np.float32, "fp64": np.float64}
INTEGERS = {"int32": np.int32, "int64": np.int64}
NUMBERS: dict[str, Any] = {**FLOATS, **INTEGERS}
LOADED = (*NUMBERS, "fp16", "bf16")
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
ONE_TRUE = np.ones(1, bool)


def made(data: np.ndarray[Any, Any], dtype: Any, like: Any) -> Any:
    """A tensor as the interpreter's constructors make it, of the shape of ``like``, without their checks."""
    handle, tensor = Handle.__new__(Handle), Tensor.__new__(Tensor)
    handle.data, handle.dtype, handle.attr = data, dtype, {}
    tensor.handle, tensor.dtype, tensor.shape, tensor.numel = handle, dtype, like.shape, like.numel
    own = like.type
    if own.scalar is dtype:
        tensor.type = own
    else:
        tensor.type = Block(dtype, own.shape) if own.__class__ is Block else dtype
    return tensor


@functools.cache
def shape_of(shape: tuple[int, ...]) -> tuple[Any, Any]:
    return tl.core.tuple([tl.constexpr(length) for length in shape]), tl.constexpr(math.prod(shape))


def new_tensor(self: Any, handle: Any, type: Any) -> None:
    """The interpreter's own constructor, which makes the shape anew each time."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = shape_of(tuple(type.shape) if type.__class__ is Block else ())


@functools.cache
def numpy_dtype_of(slow: Function, dtype: Any) -> Any:
    return slow(dtype)


def numpy_dtype(slow: Function) -> Function:
    def quick(dtype: Any) -> Any:
        scalar = dtype.scalar
        return np.dtype(np.uint64) if scalar.__class__ is tl.pointer_type else numpy_dtype_of(slow, scalar)

    return quick


def new_block(slow: Function) -> Function:
    """The interpreter's own constructor of a block's type, once for a shape and a dtype."""
    known: dict[tuple[int, tuple[int, ...]], dict[str, Any]] = {}

    def quick(self: Any, element_ty: Any, shape: Any) -> None:
        lengths = tuple([each.value if each.__class__ is tl.constexpr else each for each in shape])
        attributes = known.get((id(element_ty), lengths))
        if attributes is None:
            slow(self, element_ty, shape)
            known[id(element_ty), lengths] = self.__dict__.copy()  # keeps the dtype, and so its id
        else:
            self.__dict__.update(attributes)

    return quick


@functools.cache
def both_shapes(a: tuple[int, ...], b: tuple[int, ...]) -> Any:
    """In place of a tensor that has the shape of both together."""
    try:
        shape = np.broadcast_shapes(a, b) if len(a) == len(b) else None
    except ValueError:
        shape = None
    if shape is None:
        return None
    like = SimpleNamespace(type=Block(tl.float32, list(shape)))
    like.shape, like.numel = shape_of(shape)
    return like


def spread(a: Any, b: Any) -> Any:
    """A tensor that has the shape of both together; None where they do not go together, or not so simply."""
    if b.type.__class__ is not Block:
        return a
    if a.type.__class__ is not Block:
        return b
    one, other = a.type.shape.values, b.type.shape.values
    return b if one == other else both_shapes(tuple(one), tuple(other))


def number(value: Any, kind: str, of_a_tensor: bool) -> Any:
    """A Python number as the interpreter has it beside a tensor of ``kind``; None where that takes more thought.

    Arithmetic takes it at the tensor's dtype, a comparison and a maximum as a tensor of its own first.
    """
    if value.__class__ is tl.constexpr:
        value = value.value
    if value.__class__ is int:
        if not -(2**31) <= value < 2**31 or (of_a_tensor and kind in FLOATS and abs(value) > 2**24):
            return None
    elif value.__class__ is not float or kind not in FLOATS:
        return None
    elif of_a_tensor and (value in (0, np.inf, -np.inf) or SMALLEST <= abs(value) <= LARGEST):
        value = np.float32(value)
    elif of_a_tensor and (kind != "fp64" or value != value):
        return None
    return NUMBERS[kind](value if value != 0 else 0)  # there is no -0


Function = Callable[..., Any]
Shortcut = Callable[[Function], Function]


def operator(
    function: Function, swapped: bool = False, compares: bool = False, of_a_tensor: bool = False
) -> Shortcut:
    """Arithmetic or a comparison of two tensors of one dtype, or of one and a number."""

    def around(slow: Function) -> Function:
        def quick(self: Any, other: Any) -> Any:
            dtype = self.dtype
            kind = dtype.name
            if kind not in NUMBERS:
                return slow(self, other)
            if other.__class__ is Tensor:
                if kind in INTEGERS and other.dtype.name in INTEGERS and other.dtype.name != kind:
                    kind, dtype = "int64", tl.int64
                    like = spread(self, other)
                else:
                    like = spread(self, other) if other.dtype.name == kind else None
                value = other.handle.data
            else:
                like, value = self, number(other, kind, of_a_tensor)
                if value is None:
                    like = None
            if like is None:
                return slow(self, other)
            a, b = (value, self.handle.data) if swapped else (self.handle.data, value)
            if compares:
                return made(function(a, b), tl.int1, like)
            if kind in FLOATS:
                return made(function(a, b), dtype, like)
            if function is np.divide:
                return slow(self, other)
            if kind == "int32":
                wide = function(a.astype(np.int64), b)
                data = wide.astype(np.int32)
                return made(data, dtype, like) if (data == wide).all() else slow(self, other)
            return made(function(a, b), dtype, like)

        return quick

    return around


def add(slow: Function) -> Function:
    """Also to a pointer."""
    numbers = operator(np.add)(slow)

    def quick(self: Any, other: Any) -> Any:
        if self.dtype.__class__ is not tl.pointer_type:
            return numbers(self, other)
        if other.__class__ is Tensor and other.dtype.name in ("int32", "int64"):
            like, offset = spread(self, other), other.handle.data
        else:
            offset = number(other, "int64", False)
            like = None if offset is None else self
        if like is None:
            return slow(self, other)
        width = max(1, self.dtype.element_ty.primitive_bitwidth // 8)
        return made(self.handle.data + width * offset.astype(np.uint64), self.dtype, like)

    return quick


def logical(function: Function) -> Shortcut:
    def around(slow: Function) -> Function:
        def quick(self: Any, other: Any) -> Any:
            if other.__class__ is Tensor and self.dtype.name == other.dtype.name == "int1":
                like = spread(self, other)
                if like is not None:
                    return made(function(self.handle.data, other.handle.data), self.dtype, like)
            return slow(self, other)

        return quick

    return around


def unary(function: Function) -> Shortcut:
    def around(slow: Function) -> Function:
        def quick(x: Any) -> Any:
            if x.__class__ is Tensor and x.dtype.name in FLOATS:
                return made(function(x.handle.data), x.dtype, x)
            return slow(x)

        return quick

    return around


def larger(function: Function) -> Shortcut:
    both = operator(function, of_a_tensor=True)

    def around(slow: Function) -> Function:
        numbers = both(slow)

        def quick(x: Any, y: Any, **options: Any) -> Any:
            if options or x.__class__ is not Tensor or x.dtype.name not in FLOATS:
                return slow(x, y, **options)
            return numbers(x, y)

        return quick

    return around


def fma(slow: Function) -> Function:
    def quick(x: Any, y: Any, z: Any) -> Any:
        if x.__class__ is not Tensor or x.dtype.name not in FLOATS:
            return slow(x, y, z)
        like, values = x, []
        for each in (y, z):
            if each.__class__ is Tensor:
                values.append(each.handle.data)
                like = None if like is None or each.dtype.name != x.dtype.name else spread(like, each)
            else:
                values.append(number(each, x.dtype.name, True))
        if like is None or values[0] is None or values[1] is None:
            return slow(x, y, z)
        return made(x.handle.data * values[0] + values[1], x.dtype, like)

    return quick


def where(slow: Function) -> Function:
    def quick(condition: Any, x: Any, y: Any) -> Any:
        if condition.__class__ is not Tensor or condition.dtype.name != "int1":
            return slow(condition, x, y)
        if x.__class__ is y.__class__ is int:
            dtype = tl.int32
        elif x.__class__ is Tensor or y.__class__ is Tensor:
            dtype = (x if x.__class__ is Tensor else y).dtype
        else:
            return slow(condition, x, y)
        kind, like, values = dtype.name, condition, []
        for each in (x, y):
            if each.__class__ is Tensor:
                values.append(each.handle.data)
                like = None if like is None or each.dtype.name != kind else spread(like, each)
            else:
                values.append(number(each, kind, False) if kind in NUMBERS else None)
        if like is None or kind not in NUMBERS or values[0] is None or values[1] is None:
            return slow(condition, x, y)
        return made(np.where(condition.handle.data, *values), dtype, like)

    return quick


def to(slow: Function) -> Function:
    def quick(self: Any, dtype: Any, *options: Any, **named: Any) -> Any:
        if dtype.__class__ is tl.dtype and not options and not named:
            if dtype.name == self.dtype.name:
                return self
            if (dtype.name in NUMBERS and self.dtype.name in INTEGERS) or (
                dtype.name in FLOATS and self.dtype.name in (*FLOATS, "fp16")
            ):
                return made(self.handle.data.astype(NUMBERS[dtype.name]), dtype, self)
        return slow(self, dtype, *options, **named)

    return quick


def under(mask: Any, pointer: Any, kind: str = "int1") -> bool:
    """Whether both are blocks of one shape."""
    return (
        mask.__class__ is Tensor
        and mask.dtype.name == kind
        and mask.type.__class__ is pointer.type.__class__ is Block
        and mask.type.shape.values == pointer.type.shape.values
    )


@functools.cache
def elsewhere(value: float, dtype: Any, lengths: tuple[int, ...]) -> Any:
    """A block of what a load gives where its mask is not set."""
    semantic = interpreter.interpreter_semantic
    number = semantic.cast(semantic.to_tensor(value), dtype).handle.data
    return np.full(lengths, number[0])


def load(slow: Function) -> Function:
    """Of one number, or of a block of them under a mask."""

    def quick(pointer: Any, *options: Any, **named: Any) -> Any:
        if options or pointer.dtype.__class__ is not tl.pointer_type:
            return slow(pointer, *options, **named)
        dtype = pointer.dtype.element_ty
        if not named and pointer.type.__class__ is tl.pointer_type and dtype.name in LOADED:
            kind = interpreter._get_np_dtype(dtype)
            data = interpreter._interpreter.load(pointer.handle.data, ONE_TRUE, np.zeros(1, kind), kind)
            return made(data, dtype, pointer)
        if named.keys() == {"mask", "other"} and under(named["mask"], pointer) and dtype.name in LOADED:
            other = named["other"]
            value = other.value if other.__class__ is tl.constexpr else other
            if value.__class__ in (int, float):
                rest = elsewhere(value, dtype, tuple(pointer.type.shape.values))
                data = interpreter._interpreter.load(
                    pointer.handle.data, named["mask"].handle.data, rest, rest.dtype
                )
                return made(data, dtype, pointer)
        return slow(pointer, *options, **named)

    return quick


def store(slow: Function) -> Function:
    def quick(pointer: Any, value: Any, *options: Any, **named: Any) -> Any:
        if options or pointer.dtype.__class__ is not tl.pointer_type or value.__class__ is not Tensor:
            return slow(pointer, value, *options, **named)
        kind = pointer.dtype.element_ty.name
        if value.dtype.name == kind and kind in LOADED:
            data = value.handle.data
            if not named and pointer.type.__class__ is tl.pointer_type and value.type.__class__ is not Block:
                return interpreter._interpreter.store(pointer.handle.data, data, ONE_TRUE)
            if named.keys() == {"mask"} and under(named["mask"], pointer) and under(value, pointer, kind):
                return interpreter._interpreter.store(pointer.handle.data, data, named["mask"].handle.data)
        return slow(pointer, value, *options, **named)

    return quick


def full(slow: Function) -> Function:
    def quick(shape: Any, value: Any, dtype: Any) -> Any:
        if value.__class__ is tl.constexpr:
            value = value.value
        if shape == () and value.__class__ in (int, float) and dtype.name in FLOATS:
            return Tensor(Handle(np.array([value if value != 0 else 0], FLOATS[dtype.name]), dtype), dtype)
        if shape == () and value.__class__ is bool and dtype.name == "int1":
            return Tensor(Handle(np.array([value]), dtype), dtype)
        return slow(shape, value, dtype)

    return quick


ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.divide}
COMPARISONS = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip
SHORTCUTS: dict[Any, dict[str, Shortcut]] = {
    Tensor: {
        **{f"__{name}__": operator(function) for name, function in ARITHMETIC.items()},
        **{f"__r{name}__": operator(function, swapped=True) for name, function in ARITHMETIC.items()},
        **{
            f"__{name}__": operator(function, compares=True, of_a_tensor=True)
            for name, function in COMPARISONS.items()
        },
        "__add__": add,
        "__and__": logical(np.bitwise_and),
        "__or__": logical(np.bitwise_or),
        "to": to,
    },
    tl: {
        **{name: unary(getattr(np, name)) for name in ("exp", "exp2", "log", "abs")},
        "maximum": larger(np.maximum),
        "minimum": larger(np.minimum),
        "fma": fma,
        "where": where,
        "load": load,
        "store": store,
        "full": full,
    },
}


def shortcuts() -> Iterator[tuple[Any, str, Shortcut]]:
    for place, several in SHORTCUTS.items():
        for name, shortcut in several.items():
            yield place, name, shortcut


class Nothing:
    def restore(self) -> None:
        """What is patched stays: nothing here is for a GPU."""


def scan(self: Any, given: Any) -> list[Any]:
    """By doubling, on whole arrays; the interpreter's own goes element by element, in a thousand times the time."""
    arrays = [each.handle.data.copy() for each in given]
    reach, length = 1, arrays[0].shape[self.axis]
    while reach < length:
        ends = self.combine_fn.fn(
            *(
                self.to_tensor(np.roll(a, reach, self.axis), g.dtype)
                for a, g in zip(arrays, given, strict=True)
            ),
            *(self.to_tensor(a, g.dtype) for a, g in zip(arrays, given, strict=True)),
        )
        reached = (slice(None),) * self.axis + (slice(reach, None),)
        for array, end in zip(arrays, ends if isinstance(ends, tuple) else (ends,), strict=True):
            array[reached] = end.handle.data[reached]
        reach *= 2
    return [self.to_tensor(a, g.dtype) for a, g in zip(arrays, given, strict=True)]


def quicken() -> None:
    """Patch Triton's language once and for good, instead of at each launch and each call; with the shortcuts."""
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: Nothing()
    for place, name, shortcut in shortcuts():
        slow = getattr(place, name)
        quick = shortcut(slow)
        quick.__wrapped__ = slow  # type: ignore[attr-defined]
        setattr(place, name, quick)
    interpreter.GridExecutor.__call__ = np.errstate(all="ignore")(interpreter.GridExecutor.__call__)
    interpreter.GridExecutor._restore_args_dev = lambda *_: None  # the CPU's tensors are the kernels' own
    Tensor.__init__ = new_tensor
    Block.__init__ = new_block(Block.__init__)
    interpreter._get_np_dtype = numpy_dtype(interpreter._get_np_dtype)
    interpreter.ScanOps.generic_scan = scan
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **named: self.rewrite()(*args, **named)
