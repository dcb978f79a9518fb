"""What decides the machine code of a kernel, in one number: while it stays, what was measured of the code holds.

A compiled kernel is a function of its text and that of the functions it calls, the constants that they name, the types,
constants, options and alignments of the launch, the Triton and the target. Triton's own cache of compiled kernels rests
on the same; but this number leaves out line numbers, comments and docstrings, and is the same under every Python and
Triton. Test helper, not a test module.
"""

import ast
import functools
import hashlib
import inspect
import textwrap
from types import ModuleType
from typing import Any

from triton.language import constexpr, dtype
from triton.runtime.jit import JITFunction

_NOT_CODE = ("ctx", "kind", "type_comment", "type_params")


def of_launch(
    kernel: JITFunction,
    types: tuple[str, ...],
    constants: dict[str, Any],
    options: dict[str, Any],
    aligned: tuple[int, ...],
) -> str:
    """16 hexadecimal digits for a launch of a kernel, on whatever target."""
    settings = [sorted((name, _value(name, value)) for name, value in named.items()) for named in (constants, options)]
    return _digest(of_kernel(kernel), types, *settings, aligned)


@functools.cache
def of_kernel(kernel: JITFunction) -> str:
    """The same for the text of a kernel, and of all that it calls and names outside Triton.

    Raises:
        TypeError: it names something of which this does not know what it means to the compiler.
    """
    if inspect.getclosurevars(kernel.fn).nonlocals:
        raise TypeError(f"{kernel.__name__} names variables of an enclosing function")
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn))).body
    assert isinstance(function, ast.FunctionDef)
    if ast.get_docstring(function, clean=False) is not None:
        del function.body[0]
    names = sorted({node.id for node in ast.walk(function) if isinstance(node, ast.Name)})
    scope = kernel.fn.__globals__
    named = [(name, _value(name, scope[name])) for name in names if name in scope and name != kernel.__name__]
    return _digest(_shape(function), named)


def _value(name: str, value: Any) -> str:
    """What a global name, a constant or an option means to the compiler."""
    if isinstance(value, JITFunction):
        return value.__name__ if _is_triton(value.fn.__module__) else of_kernel(value)
    if isinstance(value, constexpr):
        return f"constexpr {_value(name, value.value)}"
    if isinstance(value, ModuleType) and _is_triton(value.__name__):
        return value.__name__
    if value is None or isinstance(value, bool | int | float | str | dtype):
        return f"{type(value).__name__} {value}"
    raise TypeError(f"{name} is a {type(value).__name__}: say in {__file__} what that means to the compiler")


def _is_triton(module: str) -> bool:
    return module.partition(".")[0] == "triton"


def _shape(node: Any) -> Any:
    """A syntax tree without places, as plain lists; empty fields differ between Pythons and are left out."""
    if isinstance(node, ast.AST):
        fields = [(name, value) for name, value in ast.iter_fields(node) if name not in _NOT_CODE]
        return [type(node).__name__, *[(name, _shape(value)) for name, value in fields if value not in (None, [])]]
    return [_shape(each) for each in node] if isinstance(node, list) else repr(node)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
