"""What config.json says of quantised files, and which of it is understood. No torch: this describes a model."""

from collections.abc import Mapping
from typing import Any

from bridge.errors import ConversionError, shown

FP8, MXFP4 = "fp8", "mxfp4"
# What a configuration may say: which modules were quantised is told by the tensors; None: any value.
KNOWN: dict[str, dict[str, tuple[Any, ...] | None]] = {
    FP8: {
        "quant_method": None,
        "weight_block_size": None,
        "activation_scheme": ("dynamic",),
        "fmt": ("e4m3", None),
        "scale_fmt": ("float", "ue8m0", None),
        "expert_dtype": ("fp8", None),
        "modules_to_not_convert": None,
        "modules_to_convert": None,
        "ignored_layers": None,
        "dequantize": None,
    },
    MXFP4: {"quant_method": None, "modules_to_not_convert": None, "dequantize": None},
}


def check_config(config: object) -> str | None:
    """The `quant_method` of a quantization_config that is understood, None without one. Else ConversionError."""
    if config is None:
        return None
    key = "config.json: quantization_config"
    method = config.get("quant_method") if isinstance(config, Mapping) else config
    if not isinstance(config, Mapping) or method not in KNOWN:
        raise ConversionError(
            f"{key}: quant_method {shown(method)} is not supported, only fp8 (block-scaled) and mxfp4 are; "
            "convert the unquantised model"
        )
    for name, value in config.items():
        allowed = KNOWN[method].get(name, ())
        if allowed is not None and value not in allowed:
            raise ConversionError(f"{key}.{name}: {shown(value)} of quant_method {method} is not supported")
    size = config.get("weight_block_size")
    if method == FP8 and not (isinstance(size, list | tuple) and len(size) == 2 and all(map(_positive, size))):
        raise ConversionError(
            f"{key}.weight_block_size: {shown(size)} is not two block sizes; other fp8 is not supported"
        )
    return str(method)


def _positive(value: object) -> bool:
    return isinstance(value, int) and value > 0
