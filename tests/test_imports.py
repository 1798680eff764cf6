"""Imports point one way, without circles, and files stay short: a reader can follow a question through few of them."""

import ast
import io
import tokenize
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "kvzip").rglob("*.py"))
MAX_CODE_LINES = 300  # docstrings, comments and blank lines are free

# What a part may import beside itself and the version.
ALLOWED = {
    "attention": set(),
    "kvcache": {"attention"},
    "scoring": {"attention"},
    "head_scores": set(),
    "data": set(),
    "model": {"attention", "kvcache", "scoring", "head_scores"},
    "evaluation": {"attention", "kvcache", "scoring", "head_scores", "model", "data"},
    "integrations": {"attention", "kvcache", "scoring", "model"},
}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imported(path, *, when_loaded=False):
    """Names of our own modules that `path` imports; with `when_loaded`, only those that loading it imports."""
    module, package = module_of(path), path.name == "__init__.py"
    found = set()

    def visit(node):
        if when_loaded and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if when_loaded and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node = ast.Module(node.orelse, [])
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: len(module.split(".")) - node.level + package]
                base = ".".join([*above, *([node.module] if node.module else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found.update(name if name in MODULES else base for name in names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return {name for name in found if name.split(".")[0] == "kvzip"}


def code_lines(source):
    """Numbers of the lines that hold code."""
    texts = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    documented = [node for node in ast.walk(ast.parse(source)) if isinstance(node, texts) and ast.get_docstring(node)]
    docstrings = {line for node in documented for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    beside = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {line for token in tokens if token.type not in beside for line in range(token.start[0], token.end[0] + 1)}
    return lines - docstrings


def part_of(module):
    return [*module.split("."), ""][1]


def test_there_is_something_to_check():
    assert {part_of(module) for module in MODULES} >= {*ALLOWED, "version"}
    assert "kvzip.attention.combine" in imported(ROOT / "kvzip/attention/fused.py")
    assert "kvzip.kvcache.serialization" in imported(ROOT / "kvzip/kvcache/cache.py")
    assert "kvzip.kvcache.serialization" not in imported(ROOT / "kvzip/kvcache/cache.py", when_loaded=True)


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_one_way(part):
    """Inside functions and for type checkers too."""
    for module, path in MODULES.items():
        if part_of(module) == part:
            fine = {part, "version", "registry", "devices", *ALLOWED[part]}
            against = {name for name in imported(path) if part_of(name) not in fine}
            assert not against, f"{module} imports {against}"


def test_no_circle_when_modules_are_loaded():
    """A package counts as what its `__init__` imports; a module in it does not depend on the package itself."""
    graph = {}
    for module, path in MODULES.items():
        needs = {name for name in imported(path, when_loaded=True) if name in MODULES}
        graph[module] = needs - {module} - {name for name in needs if module.startswith(f"{name}.")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", MODULES)
def test_a_module_can_be_the_first_that_is_imported_from_its_package(module):
    """A module does not import names from its own package's `__init__`, which may be half loaded."""
    package = module.rpartition(".")[0]
    path = MODULES[module]
    if path.name != "__init__.py":
        tree = ast.parse(path.read_text())
        own = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == package]
        names = {alias.name for node in own for alias in node.names}
        assert all(f"{package}.{name}" in MODULES for name in names)


def test_only_code_counts():
    source = (
        '"""Says what.\n\nAnd why."""\n\n# why\nx = (1,\n     2)\n\ndef f():\n    """Say."""\n    return x  # here\n'
    )
    assert code_lines(source) == {6, 7, 9, 11}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_is_short_enough_to_read(path):
    assert len(code_lines(path.read_text())) <= MAX_CODE_LINES
    assert ast.get_docstring(ast.parse(path.read_text())), "it begins by saying what it is"
