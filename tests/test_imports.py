"""The arrows between the packages, and what none of them may call, read from the source itself."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("mmfm_core", "client", "server")
FILES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
ONLY_FLWR = Path("mmfm_core/protocol.py")

# What may be loaded before a command or a relay knows that it needs to compute.
LIGHT = (
    "mmfm_core",
    "mmfm_core.config",
    "mmfm_core.protocol",
    "mmfm_core.command",
    "client.app",
    "client.service",
    "server.consortium.commands",
    "server.commands",
)


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports would hide an arrow"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def test_there_is_something_to_read() -> None:
    assert {path.parts[0] for path in FILES} == set(PACKAGES)
    assert len(FILES) > 50


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_one_way(path: Path) -> None:
    forbidden = {"mmfm_core": {"server", "client"}, "client": {"server"}, "server": set()}[path.parts[0]]
    names = list(imported(tree_of(path)))
    assert not [name for name in names if name.split(".")[0] in forbidden]
    if path.parts[0] == "mmfm_core" and path != ONLY_FLWR:
        assert not [name for name in names if name.split(".")[0] == "flwr"]
    assert not [name for name in names if name.split(".")[0] in PACKAGES and "commands" in name.split(".")]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_runs_what_it_reads(path: Path) -> None:
    tree = tree_of(path)
    assert not {"pickle", "marshal", "shelve", "dill", "joblib"} & {name.split(".")[0] for name in imported(tree)}
    safe_loaders = {"_Loader"} if path == Path("mmfm_core/config/text.py") else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            assert called(node) not in {"eval", "exec", "compile", "__import__", "torch.load", "yaml.unsafe_load"}
            assert called(node) not in {"yaml.load", "yaml.full_load", "pd.read_pickle", "os.system"}
            allowed = [word.value for word in node.keywords if word.arg == "allow_pickle"]
            assert all(isinstance(value, ast.Constant) and value.value is False for value in allowed)
        if isinstance(node, ast.ClassDef) and any("Loader" in ast.unparse(base) for base in node.bases):
            assert node.name in safe_loaders
            assert [ast.unparse(base) for base in node.bases] == ["yaml.SafeLoader"]


@pytest.mark.slow
def test_the_command_itself_waits_for_no_library_but_its_own() -> None:
    heavy = {"torch", "numpy", "pydantic", "pandas", "flwr", "cryptography", "grpc"}
    code = f"import sys, mmfm_core.command as c; c.build(); print({heavy} & set(sys.modules) or 'none')"
    ran = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=ROOT)
    assert (ran.stdout.strip(), ran.returncode) == ("none", 0), ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_draws_in_no_heavy_library(module: str) -> None:
    heavy = {"torch", "timm", "transformers", "torchmetrics", "matplotlib", "ray"}
    code = f"import sys, {module}; print({heavy} & set(sys.modules) or 'none')"
    ran = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=ROOT)
    assert (ran.stdout.strip(), ran.returncode) == ("none", 0), ran.stderr
