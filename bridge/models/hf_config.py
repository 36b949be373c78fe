"""A Hugging Face config.json and the `model` section of a run, each from the other, with every field accounted for."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from bridge.config.architecture import NOT_ARCHITECTURE
from bridge.errors import ConversionError
from bridge.models.family import Family, by_name, complete, known_names, mcore_defaults, name_of_hf_config
from bridge.models.hf_fields import Part
from bridge.weights import quantized
from bridge.weights.hf_files import INDEX, open_hf

# Fields that cannot change the logits of a decoder: bookkeeping, tokens, generation, what forward() returns.
IRRELEVANT_NAMES = """
_attn_implementation _attn_implementation_autoset _commit_hash _model_name_or_path _name_or_path architectures
attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label is_decoder
keys_to_ignore_at_inference label2id length_penalty max_length max_new_tokens min_length model_type n_ctx
no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_attentions output_hidden_states
output_router_logits output_scores pad_token_id prefix pretraining_tp problem_type remove_invalid_values
repetition_penalty return_dict return_dict_in_generate sep_token_id summary_activation summary_first_dropout
summary_proj_to_labels summary_type summary_use_proj suppress_tokens task_specific_params temperature
tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p unk_token_id
unsloth_fixed unsloth_version use_bfloat16 use_cache
"""
IRRELEVANT = frozenset(IRRELEVANT_NAMES.split())
# Fields every config may have, with the only value that changes nothing.
NEUTRAL: dict[str, Any] = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_encoder_decoder": False,
    "pruned_heads": {},
}
QUANTIZATION = "quantization_config"  # how the files store the weights: no architecture, and no part of an export


def read(directory: Path | str) -> dict[str, Any]:
    """The content of DIRECTORY/config.json as it is, but for parts it counts that the files beside it do not have.

    Raises ConversionError when it is missing or not a JSON object.
    """
    path = Path(directory) / "config.json"
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{path}: not found; a Hugging Face model directory has one") from None
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: cannot be read: {error}") from error
    if not isinstance(hf, dict):
        raise ConversionError(f"{path}: holds {type(hf).__name__}, not an object")
    stored = next(
        (facts.stored for facts in map(by_name, known_names()) if facts.model_type == hf.get("model_type")), None
    )
    return dict(stored(hf, _tensor_names(path.parent))) if stored else hf


def _tensor_names(directory: Path) -> Collection[str]:
    """The tensors of a directory, empty when it has none or they cannot be read, which is for others to report."""
    index, single = directory / INDEX, directory / "model.safetensors"
    try:
        if index.is_file():
            return list(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        return open_hf(directory).tensors if single.is_file() else ()
    except (OSError, ValueError, LookupError, TypeError, ConversionError):
        return ()


def to_mcore(hf: Mapping[str, Any], *, family: str | None = None) -> dict[str, Any]:
    """The complete `model` section for a Hugging Face config, in hub form or that of transformers 5.

    `family` is found by model_type unless given (a dotted module for a family outside this package). Raises
    ConversionError naming the first field that may change the logits and is not understood, or whose value is not.
    """
    name = family or name_of_hf_config(hf)
    facts = by_name(name)
    _account_for(hf, facts)
    filled = {**facts.hf_defaults, **hf}
    model: dict[str, Any] = {"family": name, **facts.constants}
    for part in facts.parts:
        model |= part.read(filled)
    return model


def _account_for(hf: Mapping[str, Any], facts: Family) -> None:
    understood = {name for part in facts.parts for name in part.hf_names} | IRRELEVANT
    for name, value in hf.items():
        if name == QUANTIZATION:
            quantized.check_config(value)
        elif name in NEUTRAL:
            if value not in (NEUTRAL[name], None):
                raise ConversionError(f"config.json: {name}: {value!r} is not supported")
        elif name not in understood:
            raise ConversionError(
                f"config.json: {name}: {value!r} is not a field of a {facts.model_type} model that is understood here; "
                "remove it if it has no effect"
            )
    names = hf.get("architectures") or [facts.architecture]
    if len(names) != 1 or names[0] not in (facts.architecture, *facts.aliases):
        raise ConversionError(f"config.json: architectures: {names!r} is not supported; only {facts.architecture} is")
    missing = [name for part in facts.parts for name in part.hf_names if name in REQUIRED and name not in hf]
    if missing:
        raise ConversionError(f"config.json: {missing[0]}: missing")


# Sizes no config leaves to a default on purpose: a file without them is not a model's config.json.
REQUIRED = frozenset(
    {
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "n_embd",
        "n_layer",
        "n_head",
    }
)


def to_hf(model: Mapping[str, Any], *, dtype: str, source: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of config.json for a `model` section; `dtype` is the weights' (float32, bfloat16, float16).

    With the `source` config the model came from, its fields stay as they are wherever they still mean the same.
    Raises ConversionError naming the first model key this family's Hugging Face class cannot express.
    """
    facts = by_name(model["family"])
    full = complete(model)
    _account_for_model(model, full, facts)
    if source is None:
        fields: dict[str, Any] = {}
        for part in facts.parts:
            fields |= part.write(full)
        # Token ids belong to the tokenizer and its generation_config; the class defaults (1, 2) would be guesses.
        tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        head = {"architectures": [facts.architecture], "model_type": facts.model_type, "torch_dtype": dtype}
        return head | fields | tokens | {"use_cache": True}
    before = complete(to_mcore(source, family=model["family"]))
    result = {name: value for name, value in source.items() if name != QUANTIZATION}
    for part in facts.parts:
        if part.write(before) != part.write(full):
            result = _rewritten(result, part, full)
    key = "torch_dtype" if "torch_dtype" in source and "dtype" not in source else "dtype"
    return result | {key: dtype}


def _rewritten(hf: dict[str, Any], part: Part, full: Mapping[str, Any]) -> dict[str, Any]:
    """`hf` with this part's fields as the model has them now. All its names go first: some are other ways to say it."""
    return {name: value for name, value in hf.items() if name not in part.hf_names} | part.write(full)


def _account_for_model(model: Mapping[str, Any], full: Mapping[str, Any], facts: Family) -> None:
    for name, wanted in facts.constants.items():
        if full[name] != wanted and name not in NOT_ARCHITECTURE:
            raise ConversionError(f"model.{name}: {full[name]!r}, but every {facts.architecture} has {wanted!r}")
    understood = {key for part in facts.parts for key in part.model_keys} | facts.constants.keys() | NOT_ARCHITECTURE
    defaults = mcore_defaults()
    for name, value in model.items():
        if name not in understood and value != defaults.get(name):
            raise ConversionError(
                f"model.{name}: {value!r} cannot be expressed in the config of a {facts.architecture}"
            )
