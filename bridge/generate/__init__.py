"""Continues a prompt: `python -m bridge.generate path=DIR prompt=TEXT`. Importing this package costs no torch."""
