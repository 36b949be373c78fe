"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, 2.2) in Hugging Face configs and files: modules behind the
last layer, each a projection of one more token's embedding and the hidden states, and a layer of the model."""

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from bridge.models.hf import decoder_rows
from bridge.models.hf.decoder_rows import HF, MCORE, Model, Rows
from bridge.models.hf.fields import Part, Values
from bridge.weights.table import Ignore, Row, Table

# The name in files of the hub, and the one of transformers' config class, whose default counts when both are absent.
MTP_NAMES = ("num_nextn_predict_layers", "num_mtp_layers")


def _stated(hf: Values) -> int | None:
    given = (hf.get(name) for name in MTP_NAMES)
    return next((int(count) for count in given if count is not None), None)


def multi_token_prediction() -> Part:
    """The number of modules behind the last layer that each predict one more token (DeepSeek-V3, arXiv 2412.19437)."""

    def read(hf: Values) -> dict[str, Any]:
        count = _stated(hf)
        return {"mtp_num_layers": count} if count else {}

    return Part(MTP_NAMES, ("mtp_num_layers",), read, lambda model: {MTP_NAMES[0]: model["mtp_num_layers"] or 0})


def without_missing_predictions(hf: Values, names: Collection[str]) -> Mapping[str, Any]:
    """`hf` without prediction modules if the files (tensors `names`) hold none, and a warning that it is so.

    transformers reads and saves such models without them, but its config.json goes on to count them.
    """
    count, first = _stated(hf), f"model.layers.{hf.get('num_hidden_layers')}."
    if count == 0 or not names or any(name.startswith(first) for name in names):
        return hf
    if count is not None:  # not transformers' default
        warnings.warn(
            f"config.json: {MTP_NAMES[0]}: {count}, but the files have no such layers ({first}*); going on without",
            stacklevel=3,
        )
    return {**hf, MTP_NAMES[0]: 0}


def predicting_table(model: Model, layer: Callable[[Model], Rows]) -> Table:
    """The table of a model with prediction modules, where it has any; `layer` gives the rows of a model's layers."""
    return Table(
        [*decoder_rows.embedding(model), *prediction_rows(model, layer), *layer(model), *decoder_rows.final(model)]
    )


def prediction_rows(model: Model, layer: Callable[[Model], Rows]) -> Rows:
    """The modules, whose files name them as layers behind the last; `layer` gives the rows of a model's layers.

    They come before those in a table, because a name with a number is found by the first row that fits it.
    """
    layer_rows = layer({**model, "moe_layer_freq": 1})  # with experts, where the model has any
    rows: Rows = []
    output = decoder_rows.EMBEDDING if model["share_embeddings_and_output_weights"] else "lm_head.weight"
    for module in range(model["mtp_num_layers"] or 0):
        ours, theirs = f"mtp.layers.{module}.", f"model.layers.{model['num_layers'] + module}."
        pairs = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "final_layernorm": "shared_head.norm"}
        rows += [Row(f"{ours}{key}.weight", f"{theirs}{name}.weight") for key, name in pairs.items()]
        rows += [_moved(row, {MCORE: f"{ours}transformer_layer.", HF: theirs}) for row in layer_rows]
        for copy, original in (("embed_tokens", decoder_rows.EMBEDDING), ("shared_head.head", output)):
            reason = "multi-token prediction shares the embedding and the output layer of the model"
            rows.append(Ignore(f"{theirs}{copy}.weight", reason, same_as=original, always=True))
    return rows


def _moved(row: Row | Ignore, prefixes: Mapping[str, str]) -> Row | Ignore:
    """The row for another place: prefixes of its names replaced."""

    def name(old: str) -> str:
        prefix = next(prefix for prefix in prefixes if old.startswith(prefix))
        return prefixes[prefix] + old.removeprefix(prefix)

    if isinstance(row, Ignore):
        return replace(row, hf_name=name(row.hf_name))
    return Row(name(row.mcore_key), [name(one) for one in row.hf_names], row.op, keep_dtype=row.keep_dtype)
