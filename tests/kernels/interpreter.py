"""Triton's interpreter without what it does over and over: the same values from the same steps, in less time.

It looks through the whole language for what to replace at each call of a device function, though that is replaced
already since the launch began; it builds its table of NumPy's types for each value, and each value's shape and type
anew. What is kept here instead is looked up by what it was made from. It finds the common type of two operands of one
type, and computes each sum and product of integers once more in 64 bits for an assertion that only debugging makes.
Operands of one type it gives one shape before NumPy does so itself; here the builder gets them as they are.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from omnimamba_kernels import triton_launch


@cache
def quicken() -> None:
    """Once a process, where Triton interprets."""
    if not triton_launch.interpreting():
        return
    import triton.language as tl
    from triton.runtime import interpreter

    triton_launch._mend_interpreter()  # now: a test that puts something in place of the mended parts puts them back
    interpreter._patch_attr = _directly(interpreter._patch_attr, interpreter.interpreter_semantic, tl)
    interpreter._patch_lang = _once_a_launch(interpreter._patch_lang, interpreter._LangPatchScope, tl)
    interpreter._get_np_dtype = _remembered_dtype(interpreter._get_np_dtype, tl)
    tl.block_type.__init__ = _remembered_type(tl.block_type.__init__, tl)
    tl.tensor.__init__ = _remembered_shape(tl)
    semantic = type(interpreter.interpreter_semantic)
    semantic.broadcast_impl_value = _broadcast_if_different(semantic.broadcast_impl_value)
    semantic.binary_op_type_checking_impl = _alike_as_they_are(semantic.binary_op_type_checking_impl, tl)
    semantic.binary_op_sanitize_overflow_impl = _only_to_debug(semantic.binary_op_sanitize_overflow_impl)


def _once_a_launch(patch: Any, new_scope: Any, tl: Any) -> Any:
    """Functions that see the same parts of the language get them replaced once until the launch is over."""
    replaced: set[tuple[bool, bool]] = set()
    seen: dict[Any, tuple[bool, bool]] = {}

    def patch_lang(fn: Any) -> Any:
        if fn not in seen:
            values = list(fn.__globals__.values())
            seen[fn] = any(v is tl for v in values), any(v is tl.core for v in values)
        if seen[fn] in replaced:
            return new_scope()
        scope = patch(fn)
        if not replaced:  # the launch itself: its scope is the one that is restored
            restore = scope.restore

            def restore_all() -> None:
                replaced.clear()
                restore()

            scope.restore = restore_all
        replaced.add(seen[fn])
        return scope

    return patch_lang


_PLAIN = {
    "__add__": ("create_fadd", "create_add", None),
    "__sub__": ("create_fsub", "create_sub", None),
    "__mul__": ("create_fmul", "create_mul", None),
    "__truediv__": ("create_fdiv", None, None),
    "__lt__": ("create_fcmpOLT", "create_icmpSLT", None),
    "__le__": ("create_fcmpOLE", "create_icmpSLE", None),
    "__gt__": ("create_fcmpOGT", "create_icmpSGT", None),
    "__ge__": ("create_fcmpOGE", "create_icmpSGE", None),
    "__eq__": ("create_fcmpOEQ", "create_icmpEQ", None),
    "__ne__": ("create_fcmpUNE", "create_icmpNE", None),
    "__and__": (None, "create_and", "create_and"),
    "__or__": (None, "create_or", "create_or"),
    "__xor__": (None, "create_xor", "create_xor"),
}
"""What the builder does for an operator with operands of fp32 or fp64, of int32 or int64, of int1."""


def _directly(patch: Any, semantic: Any, tl: Any) -> Any:
    """A part of the language without the two calls around it that give it its semantics; operators in few steps."""
    wrapper = tl.core.builtin(lambda: None).__code__

    def patch_attr(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        if member.__code__ is not wrapper:
            patch(obj, name, member, builder, scope)
            return
        inner = member.__wrapped__

        def whole(*args: Any, **named: Any) -> Any:
            named["_semantic"] = semantic
            return inner(*args, **named)

        plain = obj is tl.tensor and not builder.options.debug
        if plain and name in _PLAIN:
            scope.set_attr(obj, name, _operator(name, whole, builder, tl))
        elif plain and name.replace("__r", "__", 1) in ("__add__", "__mul__"):  # which commute
            scope.set_attr(obj, name, _operator(name.replace("__r", "__", 1), whole, builder, tl))
        else:
            scope.set_attr(obj, name, whole)

    return patch_attr


def _operator(name: str, whole: Any, builder: Any, tl: Any) -> Any:
    floats, integers, booleans = _PLAIN[name]
    to_call = {"fp32": floats, "fp64": floats, "int32": integers, "int64": integers, "int1": booleans}
    steps = {dtype: getattr(builder, step) for dtype, step in to_call.items() if step is not None}
    constants = {"fp32": builder.get_fp32, "int32": builder.get_int32, "int64": builder.get_int64}
    limits = {"int32": 2**31, "int64": 2**63, "fp32": 2**63}
    compares = name in ("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__")
    tensor, constexpr, int1 = tl.tensor, tl.constexpr, tl.int1

    def operator(self: Any, other: Any, _semantic: Any = None) -> Any:
        dtype = self.dtype
        step = steps.get(dtype.name)
        if step is None:
            return whole(self, other)
        if type(other) is constexpr:
            other = other.value
        like = self
        if type(other) is tensor:
            if other.dtype.name != dtype.name:
                return whole(self, other)
            handle = step(self.handle, other.handle)
            if other.shape is not self.shape and other.shape:
                like = other if not self.shape else None
        elif (type(other) is int and -limits.get(dtype.name, 0) <= other < limits.get(dtype.name, 0)) or (
            type(other) is float and dtype.name == "fp32"
        ):
            handle = step(self.handle, constants[dtype.name](other))
        else:
            return whole(self, other)
        if like is None:
            return tensor(handle, tl.block_type(int1 if compares else dtype, list(handle.data.shape)))
        if compares:
            return tensor(handle, tl.block_type(int1, like.type.shape) if like.shape else int1)
        made = tensor.__new__(tensor)
        made.handle, made.type, made.dtype, made.shape, made.numel = handle, like.type, dtype, like.shape, like.numel
        return made

    return operator


def _remembered_dtype(get: Any, tl: Any) -> Any:
    known: dict[str, Any] = {}

    def get_np_dtype(dtype: Any) -> Any:
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        if isinstance(element, tl.pointer_type):
            return get(element)
        if element.name not in known:
            known[element.name] = get(element)
        return known[element.name]

    return get_np_dtype


def _numbers(shape: Any) -> tuple:
    return tuple([s.value if hasattr(s, "value") else s for s in shape])


def _remembered_type(make: Any, tl: Any) -> Any:
    """A block's type: its shape, checked, and its length are the same for all types of that shape."""
    known: dict[tuple, tuple[Any, int, str]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        numbers = _numbers(shape)
        found = known.get(numbers)
        if found is None:
            make(self, element_ty, shape)
            known[numbers] = self.shape, self.numel, str(self.shape)
            return
        self.element_ty = element_ty
        self.shape, self.numel, text = found
        self.name = f"<{text}, {element_ty}>"

    return init


def _remembered_shape(tl: Any) -> Any:
    """A value's shape as constants. A scalar's type has none."""
    known: dict[tuple, tuple[Any, Any]] = {}
    make = tl.tensor.__init__

    def init(self: Any, handle: Any, type: Any) -> None:
        numbers = tuple(type.shape.values) if type.is_block() else ()
        found = known.get(numbers)
        if found is None:
            make(self, handle, type)
            known[numbers] = self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = found

    return init


def _broadcast_if_different(broadcast: Any) -> Any:
    """Types of one shape share it, see above; two scalars have none; a scalar becomes a block of a type made before."""
    known: dict[tuple[int, str], Any] = {}

    def filled(self: Any, scalar: Any, block: Any) -> Any:
        dtype = scalar.type.scalar
        place = id(block.shape), dtype.name
        kind = known.get(place) or block.with_element_ty(dtype)  # which keeps the shape, and so its id
        if not dtype.is_ptr():
            known[place] = kind
        return self.tensor(self.builder.create_splat(kind, scalar.handle), kind)

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = lhs.type, rhs.type
        if left.is_block() and right.is_block():
            return (lhs, rhs) if left.shape is right.shape else broadcast(self, lhs, rhs)
        if left.is_block():
            return lhs, filled(self, rhs, left)
        if right.is_block():
            return filled(self, lhs, right), rhs
        return lhs, rhs

    return broadcast_impl_value


def _alike_as_they_are(convert: Any, tl: Any) -> Any:
    """Operands of one type need no conversion; a number takes the type of a value that can hold it."""
    types = {"int1", "int32", "int64", "fp32", "fp64"}  # halves become fp32 to be divided
    limits = {"int32": 2**31, "int64": 2**63, "fp32": 2**63}

    def binary_op_type_checking_impl(
        self: Any,
        lhs: Any,
        rhs: Any,
        allow_lhs_ptr: bool = False,
        allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True,
        div_or_mod: bool = False,
    ) -> Any:
        if type(lhs) is tl.tensor and arithmetic_check:
            dtype = lhs.type.scalar
            if type(rhs) is tl.tensor:
                if dtype.name == rhs.type.scalar.name and dtype.name in types:
                    return self.broadcast_impl_value(lhs, rhs)
            elif type(rhs) is int and -limits.get(dtype.name, 0) <= rhs < limits.get(dtype.name, 0):
                return self.broadcast_impl_value(lhs, self.scalar_constant(rhs, dtype=dtype))
            elif type(rhs) is float and dtype.name == "fp32":
                return self.broadcast_impl_value(lhs, self.scalar_constant(rhs, dtype=dtype))
        return convert(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    return binary_op_type_checking_impl


def _only_to_debug(check: Any) -> Any:
    def binary_op_sanitize_overflow_impl(self: Any, *operands: Any) -> None:
        if self.builder.options.debug:
            check(self, *operands)

    return binary_op_sanitize_overflow_impl
