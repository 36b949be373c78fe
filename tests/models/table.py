"""`python -m tests.models.table` measures every family against transformers and writes docs/models.md."""

import tempfile
from pathlib import Path

from bridge import platform
from bridge.models import family
from tests import families, hf_models

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
INTRO = """# Models

Written by `python -m tests.models.table`; do not edit.

The last column is the largest difference between megatron-core's logits and transformers', in float32, over the small
random models of `tests/families/`: how many there are, and the largest logit beside it for scale. Every parameter of
these models is drawn away from its default, so that a swapped norm or a dropped bias shows.
`tests/models/test_families.py` requires 1e-4. A size in the second column is an option, `model=NAME`.

| Family (`model.family`) | Sizes | Hugging Face class | What it is | Logit difference |
|---|---|---|---|---|
"""


def main() -> None:
    platform.prepare()
    PAGE.write_text(INTRO + "\n".join(row(name) for name in family.known_names()) + "\n", encoding="utf-8")


def row(name: str) -> str:
    """One family's line of the table, measured here and now."""
    facts, sizes = family.by_name(name), ", ".join(f"`{size}`" for size in families.get(name, "SIZES"))
    return f"| `{name}` | {sizes} | `{facts.architecture}` | {special(name)} | {parity(name)} |"


def special(name: str) -> str:
    """The first sentence of the family file's docstring, without its name."""
    import importlib

    text = " ".join(str(importlib.import_module(f"bridge.models.families.{name}").__doc__).split("\n\n")[0].split())
    return text.rstrip(".").replace("|", "/")


def parity(name: str) -> str:
    """Number of variants, largest difference of logits, largest logit."""
    from tests.models.test_families import mcore_logits, prompts

    differences, largest = [], 0.0
    for variant in hf_models.variants(name):
        with tempfile.TemporaryDirectory() as folder:
            directory = hf_models.save(variant, Path(folder), tokenizer=False)
            ids = prompts(variant)
            theirs = hf_models.logits(directory, ids)
            differences.append(float((mcore_logits(directory, ids) - theirs).abs().max()))
            largest = max(largest, float(theirs.abs().max()))
    return f"{max(differences):.1e} of {largest:.0f} ({len(differences)} models)"


if __name__ == "__main__":
    main()
