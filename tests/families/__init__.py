"""What each family's tests need to know of it: one file per family, named like the one in bridge/models/families.

    MODEL_TYPE Hugging Face's model_type, where it is not the file's name, or whose class transformers has instead
    BASE       fields for all variants that hf_models.BASE does not have, or has under another name
    VARIANTS   tiny configs, `name: fields that differ from BASE`; the first is the plain model, the first key its name
    CHANGES    another value for each field of the config class that tests/models/test_families.py does not know
    SHAPES     those fields of CHANGES that change which tensors there are, or their shapes
    ON         fields switched on while CHANGES are tried, because others matter only with them
    UNREAD     fields that transformers writes into a config.json but does not read from a complete one
    REFUSED    fields and values that are refused by name
    HUB        a config's form on the hub, where it is not as tests/models/test_families.py has it: a function
    SIZES      parameters of each shipped conf/model/NAME.yaml, from model cards and published index files

All but VARIANTS may be left out. Nothing is registered: a new file is found.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any


def names() -> list[str]:
    """Families with a file here."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def facts(family: str) -> ModuleType:
    """The file of one family."""
    return importlib.import_module(f"{__name__}.{family}")


def get(family: str, what: str) -> Any:
    """CHANGES, SHAPES, ... of one family; empty when it has none."""
    return getattr(facts(family), what, {})
