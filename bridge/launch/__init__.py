"""Command lines: compose with Hydra, check, claim the run directory, start workers. Only here is Hydra imported."""
