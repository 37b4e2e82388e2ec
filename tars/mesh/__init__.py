"""Drivers of the shared decisions: which deployments are wanted, who carries them out."""
