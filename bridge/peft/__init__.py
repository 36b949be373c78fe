"""Adapters: one module each, named by `peft.method`, whose dataclass `Config` lists the keys of the section."""
