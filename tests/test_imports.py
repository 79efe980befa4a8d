"""Who may import whom: each module from lower lines only, and within a line only where it is said here."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lit_adv"

# Each package or module has its line; within a line, what it may import beside itself.
LINES: dict[str, tuple[int, set[str]]] = {
    "threat": (0, set()),
    "losses": (0, set()),
    "draws": (0, set()),
    "defense": (0, {"draws"}),
    "answers": (0, set()),
    "chunk": (0, set()),
    "blocks": (0, set()),
    "variables": (0, set()),
    "fingerprint": (0, set()),
    "inputs": (0, set()),
    "kept": (0, set()),
    "estimator": (1, set()),
    "parts": (1, {"search", "state"}),
    "probing": (1, {"estimator", "search", "state"}),
    "differentiable": (0, {"chunk", "draws"}),
    "gradients": (1, {"search", "state"}),
    "hyperplanes": (1, {"gradients", "search", "state"}),
    "starts": (1, set()),
    "oracle": (1, set()),
    "result": (0, set()),
    "state": (1, {"oracle"}),
    "search": (1, {"oracle", "state"}),
    "attack": (1, {"oracle", "search", "state"}),
    "verify": (1, set()),
    "fast": (1, set()),
    "suppression": (1, set()),
    "response": (1, set()),
    "features": (1, set()),
    "protocol": (1, {"oracle", "attack"}),
    "fitted": (2, set()),
    "pools": (2, set()),
    "estimators": (2, {"fitted"}),
    "attacks": (2, {"estimators", "fitted"}),
    "models": (2, set()),
    "detector": (2, {"models"}),
    "layerwise": (2, {"detector"}),
    "detectors": (2, {"detector", "layerwise", "models"}),
    "defenses": (2, {"detector", "models"}),
    "remote": (2, set()),
    "objectives": (3, set()),
    "metrics": (3, set()),
    "datamodules": (3, set()),
    "tasks": (4, {"archive"}),
    "archive": (4, set()),
    "pairs": (4, {"archive"}),
    "attack_set": (4, {"archive", "look"}),
    "suggestions": (4, set()),
    "look": (4, set()),
    "tables": (4, {"suggestions"}),
    "pictures": (4, set()),
    "audit": (4, {"tables"}),
    "checks": (4, {"audit", "outcome", "tables"}),
    "control": (4, {"look"}),
    "probes": (4, {"audit", "checks", "control", "look", "outcome", "trial"}),
    "outcome": (4, {"tables", "pictures"}),
    "report": (4, {"outcome", "audit", "checks", "tables", "pictures", "suggestions"}),
    "trial": (4, {"archive", "look", "outcome", "report", "pictures", "audit", "tables"}),
    "callbacks": (4, {"trial", "archive", "audit", "outcome", "probes", "report", "pictures"}),
    "evaluation": (4, {"trial", "probes", "report", "outcome"}),
    "cli": (5, set()),
    "serve": (5, set()),
    "experiments": (6, set()),
}
LIGHTNING = {"pytorch_lightning", "lightning", "torchmetrics"}
COLLECTIONS = ("attacks", "defenses", "detectors")  # whose files know nothing of one another

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def own_line(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path, typing_only: bool = True) -> set[str]:
    """Dotted names that a file imports, with ``from a import b`` as ``a.b``; perhaps without those for typing."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    if not typing_only:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                skipped.update(inner for part in node.body for inner in ast.walk(part))
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} imports relatively: say lit_adv"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(names: set[str]) -> set[tuple[str, ...]]:
    return {tuple(name.split(".")[1:]) for name in names if name.split(".")[0] == "lit_adv"}


def test_files_are_found() -> None:
    assert len(FILES) > 30
    assert {"attacks.pgd", "threat", "cli"} <= {name_of(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_downwards(path: Path) -> None:
    own = own_line(path)
    assert own in LINES, f"lit_adv/{own} has no line yet: give it one in {Path(__file__).name}"
    line, beside = LINES[own]
    for name in ours(imported(path)):
        if not name or name[0] == own:
            continue
        if name[0] not in LINES:  # a name of the package itself
            assert line >= 4, f"{name_of(path)} imports lit_adv.{name[0]} from the package"
            continue
        theirs = LINES[name[0]][0]
        assert theirs < line or (theirs == line and name[0] in beside), (
            f"{name_of(path)} (line {line}) imports lit_adv.{'.'.join(name)} (line {theirs})"
        )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_lightning_is_known_from_line_3_up(path: Path) -> None:
    line = LINES[own_line(path)][0]
    roots = {name.split(".")[0] for name in imported(path)}
    if line <= 2:
        assert not roots & LIGHTNING
    if line <= 1:
        assert roots <= {"torch", "lit_adv", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_lower_lines_touch_no_files(path: Path) -> None:
    if LINES[own_line(path)][0] <= 1:
        assert not {name.split(".")[0] for name in imported(path)} & {"os", "pathlib", "io", "shutil", "tempfile"}
        calls = {node.func.id for node in ast.walk(ast.parse(path.read_text())) if _names_a_call(node)}  # type: ignore[attr-defined]
        assert "open" not in calls


def _names_a_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


@pytest.mark.parametrize("collection", COLLECTIONS)
def test_members_of_a_collection_know_nothing_of_one_another(collection: str) -> None:
    members = [path for path in (PACKAGE / collection).glob("*.py") if path.name != "__init__.py"]
    for path in members:
        others = {name for name in ours(imported(path)) if name and name[0] in COLLECTIONS}
        assert not others, f"{name_of(path)} imports {others}: take it as an argument"


def test_no_module_imports_in_a_circle() -> None:
    """Within a line too; type-checking imports do not count."""
    modules = {name_of(path): path for path in FILES if path.name != "__init__.py"}
    edges: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = {".".join(name) for name in ours(imported(path, typing_only=False))}
        edges[module] = {
            other for other in modules if other != module and any(f"{name}.".startswith(f"{other}.") for name in names)
        }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail, module])
        if module not in done:
            for other in edges[module]:
                visit(other, (*trail, module))
            done.add(module)

    for module in modules:
        visit(module, ())


def test_importing_the_package_does_not_bring_lightning() -> None:
    names = {name.split(".")[0] for name in imported(PACKAGE / "__init__.py", typing_only=False)}
    assert not names & (LIGHTNING | {"torch"})
