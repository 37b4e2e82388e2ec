"""TARS: the GPUs of the PCs that you already own, as one inference service."""

__version__ = "0.1.0"
