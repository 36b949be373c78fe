"""A Hugging Face config.json and the `model` section of a run, each from the other, with every field accounted for."""

import json
import math
import sys
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from bridge.config.architecture import NOT_ARCHITECTURE
from bridge.config.complete import complete, defaults
from bridge.errors import ConversionError, shown
from bridge.models.family import Family, by_name, known_names, name_of_hf_config
from bridge.models.hf import reads as hf_reads
from bridge.models.hf import sizes as hf_sizes
from bridge.models.hf.fields import Part
from bridge.weights import quantization
from bridge.weights.hf_headers import tensor_names

# Fields that transformers reads and that cannot change the logits of a decoder: bookkeeping, tokens, what forward()
# returns, heads of other tasks.
IRRELEVANT_NAMES = """
_attn_implementation _commit_hash _name_or_path architectures attn_implementation auto_map bos_token_id
chunk_size_feed_forward dtype eos_token_id id2label label2id max_length model_type num_labels output_attentions
output_hidden_states output_router_logits output_scores pad_token_id pretraining_tp problem_type return_dict
sep_token_id summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj torch_dtype
transformers_version use_cache
"""
IRRELEVANT = frozenset(IRRELEVANT_NAMES.split())
# Fields that transformers never reads for these families, and vLLM does: name -> the values that do nothing there.
READ_BY_VLLM: dict[str, tuple[Any, ...]] = {
    "bias": (False, None),
    "compression_config": (None,),
    "dual_chunk_attention_config": (None,),
    "interleaved_sliding_window": (None,),
    "is_causal": (True,),
    "logit_scale": (1.0,),
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
    try:
        return tensor_names(directory)
    except ConversionError:
        return ()


def to_mcore(hf: Mapping[str, Any], *, family: str | None = None) -> dict[str, Any]:
    """The complete `model` section for a Hugging Face config, in hub form or that of transformers 5.

    `family` is found by model_type unless given (a dotted module for a family outside this package). Raises
    ConversionError naming all fields that may change the logits and are not understood, or the first whose value is
    not.
    """
    name = family or name_of_hf_config(hf)
    facts = by_name(name)
    _account_for(hf, facts)
    filled = {**facts.hf_defaults, **hf}
    model: dict[str, Any] = {"family": name, **facts.constants}
    for part in facts.parts:
        model |= _read(part, filled)
    return model


def _read(part: Part, hf: Mapping[str, Any]) -> dict[str, Any]:
    """What a part reads; a value of a kind that it does not reckon with, such as text for a number, is one line."""
    given = {name: hf[name] for name in part.hf_names if name in hf}
    try:
        keys = part.read(hf)
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise ConversionError(f"config.json: {_shown(given)}: cannot be read ({error}); correct it") from error
    if any(isinstance(value, float) and not math.isfinite(value) for value in keys.values()):
        raise ConversionError(f"config.json: {_shown(given)}: not a finite number; correct it")
    return keys


def _shown(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {json.dumps(value)}" for name, value in fields.items())


def unread(hf: Mapping[str, Any], *, family: str | None = None) -> list[str]:
    """What to tell of the fields of a config that `to_mcore` accepts because nothing in transformers reads them."""
    facts = by_name(family or name_of_hf_config(hf))
    if not (unlisted := _unlisted(hf, facts)):
        return []
    reads = hf_reads.of_model_type(facts.class_of or facts.model_type)
    names = [name for name in unlisted if reads and name not in reads]
    lines = []
    if names:
        kept = f"transformers never reads {', '.join(names)}: without effect here, kept for an export"
        lines.append(f"config.json: {kept}")
        code = sorted({str(place).partition(".")[0] + ".py" for place in _own_code(hf)})
        if code:
            lines.append(f"config.json: auto_map: {', '.join(code)}, never run here, may read them")
    others = [name for name in names if name in READ_BY_VLLM and hf[name] not in READ_BY_VLLM[name]]
    if others:
        lines.append(f"config.json: vLLM reads {', '.join(others)}: its logits may differ from those of transformers")
    return lines


def tell_unread(hf: Mapping[str, Any], *, family: str | None = None) -> None:
    """Print `unread` on the main process, each line once; to stderr, as stdout may be a YAML file."""
    from bridge import parallel  # which imports megatron-core

    for line in unread(hf, family=family) if parallel.is_main() else ():
        _tell(line)


@cache
def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _own_code(hf: Mapping[str, Any]) -> list[Any]:
    """What `auto_map` names for models, as module.Class; configuration and tokenizer compute no logits."""
    auto_map = hf.get("auto_map")
    places = auto_map.items() if isinstance(auto_map, dict) else ()
    return [place for name, place in places if name.startswith("AutoModel")]


def _unlisted(hf: Mapping[str, Any], facts: Family) -> list[str]:
    """The fields for which neither this family nor IRRELEVANT has a word."""
    listed = {name for part in facts.parts for name in part.hf_names} | IRRELEVANT | {QUANTIZATION}
    return [name for name in hf if name not in listed]


def _account_for(hf: Mapping[str, Any], facts: Family) -> None:
    if QUANTIZATION in hf:
        quantization.check_config(hf[QUANTIZATION])
    if unlisted := _unlisted(hf, facts):
        _check_no_effect({name: hf[name] for name in unlisted}, facts)
    names = hf.get("architectures") or [facts.architecture]
    if len(names) != 1 or names[0] not in (facts.architecture, *facts.aliases):
        raise ConversionError(
            f"config.json: architectures: {shown(names)} is not supported; only {facts.architecture} is"
        )
    missing = [name for part in facts.parts for name in part.hf_names if name in REQUIRED and name not in hf]
    if missing:
        raise ConversionError(f"config.json: {missing[0]}: missing")
    hf_sizes.check(hf, [name for part in facts.parts for name in part.hf_names])


def _check_no_effect(fields: Mapping[str, Any], facts: Family) -> None:
    """Raise ConversionError naming those of `fields` that transformers reads and that are not as good as absent."""
    reads = hf_reads.of_model_type(facts.class_of or facts.model_type)
    if reads:
        wrong = [name for name, value in fields.items() if reads.has_effect(name, value)]
    else:
        base = hf_reads.of_every_model()
        wrong = [name for name, value in fields.items() if not (base and base.as_if_absent(name, value))]
    if not wrong:
        return
    why = f"transformers reads for a {facts.model_type}" if reads else f"{facts.architecture}'s own code may read"
    given = {name: fields[name] for name in wrong}
    raise ConversionError(
        f"config.json: {_shown(given)}: {why} and that is not understood here; remove what has no effect"
    )


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
            raise ConversionError(
                f"model.{name}: {shown(full[name])}, but every {facts.architecture} has {shown(wanted)}"
            )
    understood = {key for part in facts.parts for key in part.model_keys} | facts.constants.keys() | NOT_ARCHITECTURE
    known = defaults()
    for name, value in model.items():
        if name not in understood and value != known.get(name):
            raise ConversionError(
                f"model.{name}: {shown(value)} cannot be expressed in the config of a {facts.architecture}"
            )
