"""The shape of the code: no file imports in a circle, and no function is longer than a screen."""

import ast
import pathlib

import pytest
from running import ROOT

PACKAGES = ("fixmatch", "parity", "tools")
LONGEST = 50  # lines, from def to the last


def files(package: str) -> list[pathlib.Path]:
    return sorted((ROOT / package).rglob("*.py"))


def modules(root: pathlib.Path, packages) -> dict[str, pathlib.Path]:
    """Dotted name -> file; a package's own name stands for its __init__.py."""
    found = {}
    for file in (f for package in packages for f in sorted((root / package).rglob("*.py"))):
        parts = file.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(file: pathlib.Path, known) -> set[str]:
    """The known modules that a file imports anywhere, in functions too.

    `from package import name` is an import of package.name where that is a module, and else of the package itself. That
    every import also runs the __init__.py of the packages above is left out: so does each file of a package.
    """
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & known) | ({node.module} if inside - known else set())
    return found & known


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, first and last the same, or none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module):], module]
        if module in done:
            return []
        found = next(filter(None, (walk(other, [*path, module]) for other in sorted(graph[module]))), [])
        done.add(module)
        return found

    return next(filter(None, (walk(module, []) for module in sorted(graph))), [])


def graph_of(root: pathlib.Path, packages) -> dict[str, set[str]]:
    known = modules(root, packages)
    return {name: imports(file, known.keys()) for name, file in known.items()}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_imports_in_a_circle(package):
    """Seen from this package over all that it can reach: a circle anywhere behind it counts."""
    graph = graph_of(ROOT, ("fixmatch", "parity", "tools"))
    reached, ahead = set(), [name for name in graph if name.split(".")[0] == package]
    while ahead:
        name = ahead.pop()
        if name not in reached:
            reached.add(name)
            ahead += graph[name]
    found = circle({name: graph[name] for name in reached})
    assert not found, " -> ".join(found)


def test_a_circle_is_found_wherever_the_import_stands(tmp_path):
    (tmp_path / "p/q").mkdir(parents=True)
    for name, content in {"p/__init__": "", "p/a": "from p import b", "p/b": "def f():\n    import p.q.c",
                          "p/q/__init__": "from p.q.c import x", "p/q/c": "x = 1"}.items():
        (tmp_path / f"{name}.py").write_text(content)
    assert circle(graph_of(tmp_path, ["p"])) == []
    (tmp_path / "p/q/c.py").write_text("class C:\n    def f(self):\n        from p.a import b")
    assert circle(graph_of(tmp_path, ["p"])) == ["p.a", "p.b", "p.q.c", "p.a"]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_function_is_longer_than_a_screen(package):
    long = [f"{file.relative_to(ROOT)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
            for file in files(package) for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= LONGEST]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_function_is_called_underscore(package):
    nameless = [f"{file.relative_to(ROOT)}:{node.lineno}" for file in files(package)
                for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
                if isinstance(node, ast.FunctionDef) and node.name == "_"]
    assert not nameless, "\n".join(nameless)


def test_the_files_that_are_to_be_short_are():
    lines = {file: len(file.read_text(encoding="utf-8").splitlines())
             for package in PACKAGES for file in files(package)}
    assert lines[ROOT / "fixmatch/step.py"] < 150
    assert lines[ROOT / "fixmatch/cli.py"] < 170
    assert sorted(lines.values())[len(lines) // 2] < 110
