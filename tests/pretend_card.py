"""Pretend NVIDIA cards: builds devices/pretend_nvml.c and says which environment makes a process see them through the real pynvml.

In a test: `environment = os.environ | pretend_nvml.environment("two-cards")` (the fixture stands in conftest.py), then start any
process with it, a whole `tars-node` too. Scenarios and the control file's lines are described at the top of the C file.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "devices" / "pretend_nvml.c"
LIBRARY = "libnvidia-ml.so.1"

RTX_3060 = "GPU-30600000-0000-4000-8000-000000000001"
GTX_1660S = "GPU-16600000-0000-4000-8000-000000000002"
RTX_4090 = "GPU-40900000-0000-4000-8000-000000000003"
GB10 = "GPU-10100000-0000-4000-8000-000000000004"


class PretendNvml:
    """The built library, as a current driver has it and as an old one has it."""

    def __init__(self, folder: Path):
        self.current = folder / "current"
        self.old = folder / "old"

    def environment(self, scenario, *, control=None, old_driver=False):
        """Variables under which a process loads the pretend library; `control` is the file that changes it while it runs."""
        folder = self.old if old_driver else self.current
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")]))
        variables = {"LD_LIBRARY_PATH": path, "TARS_PRETEND_NVML": scenario}
        if control is not None:
            variables["TARS_PRETEND_NVML_CONTROL"] = str(control)
        return variables


def build(folder: Path) -> PretendNvml:
    """Compile both libraries into `folder`; skips the test, with the reason, where that cannot be done."""
    if sys.platform != "linux":
        pytest.skip("the pretend NVML is a Linux library")
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("no C compiler here (cc, gcc or clang) to build the pretend NVML with")
    library = PretendNvml(folder)
    for target, options in ((library.current, []), (library.old, ["-DOLD_DRIVER"])):
        target.mkdir(parents=True)
        command = [compiler, "-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC", *options]
        # The real library's name inside, so that a process which loaded it by its path finds it by its name, as on WSL2.
        command += [f"-Wl,-soname,{LIBRARY}", "-o", str(target / LIBRARY), str(SOURCE)]
        built = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert built.returncode == 0, built.stderr
    return library
