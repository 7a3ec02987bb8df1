"""Imports point downward only, and importing the package does next to nothing."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lycheedecode

ROOT = Path(lycheedecode.__file__).parent
LEVELS = [
    {"errors"},
    {"checks", "files", "scoped"},
    {"config"},
    {"plan"},
    {"ops", "plan_views", "prompts", "results"},
    {"roles"},
    {"attention", "fusion"},
    {"models"},
    {"engine"},
    {"policies"},
    {"identify", "integrations"},
    {"evaluate", "bench"},
    {"cli"},
    {"__main__", "demo"},
]
"""Modules and packages from the bottom up; each may import what lies on lower levels."""
UPWARD = {"engine/plans.py": "identify"}
"""`plan="auto"`: whoever makes an engine may ask for an identification in one word, so the engine must find it; the
import lies in the function that is asked."""
LEVEL_OF = {unit: level for level, units in enumerate(LEVELS) for unit in units}
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
OPTIONAL = {"datasets", "gguf", "lm_eval", "matplotlib", "triton", "vllm"}
HOMES = {
    "triton": ("ops/", "fusion/triton", "bench/read"),
    "vllm": "integrations/vllm",
    "lm_eval": "integrations/lm_eval",
}


def unit_of(path: Path) -> str:
    """The module or package right below the root that a file belongs to; `` for the root's own `__init__`."""
    first = path.parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imported_modules(path: Path) -> Iterator[tuple[str, int]]:
    """Full names of what a file imports anywhere in it, with line numbers."""
    package = ["lycheedecode", *path.parts[:-1]]
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield name, node.lineno
            yield from ((f"{name}.{alias.name}", node.lineno) for alias in node.names)


def imported_units(path: Path) -> Iterator[tuple[str, int]]:
    for name, line in imported_modules(path):
        parts = name.split(".")
        if parts[0] == "lycheedecode" and len(parts) > 1 and parts[1] in LEVEL_OF:
            yield parts[1], line


def test_every_module_has_a_level():
    units = {unit_of(path) for path in FILES} - {""}
    assert units <= set(LEVEL_OF), f"add to LEVELS: {sorted(units - set(LEVEL_OF))}"


@pytest.mark.parametrize("path", [path for path in FILES if unit_of(path)], ids=lambda path: path.as_posix())
def test_imports_point_downward(path):
    unit = unit_of(path)
    for other, line in imported_units(path):
        allowed = other == unit or LEVEL_OF[other] < LEVEL_OF[unit] or UPWARD.get(path.as_posix()) == other
        assert allowed, f"{path}:{line}: {unit} must not import {other}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_optional_packages_are_imported_where_they_are_used(path):
    """At the top of a file an extra would be needed by everybody."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    for node in tree.body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in names:
            package = name.split(".")[0]
            home = HOMES.get(package)
            at_home = home is not None and path.as_posix().startswith(home)
            assert package not in OPTIONAL or at_home, f"{path}:{node.lineno} imports {name}"


def test_importing_the_package_is_light():
    code = (
        "import sys, lycheedecode, lycheedecode.cli, lycheedecode.cli.inspect; "
        "print(*sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_generating_does_not_import_the_compiler():
    """Inductor takes more than a second to import, which the first answer on a CPU need not wait for."""
    check = "import sys, lycheedecode.cli.generate; print('torch._inductor.pattern_matcher' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_public_names_exist():
    for name in lycheedecode.__all__:
        assert getattr(lycheedecode, name) is not None
    assert set(lycheedecode.__all__) <= set(dir(lycheedecode))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lycheedecode.nothing


def test_what_one_needs_first_is_at_the_top():
    from lycheedecode.engine.sampling import Sampling
    from lycheedecode.identify import IdentifySettings, identify
    from lycheedecode.models.load import load_model

    assert lycheedecode.load_model is load_model
    assert lycheedecode.Sampling is Sampling
    assert lycheedecode.IdentifySettings is IdentifySettings
    assert inspect.signature(lycheedecode.identify) == inspect.signature(identify)


def test_identify_can_be_called_and_remains_a_package(monkeypatch):
    code = (
        "from lycheedecode import identify; import lycheedecode.identify.settings as settings; import lycheedecode; "
        "assert lycheedecode.identify is identify and callable(identify); "
        "assert identify.settings is settings and identify.identify.__name__ == 'identify'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    called = []
    monkeypatch.setattr("lycheedecode.identify.identify", lambda *a, **k: called.append((a, k)))
    lycheedecode.identify("model", "tokenizer", folder="f")
    assert called == [(("model", "tokenizer"), {"folder": "f"})]


def test_no_two_classes_of_one_name():
    """The CPU and CUDA twins of the plugin aside."""
    found: dict[str, list[str]] = {}
    for folder in (ROOT, ROOT.parents[1] / "experiments"):
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    found.setdefault(node.name, []).append(path.as_posix())
    twins = {"cpu.py", "cuda.py"}
    several = {
        name: paths
        for name, paths in found.items()
        if len(paths) > 1 and {Path(path).name for path in paths if "integrations/vllm/" in path} != twins
    }
    assert several == {}


def test_experiments_do_not_import_each_other_in_a_circle():
    """Anywhere in a file; `__main__` and packages, which gather what lies in them, aside."""
    folder = ROOT.parents[1] / "experiments"
    names = {path.stem: path for path in folder.glob("*.py") if not path.stem.startswith("__")}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "experiments":
                within = node.module.split(".")[1:2] or [alias.name for alias in node.names]
                graph[name] |= set(within) & set(names)
    assert graph["tune_step"] >= {"linear", "projections"}
    assert tuple(TopologicalSorter(graph).static_order())  # raises CycleError
