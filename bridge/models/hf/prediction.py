"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, 2.2) in Hugging Face configs: modules behind the last layer,
each a projection of one more token's embedding and the hidden states, and a layer of the model."""

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from bridge.models.hf.fields import Part, Values

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
            f"config.json: {MTP_NAMES[0]}: {count}, but the files have no such layers ({first}*); continuing without "
            "them",
            stacklevel=3,
        )
    return {**hf, MTP_NAMES[0]: 0}
