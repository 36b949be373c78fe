"""The model of a Hugging Face directory as transformers computes it: what conversions are measured against."""

from pathlib import Path
from typing import Any

import torch

from bridge.errors import ConversionError
from bridge.models import family, hf_config


def load(directory: Path | str, *, attn_implementation: str = "eager") -> Any:
    """transformers' model in float32, in eval mode.

    A model_type that transformers does not know is loaded as the one whose class it shares (`Family.class_of`); without
    one, ConversionError: code that ships with a model is not run.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its list of tensors it has no place for: the conversion accounts for every one
    kind = hf_config.read(directory).get("model_type")
    families = map(family.by_name, family.known_names())
    class_of = next((facts.class_of for facts in families if facts.model_type == kind), None)
    if not class_of and kind not in CONFIG_MAPPING:
        raise ConversionError(f"{directory}: model_type {kind!r} is not in transformers, so no logits can be compared")
    config = {"config": _config(directory, class_of)} if class_of else {}
    options = {"dtype": torch.float32, "attn_implementation": attn_implementation}
    return AutoModelForCausalLM.from_pretrained(directory, **options, **config).eval()


def _config(directory: Path | str, model_type: str) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type].from_dict({**hf_config.read(directory), "model_type": model_type})
