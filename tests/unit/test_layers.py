"""The project's imports go one way."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers import ROOT

# From the bottom to the top: a module imports only from layers below its own, or from its own package.
LAYERS = [
    {"utils"},
    {"config", "logger"},
    {"models"},
    {"runtime"},
    {"data"},
    {"optimizer", "lr_scheduler"},
    {"engine"},
    {"detection"},
    {"main", "main_eval", "main_detect", "hubconf"},
    {"tools"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Top-level modules in tools/ import each other by name, as scripts do.
TOOLS = {path.stem for path in (ROOT / "tools").iterdir() if path.suffix == ".py" or path.is_dir()}
FILES = sorted(
    path.relative_to(ROOT)
    for name in LEVEL
    for path in [ROOT / f"{name}.py", *(ROOT / name).rglob("*.py")]
    if path.exists()
)


def imports(path: Path) -> set[str]:
    """The project's modules that a file imports anywhere, by dotted name."""
    package, found = list(path.parent.parts), set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            submodules = {f"{module}.{alias.name}" for alias in node.names}
            found |= {name for name in submodules if (ROOT / name.replace(".", "/")).with_suffix(".py").exists()} or {
                module
            }
    found = {
        f"tools.{name}" if name.partition(".")[0] in TOOLS and path.parts[0] == "tools" else name for name in found
    }
    return {name for name in found if name.partition(".")[0] in LEVEL}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_down(path):
    own = path.parts[0].removesuffix(".py")
    for name in imports(path):
        top = name.partition(".")[0]
        assert top == own or LEVEL[top] < LEVEL[own], f"{path} imports {name}"


def test_no_circles():
    graph = {}
    for path in FILES:
        name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        # A package's own modules do not wait for its __init__.
        graph[name] = {other for other in imports(path) if other != name and not name.startswith(f"{other}.")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


ENTRY_POINTS = [
    "main.py",
    "main_eval.py",
    "main_detect.py",
    *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tools").glob("*.py")),
]


@pytest.mark.parametrize(
    "script", [script for script in ENTRY_POINTS if "ArgumentParser(" in (ROOT / script).read_text()]
)
def test_help_does_not_wait_for_pytorch(script):
    """Importing it takes seconds."""
    command = [sys.executable, "-X", "importtime", script, "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "usage" in result.stdout, result.stderr
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert not imported & {"torch", "timm", "matplotlib", "sklearn", "onnx", "statsmodels"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [
        ("tools/plot_metrics.py run", "matplotlib", "figures"),
        ("tools/visualize.py strips best.pth", "matplotlib", "figures"),
        ("tools/ablate.py configs/ablations/digits", "statsmodels", "figures"),
        ("tools/benchmark.py --growth", "matplotlib", "figures"),
        ("tools/detection_demo.py", "pycocotools", "detection"),
        ("tools/export.py best.pth", "onnxscript", "export"),
        ("tools/robustness.py best.pth --output out", "skimage", "robustness"),
    ],
)
def test_missing_extra_is_named(command, missing, extra):
    script, *arguments = command.split()
    blocked = f"import runpy, sys; sys.modules[{missing!r}] = None; sys.argv = {[script, *arguments]}; "
    blocked += f"sys.path.insert(0, 'tools'); runpy.run_path({script!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", blocked], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.endswith(f"error: needs {missing}: pip install -r requirements/{extra}.txt\n")
