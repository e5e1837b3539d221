"""The table of layers in docs/architecture.md against every import of the code."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROW = re.compile(r"^\| (\d) [^|]*\| ([^|]*) \| ([^|]*)\|", re.MULTILINE)
NAME = re.compile(r"`([a-z_0-9/.]+)`")


def table() -> dict[str, tuple[int, int]]:
    """Each module of the table with its layer and its place within the layer."""
    places: dict[str, tuple[int, int]] = {}
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    for layer, folder, modules in ROW.findall(text):
        base = NAME.findall(folder)[0].rstrip("/").replace("/", ".")
        for place, name in enumerate(NAME.findall(modules)):
            places[f"{base}.{name}"] = (int(layer), place)
    return places


def source_files() -> dict[str, Path]:
    """Each module of the code with its file, packages' own files left out."""
    files = {}
    for path in [*ROOT.glob("casallm/**/*.py"), *ROOT.glob("launch/**/*.py")]:
        if path.name not in ("__init__.py", "__main__.py"):
            files[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    return files


def imports_of(path: Path) -> set[str]:
    """Every module of ours that the file imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & source_files().keys()


def test_every_module_has_a_place_in_the_table_and_every_place_a_module():
    assert sorted(table()) == sorted(source_files())


def test_no_module_imports_upwards():
    places = table()

    upward = [
        f"{module} imports {imported}"
        for module, path in source_files().items()
        for imported in imports_of(path)
        if places[imported] >= places[module]
    ]

    assert upward == []


def test_casallm_never_imports_launch():
    for path in ROOT.glob("casallm/**/*.py"):
        assert "launch" not in {name.split(".")[0] for name in imports_of(path)}
