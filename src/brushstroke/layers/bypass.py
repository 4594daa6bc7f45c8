"""Which weights a module reads without calling the layer that holds them; an adapter there has no effect.

Nothing is run: the source of the class tells, also of kernels that this machine does not have.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType
from typing import Any, NamedTuple

from torch import nn

# What a program may ask of a weight without computing with its numbers.
_FACTS = {"device", "dim", "dtype", "is_cuda", "is_meta", "ndim", "numel", "requires_grad", "shape", "size"}
_FACTS |= {"element_size", "is_floating_point", "itemsize", "layout", "type"}
_QUESTIONS = {"getattr", "hasattr", "id", "isinstance", "type"}


class _Condition(NamedTuple):
    """A condition on the module's own settings, and the outcome that leads to a read."""

    test: CodeType
    outcome: bool


class _Read(NamedTuple):
    """One place where a method reads the weight of a module below."""

    path: str
    method: str
    conditions: tuple[_Condition, ...]


def weights_read_by(module: nn.Module) -> dict[str, str]:
    """Path below the module → the method in which the module's class reads that weight by itself.

    Everything that `forward` can reach in the class and its bases counts. A branch that the module's own
    settings switch off is passed over, but for `training`, which comes and goes.

    >>> weights_read_by(nn.MultiheadAttention(4, 2))
    {'out_proj': 'forward'}
    """
    return {read.path: read.method for read in _reads(type(module)) if _is_live(read, module)}


def _is_live(read: _Read, module: nn.Module) -> bool:
    for condition in read.conditions:
        try:
            outcome = bool(eval(condition.test, {"__builtins__": {}}, {"self": module}))
        except Exception:  # it depends on more than the module's settings
            continue
        if outcome is not condition.outcome:
            return False
    return True


@cache
def _reads(cls: type[nn.Module]) -> tuple[_Read, ...]:
    reads: list[_Read] = []
    waiting, seen = ["forward"], set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for function in _definitions(cls, name):
            reader = _Reader(name)
            for node in _body(function):
                reader.visit(node)
            reads += reader.reads
            waiting += reader.names
    return tuple(reads)


def _definitions(cls: type, name: str) -> Iterator[Callable[..., Any]]:
    """What runs by this name: the nearest definition, and those of the bases that it goes on to."""
    for base in cls.__mro__:
        if base is nn.Module:
            return
        found = vars(base).get(name)
        found = found.fget if isinstance(found, property) else found
        function = inspect.unwrap(found) if callable(found) else None
        if inspect.isfunction(function):
            yield function
            if "super" not in function.__code__.co_names:
                return


def _body(function: Callable[..., Any]) -> list[ast.stmt]:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, SyntaxError, TypeError):  # there is no source
        return []


class _Reader(ast.NodeVisitor):
    """Collects what one method reads: weights of modules below, and the names of its own class."""

    def __init__(self, method: str) -> None:
        self.reads: list[_Read] = []
        self.names: list[str] = []
        self._method = method
        self._conditions: list[_Condition | None] = []
        self._locals: dict[str, list[str]] = {"self": []}

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        chain = self._chain(node.value)
        for target in node.targets:
            if isinstance(target, ast.Name) and chain:
                self._locals[target.id] = chain
            else:
                self.visit(target)

    def visit_If(self, node: ast.If) -> None:
        self._branch(node.test, node.body, node.orelse)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._branch(node.test, [node.body], [node.orelse])

    def visit_Call(self, node: ast.Call) -> None:
        if not (isinstance(node.func, ast.Name) and node.func.id in _QUESTIONS):
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        chain = self._chain(node)
        if not chain:
            self.generic_visit(node)
            return
        self.names.append(chain[0])
        if "weight" not in chain[1:] or not isinstance(node.ctx, ast.Load):
            return
        end = chain.index("weight", 1)
        if not _FACTS & set(chain[end + 1 : end + 2]):
            conditions = tuple(condition for condition in self._conditions if condition)
            self.reads.append(_Read(".".join(chain[:end]), self._method, conditions))

    def _branch(self, test: ast.expr, then: list[Any], otherwise: list[Any]) -> None:
        self.visit(test)
        code = _own_settings(test)
        for outcome, nodes in ((True, then), (False, otherwise)):
            self._conditions.append(code and _Condition(code, outcome))
            for node in nodes:
                self.visit(node)
            self._conditions.pop()

    def _chain(self, node: ast.expr) -> list[str] | None:
        """The names in `self.a.b[0].c`, without `self`; None for what begins elsewhere."""
        if isinstance(node, ast.Name):
            return self._locals.get(node.id)
        if isinstance(node, ast.Attribute):
            name = node.attr
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            name = str(node.slice.value)
        else:
            return None
        before = self._chain(node.value)
        return None if before is None else [*before, name]


def _own_settings(test: ast.expr) -> CodeType | None:
    """A condition that can be judged on a module by itself: no call, and nothing that training switches."""
    for node in ast.walk(test):
        if isinstance(node, ast.Call | ast.Await | ast.NamedExpr):
            return None
        if isinstance(node, ast.Attribute) and node.attr == "training":
            return None
    return compile(ast.Expression(test), "<condition>", "eval")
