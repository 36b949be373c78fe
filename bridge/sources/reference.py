"""The model of a Hugging Face directory as transformers computes it: what conversions are measured against."""

from pathlib import Path
from typing import Any

import torch

from bridge.errors import ConversionError, shown
from bridge.models import family
from bridge.models.hf import config as hf_config
from bridge.weights.hf_files import HfFiles


def load(directory: Path | str, *, attn_implementation: str = "eager", files: HfFiles | None = None) -> Any:
    """transformers' model in float32, in eval mode; with `files`, with those weights, as if it were not quantised.

    A model_type that transformers does not know is loaded as the one whose class it shares (`Family.class_of`); without
    one, ConversionError: code that ships with a model is not run.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its list of tensors it has no place for: the conversion accounts for every one
    kind = hf_config.read(directory).get("model_type")
    families = map(family.by_name, family.known_names())
    class_of = next((one.class_of for one in families if one.model_type == kind), None)
    if not class_of and kind not in CONFIG_MAPPING:
        raise ConversionError(
            f"{directory}: model_type {shown(kind)} is not in transformers, so no logits can be compared"
        )
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": attn_implementation}
    if class_of or files:
        options["config"] = _config(directory, str(class_of or kind))
    if files is None:
        return AutoModelForCausalLM.from_pretrained(directory, **options).eval()
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(options["config"])]
    state = {name: files.read(name) for name in files.tensors}
    return model_class.from_pretrained(None, state_dict=state, **options).eval()


def _config(directory: Path | str, model_type: str) -> Any:
    from transformers import CONFIG_MAPPING

    fields = {name: value for name, value in hf_config.read(directory).items() if name != "quantization_config"}
    return CONFIG_MAPPING[model_type].from_dict({**fields, "model_type": model_type})
