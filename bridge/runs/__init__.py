"""The run directory: what its files are called, who holds it, how its run ended, and what its files tell. No torch."""
