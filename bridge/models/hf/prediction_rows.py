"""Rows of multi-token prediction: modules that files of Hugging Face name as layers behind the last."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from bridge.models.hf import decoder_rows
from bridge.models.hf.decoder_rows import HF, MCORE, Model, Rows
from bridge.weights.table import Ignore, Row, Table


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
