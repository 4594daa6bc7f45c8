"""Finds modules that use their submodules in ways that leave an adapter without effect or without gradients.

It reads the source of the class and runs no code, so it also covers kernels that this machine lacks.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import CodeType
from typing import Any, NamedTuple

from torch import nn

# Attributes of a weight that code may read without using its numbers.
_FACTS = {"device", "dim", "dtype", "is_cuda", "is_meta", "ndim", "numel", "requires_grad", "shape", "size"}
_FACTS |= {"element_size", "is_floating_point", "itemsize", "layout", "type"}
_CASTS = {"to", "type_as"}  # x.to(self.linear.weight) uses only the dtype and device
_QUESTIONS = {"getattr", "hasattr", "id", "isinstance", "type"}
_NO_GRADIENTS = re.compile(r"(.*\.)?(no_grad|inference_mode|set_grad_enabled\(False\))(\(\))?")
_GRADIENTS = re.compile(r"(.*\.)?(enable_grad|set_grad_enabled\(True\))(\(\))?")


class _Condition(NamedTuple):
    """A condition on the module's settings and optional inputs, and the outcome that leads to a use."""

    test: CodeType
    outcome: bool
    optional: tuple[str, ...]


class _Use(NamedTuple):
    """One place where a method reads the weight of a submodule, or calls it."""

    path: str
    method: str
    conditions: tuple[_Condition, ...]
    calls: bool
    gradients: bool


def weights_read_by(module: nn.Module) -> dict[str, str]:
    """Path of a submodule → the method in which the module's class reads its weight directly.

    Covers all code of the class and its bases that `forward` can reach. Branches that the module's settings
    switch off are ignored, but not those that depend on `training`, which can change. Branches that run only
    with an optional input of `forward`, and otherwise call the submodule, are also ignored, unless that input
    is a cache.

    >>> weights_read_by(nn.MultiheadAttention(4, 2))
    {'out_proj': 'forward'}
    """
    return {use.path: use.method for use in _live_uses(module) if not use.calls}


def run_without_gradients_by(module: nn.Module) -> dict[str, str]:
    """Path of a submodule → the method in which the module's class runs it, always under `torch.no_grad`.

    The path is empty if the module's whole forward has no gradients. A submodule that another method of the
    class runs with gradients, as reversible layers do in their backward pass, is not included.
    """
    uses = [use for use in _live_uses(module) if use.calls]
    calls = {use.path: use.method for use in uses if not use.gradients}
    if not calls:
        return calls
    if any(use.gradients and use.method == "forward" for use in uses):
        calls.pop("", None)
    cls = type(module)
    methods = frozenset(name for base in cls.__mro__[: cls.__mro__.index(nn.Module)] for name in vars(base))
    reached = {use.path for use in _live_uses(module, methods) if use.calls and use.gradients}
    return {path: method for path, method in calls.items() if path not in reached}


def _live_uses(module: nn.Module, methods: frozenset[str] = frozenset({"forward"})) -> list[_Use]:
    uses = _uses(type(module), methods)
    calls = [use for use in uses if use.calls]
    return [use for use in uses if _is_live(use, module, [call for call in calls if call.path == use.path])]


def _is_live(use: _Use, module: nn.Module, calls: Sequence[_Use]) -> bool:
    for condition in use.conditions:
        instead = condition._replace(outcome=not condition.outcome)
        optional = condition.optional if any(instead in call.conditions for call in calls) else ()
        try:
            known = dict.fromkeys(optional, None) | {"self": module}
            outcome = bool(eval(condition.test, {"__builtins__": {}}, known))
        except Exception:  # it depends on more than the module's settings
            continue
        if outcome is not condition.outcome:
            return False
    return True


@cache
def _uses(cls: type[nn.Module], methods: frozenset[str]) -> tuple[_Use, ...]:
    """The uses in these methods, and in all methods of the class that they can reach."""
    uses: list[_Use] = []
    waiting, seen = list(methods), set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for function in _definitions(cls, name):
            reader = _Reader(name, _optional(function) if name == "forward" else ())
            reader.visit_all(_body(function))
            uses += reader.uses
            waiting += reader.names
    return tuple(uses)


def _definitions(cls: type, name: str) -> Iterator[Callable[..., Any]]:
    """The functions that run for this name: the first definition, and those that it calls by super."""
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


def _optional(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of inputs whose default is None, except caches."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.default is None and not re.search("cache|past", p.name))


def _body(function: Callable[..., Any]) -> list[ast.stmt]:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, SyntaxError, TypeError):  # there is no source
        return []


class _Reader(ast.NodeVisitor):
    """Collects the uses of submodules in one method, and the attributes of `self` that it reads."""

    def __init__(self, method: str, optional: tuple[str, ...]) -> None:
        self.uses: list[_Use] = []
        self.names: list[str] = []
        self._method = method
        self._optional = optional
        self._conditions: list[_Condition | None] = []
        self._gradients = True
        self._locals: dict[str, list[str]] = {"self": []}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        before = self._gradients
        self._switch(node.decorator_list)
        if before and not self._gradients and node.name == self._method == "forward":
            self._add("", calls=True)
        self.visit_all(node.body)
        self._gradients = before

    def visit_With(self, node: ast.With) -> None:
        self.visit_all(node.items)
        before = self._gradients
        self._switch([item.context_expr for item in node.items])
        self.visit_all(node.body)
        self._gradients = before

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        chain = self._chain(node.value)
        for target in node.targets:
            self.visit(target)
            if isinstance(target, ast.Name):
                self._locals.pop(target.id, None)
                if chain:
                    self._locals[target.id] = chain

    def visit_If(self, node: ast.If) -> None:
        self._branch(node.test, node.body, node.orelse)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._branch(node.test, [node.body], [node.orelse])

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in _QUESTIONS:
            return
        if chain := self._chain(node.func):
            self._add(".".join(chain), calls=True)
        if isinstance(node.func, ast.Attribute) and node.func.attr in _CASTS:
            self.visit(node.func)
        else:
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
            self._add(".".join(chain[:end]))

    def _add(self, path: str, *, calls: bool = False) -> None:
        conditions = tuple(condition for condition in self._conditions if condition)
        self.uses.append(_Use(path, self._method, conditions, calls, self._gradients))

    def _switch(self, contexts: Sequence[ast.expr]) -> None:
        for name in map(ast.unparse, contexts):
            if _NO_GRADIENTS.fullmatch(name) or _GRADIENTS.fullmatch(name):
                self._gradients = _GRADIENTS.fullmatch(name) is not None

    def visit_all(self, nodes: Sequence[ast.AST]) -> None:
        for place, node in enumerate(nodes):
            if isinstance(node, ast.If) and isinstance(node.body[-1], ast.Return):
                self._branch(node.test, node.body, [*node.orelse, *nodes[place + 1 :]])
                return
            self.visit(node)

    def _branch(self, test: ast.expr, then: list[Any], otherwise: list[Any]) -> None:
        self.visit(test)
        code = _own_settings(test)
        for outcome, nodes in ((True, then), (False, otherwise)):
            self._conditions.append(code and _Condition(code, outcome, self._optional))
            self.visit_all(nodes)
            self._conditions.pop()

    def _chain(self, node: ast.expr) -> list[str] | None:
        """The names in `self.a.b[0].c`, without `self`; None if the expression does not start at `self`."""
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
    """The code of a condition that depends only on a module's settings; None with calls or `training`."""
    for node in ast.walk(test):
        if isinstance(node, ast.Call | ast.Await | ast.NamedExpr):
            return None
        if isinstance(node, ast.Attribute) and node.attr == "training":
            return None
    return compile(ast.Expression(test), "<condition>", "eval")
