"""The keys of a configuration: their types, bounds and defaults, each with its reason.

Law of this package: frozen, strict and closed models; no file and no environment is read here (`config.py` does), no device is probed.
"""
