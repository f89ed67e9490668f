"""The rules of the house: who imports whom, and what `import bigsae` loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "bigsae"

# Rooms from the ground up; a module may import from its own room and those before it. `seeds` and `config` are leaves.
FLOORS = (
    ("seeds", "config", "progress"),
    ("checks", "configfile", "kernels", "parallel"),
    ("sae", "lm"),
    ("data", "hub"),
    ("evaluation",),
    ("training", "planning"),
    ("caching", "pretokenizing", "reporting"),
    ("commands", "train", "plan", "evaluate", "report", "cache_activations", "export", "pretokenize"),
)
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
# sae.save() writes the run folder's own format, which is hub's to write; opened when called, not when loaded.
DOORS = {("sae/base.py", "bigsae.hub.formats")}


def imported(path: Path) -> set[str]:
    """The bigsae modules that a file imports, also inside functions."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("bigsae"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules.update(names if node.module == "bigsae" else [node.module])
        elif isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names if alias.name.startswith("bigsae"))
    return modules


def modules() -> list[Path]:
    return [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downward(path):
    relative = path.relative_to(ROOT)
    room = relative.parts[0].removesuffix(".py")
    for module in imported(path):
        if (str(relative), module) in DOORS:
            continue
        other = module.split(".")[1]
        assert FLOOR[other] <= FLOOR[room], f"{relative} imports {module}"
        assert other == room or FLOOR[other] < FLOOR[room] or room in FLOORS[-1], (
            f"{relative} imports its neighbour {module}"
        )


def test_config_is_a_leaf_of_the_standard_library():
    for node in ast.walk(ast.parse((ROOT / "config.py").read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            assert (name or "").split(".")[0] in sys.stdlib_module_names


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in sys.modules after `statement` in a fresh interpreter."""
    code = f"{statement}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout.split()
    )


def test_import_bigsae_loads_no_heavy_package():
    assert not loaded_by("import bigsae") & {
        "torch",
        "nnsight",
        "wandb",
        "triton",
        "transformers",
        "datasets",
    }


def test_kernels_and_the_sae_step_need_torch_alone():
    """So that they, and their benchmark, run where nothing else is installed."""
    loaded = loaded_by("import bigsae.training.fit, bigsae.sae.build, bigsae.kernels.encode")
    assert not loaded & {"nnsight", "wandb", "transformers", "datasets", "accelerate", "tyro", "rich"}


def test_to_read_and_publish_saes_nothing_of_language_models_is_loaded():
    """A push of a running training is a process of its own: 4 s of a core to begin with, and 10 with transformers."""
    loaded = loaded_by("import bigsae.hub.load, bigsae.hub.export")
    assert not loaded & {"nnsight", "transformers", "datasets", "accelerate", "sympy"}


def test_one_file_imports_nnsight_and_none_wandb():
    for package, allowed in (("nnsight", {"lm/activations.py"}), ("wandb", set())):
        users = set()
        for path in modules():
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                if any(name.split(".")[0] == package for name in names):
                    users.add(str(path.relative_to(ROOT)))
        assert users == allowed
