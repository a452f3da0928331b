"""The modules of a checkout as syntax trees: who imports whom, the circles, what a module defines and names.

Nothing of the checkout is imported or run, so this works on layouts that no longer run. It knows no measure and no
rule: tools/structure.py measures, tests/test_house.py tests.

framefusion/export and framefusion/runtime are links to the top-level folders. Links are never followed here: a module
below export/ is called framefusion.export..., as imports call it. A copy with real folders in place of the links, and
without the top-level ones, gives the same modules.
"""

from __future__ import annotations

import ast
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

TOPS: Mapping[str, str] = MappingProxyType(
    {"framefusion": "framefusion", "export": "framefusion.export", "runtime": "framefusion.runtime"}
)
"""Top-level folder -> the package that its modules are imported from."""

BANNED_NAMES = frozenset(
    {
        *("told", "asked", "seen", "settled", "words", "made", "own", "wishes", "one"),
        *("Told", "Asked", "Seen", "Fed", "On", "Found", "Marked"),
    }
)
"""Identifiers of a private language, for which the field has terms."""

Graph = Mapping[str, set[str]]
"""Module -> the modules that it imports; every module is a key."""


@dataclass(frozen=True)
class Module:
    """A file of the three top-level folders, parsed once."""

    name: str  # as imports say it, a package without `.__init__`
    path: str  # from the root, with slashes
    lines: int  # as `wc -l` counts them: blank lines and comments too
    nodes: tuple[ast.AST, ...]  # of its syntax tree, each once

    @property
    def is_package(self) -> bool:
        """Whether it is the `__init__.py` of its folder."""
        return self.path.endswith("/__init__.py")

    @property
    def folder(self) -> str:
        """The package that its folder is."""
        return self.name if self.is_package else self.name.rpartition(".")[0]

    @property
    def top(self) -> str:
        """The top-level folder that it belongs to."""
        return next((top for top in ("export", "runtime") if within(self.name, TOPS[top])), "framefusion")

    @cached_property
    def constants(self) -> frozenset[str]:
        """Its string constants and parts of f-strings; no docstring, nor another string that stands by itself."""
        alone = {id(node.value) for node in self.nodes if isinstance(node, ast.Expr)}
        nodes = (node for node in self.nodes if isinstance(node, ast.Constant) and id(node) not in alone)
        return frozenset(node.value for node in nodes if isinstance(node.value, str))

    @cached_property
    def code(self) -> str:
        """Everything that its code names, a line each: identifiers, imported modules, string constants."""
        imported = {node.module or "" for node in self.nodes if isinstance(node, ast.ImportFrom)}
        return "\n".join({name for _, name in identifiers(self)} | imported | self.constants)


def read_modules(root: Path, tops: Mapping[str, str] = TOPS) -> tuple[Module, ...]:
    """Every module below some top-level folders of a checkout, sorted by name. Links are not followed.

    Args:
        root: of the checkout.
        tops: folder -> the package that its modules are imported from.
    """
    modules = []
    for top, package in tops.items():
        for folder, _, files in os.walk(root / top):
            for path in (Path(folder, file) for file in files if file.endswith(".py")):
                parts = path.relative_to(root / top).with_suffix("").parts
                name = ".".join((package, *parts)).removesuffix(".__init__")
                text = path.read_text(encoding="utf-8")
                nodes = tuple(ast.walk(ast.parse(text)))
                modules.append(Module(name, path.relative_to(root).as_posix(), text.count("\n"), nodes))
    return tuple(sorted(modules, key=lambda module: module.name))


def within(name: str, package: str) -> bool:
    """Whether a module is a package or lies in it."""
    return name == package or name.startswith(f"{package}.")


# --- Imports --------------------------------------------------------------------------------------------------------


def import_graph(root: Path) -> dict[str, set[str]]:
    """The graph of a checkout; see `graph_of`."""
    return graph_of(read_modules(root))


def graph_of(modules: Iterable[Module]) -> dict[str, set[str]]:
    """Module -> the modules among these that it imports: at the top, for types only, or inside a function.

    `from package import name` is an arrow to `package.name` where that is a module, else to `package`. The `__init__`
    of a package on the way is no target, nor is a module that only a string names.
    """
    by_name = {module.name: module for module in modules}
    graph = {}
    for module in by_name.values():
        graph[module.name] = {name for name in _imported(module, by_name) if name in by_name} - {module.name}
    return graph


def _imported(module: Module, known: Mapping[str, Module]) -> Iterator[str]:
    for node in module.nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = _package(module, node)
            for alias in node.names:
                inner = f"{package}.{alias.name}"
                yield inner if inner in known else package


def _package(module: Module, node: ast.ImportFrom) -> str:
    """What stands behind `from`: one dot is the module's folder, each further dot the folder around it."""
    if not node.level:
        return node.module or ""
    around = module.folder.split(".")
    return ".".join([*around[: len(around) - node.level + 1], *filter(None, [node.module])])


def circles(graph: Graph) -> list[list[str]]:
    """The groups of modules that all reach one another (strongly connected, more than one module), sorted."""
    reached = {name: _reached(graph, name) for name in graph}
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def _reached(graph: Graph, start: str) -> set[str]:
    """What can be reached from a module along one arrow or more."""
    reached: set[str] = set()
    ahead = [start]
    while ahead:
        further = graph[ahead.pop()] - reached
        reached |= further
        ahead += further
    return reached


def arrows(graph: Graph, source: str, target: str) -> list[str]:
    """The imports from modules of one package to modules of another, as "module -> module", sorted."""
    sources = sorted(name for name in graph if within(name, source))
    return [f"{name} -> {other}" for name in sources for other in sorted(graph[name]) if within(other, target)]


def merged(graph: Graph, node_of: Callable[[str], str]) -> dict[str, set[str]]:
    """The graph with modules drawn together that `node_of` gives one name; arrows inside a node are left out."""
    nodes: dict[str, set[str]] = defaultdict(set)
    for name, targets in graph.items():
        node = node_of(name)
        nodes[node] |= {node_of(target) for target in targets} - {node}
    return dict(nodes)


# --- What a module holds --------------------------------------------------------------------------------------------


def function_lines(module: Module) -> list[tuple[str, int]]:
    """Each function and method as "path:line name", and its lines from `def` to its end, docstring included."""
    functions = [node for node in module.nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [
        (f"{module.path}:{node.lineno} {node.name}", (node.end_lineno or 0) - node.lineno + 1) for node in functions
    ]


def assignments(module: Module) -> list[ast.Assign]:
    """Its assignments with `=`: no annotated and no augmented ones."""
    return [node for node in module.nodes if isinstance(node, ast.Assign)]


def is_tuple_assignment(node: ast.Assign) -> bool:
    """Whether it reads `a, b = x, y`: a tuple on both sides. A swap is one, unpacking the result of a call is none."""
    return isinstance(node.value, ast.Tuple) and any(isinstance(target, ast.Tuple) for target in node.targets)


def is_swap(node: ast.Assign) -> bool:
    """Whether it puts the values of some places into the same places in another order: `a, b = b, a`."""
    if not is_tuple_assignment(node):
        return False
    values = sorted(map(ast.unparse, node.value.elts))  # type: ignore[attr-defined]  # a tuple
    return all(
        isinstance(target, ast.Tuple) and sorted(map(ast.unparse, target.elts)) == values for target in node.targets
    )


def identifiers(module: Module) -> Iterator[tuple[int, str]]:
    """Line and identifier: of names, attributes, parameters, keywords, definitions, imports and captures."""
    for node in module.nodes:
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
                yield node.lineno, name
            case ast.alias(name=name, asname=alias):
                yield from ((node.lineno, part) for part in (alias or name).split("."))


def banned_identifiers(module: Module) -> list[tuple[int, str]]:
    """Line and identifier wherever a name of BANNED_NAMES stands. `_told` is `told`; `told_by` is another name."""
    return [(line, name) for line, name in identifiers(module) if name.lstrip("_") in BANNED_NAMES]


def type_hints(module: Module) -> tuple[list[str], list[str]]:
    """Annotations of all parameters but `self` and `cls`, and of all returns; "" where there is none."""
    parameters: list[ast.expr | None] = []
    returns: list[ast.expr | None] = []
    for node in module.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            parameters += [name.annotation for name in names if name and name.arg not in ("self", "cls")]
            returns.append(node.returns)
    return _texts(parameters), _texts(returns)


def _texts(nodes: Iterable[ast.expr | None]) -> list[str]:
    return [ast.unparse(node) if node else "" for node in nodes]
