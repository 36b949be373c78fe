"""Quantised Hugging Face files seen as what they stand for: tensors under their plain names, dequantised when read.

Two kinds are known, both exact products of a small number and the scale of its block:
    fp8    `X.weight` F8_E4M3 [rows, cols] and `X.weight_scale_inv` [ceil(rows / 128), ceil(cols / 128)]: each block of
           weight_block_size times its scale (DeepSeek-V3, arXiv:2412.19437, section 3.3)
    mxfp4  `X_blocks` U8 [..., out, in / 32, 16] and `X_scales` U8 [..., out, in / 32]: two E2M1 numbers to a byte, the
           low half first, 32 to a block, times 2^(scale - 127), E8M0 (OCP Microscaling Formats 1.0, section 5); read as
           [..., in, out], the layout in which GPT-OSS keeps its experts
Nothing is cast blindly: a number without its scale, or a scale without its configuration, is an error.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bridge.errors import ConversionError
from bridge.weights import names
from bridge.weights.hf_files import HfFiles, HfTensor, open_hf
from bridge.weights.quantization import MXFP4, check_config
from bridge.weights.spec import TensorSpec

SCALE, BLOCKS, SCALES = "_scale_inv", "_blocks", "_scales"
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # sign, two bits of exponent, one of mantissa
E8M0_BIAS, E8M0_NAN = 127, 255
ROWS = 2048  # of a matrix dequantised together: float32 needs four times the memory of fp8


class Scaled(NamedTuple):
    """The tensors of the files that make one: numbers and their scales."""

    numbers: str
    scales: str


@dataclass(frozen=True)
class Dequantized(HfFiles):
    """A directory's tensors by plain name; those in `scaled` are made of two and have dtype `dtype`."""

    raw: HfFiles
    scaled: Mapping[str, Scaled]
    dtype: torch.dtype
    block: tuple[int, int] | None = field(default=None)  # of fp8; None: mxfp4

    def read(self, name: str) -> Tensor:
        base, index = names.split_index(name)
        if base not in self.scaled:
            return super().read(name)
        numbers, scales = (self.raw.read(names.entry(part, *index)) for part in self.scaled[base])
        if self.block is None:
            return from_mxfp4(numbers, scales, dtype=self.dtype)
        return from_fp8(numbers, scales, block=self.block, dtype=self.dtype)


def open_source(directory: str | Path, *, dtype: torch.dtype | None = None) -> HfFiles:
    """The tensors of a Hugging Face directory, quantised or not; quantised ones are read as `dtype` (None: bfloat16).

    Raises ConversionError as `open_hf` does, and when numbers and scales do not pair or config.json does not tell how.
    """
    raw = open_hf(directory)
    config = _quantization(Path(directory))
    method = check_config(config)
    if method is None:
        _refuse_quantized(raw)
        return raw
    assert config is not None
    floats = (torch.float32, torch.bfloat16)
    if method == MXFP4:
        block = None
        scaled = _pairs(raw, numbers=BLOCKS, scales=SCALES, dtypes=(torch.uint8,), scale_dtypes=(torch.uint8,))
    else:
        rows, cols = config["weight_block_size"]
        block = (int(rows), int(cols))
        scaled = _pairs(raw, numbers="", scales=SCALE, dtypes=(torch.float8_e4m3fn,), scale_dtypes=floats)
    _refuse_quantized(raw, method=method, known={name for pair in scaled.values() for name in pair})
    dtype = dtype or torch.bfloat16
    return Dequantized(raw.directory, _plain(raw, scaled, dtype, block), raw, scaled, dtype, block)


def from_fp8(numbers: Tensor, scales: Tensor, *, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """`numbers` float8 [..., rows, cols] times `scales` [..., ceil(rows / block), ceil(cols / block)], in float32."""
    rows, cols = numbers.shape[-2:]
    values = torch.empty(numbers.shape, dtype=dtype)
    step = max(ROWS // block[0], 1) * block[0]
    for start in range(0, rows, step):
        here = slice(start, min(start + step, rows))
        some = scales[..., start // block[0] : -(-here.stop // block[0]), :].float()
        grid = some.repeat_interleave(block[0], -2)[..., : here.stop - start, :]
        values[..., here, :] = numbers[..., here, :].float() * grid.repeat_interleave(block[1], -1)[..., :cols]
    return values


def from_mxfp4(blocks: Tensor, scales: Tensor, *, dtype: torch.dtype) -> Tensor:
    """`blocks` uint8 [..., out, groups, 16] and `scales` uint8 [..., out, groups]: values [..., groups * 32, out]."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)])
    power = torch.exp2(scales.float() - E8M0_BIAS).masked_fill(scales == E8M0_NAN, torch.nan)[..., None]
    out, groups, half = blocks.shape[-3:]
    values = torch.empty((*blocks.shape[:-3], out, groups, half, 2), dtype=dtype)
    values[..., 0] = table[(blocks & 0xF).int()] * power
    values[..., 1] = table[(blocks >> 4).int()] * power
    return values.flatten(-3).transpose(-2, -1).contiguous()


def _quantization(directory: Path) -> Mapping[str, Any] | None:
    """`quantization_config` of config.json, wherever there is one; the rest is for others to read."""
    file = directory / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ConversionError(f"{file}: cannot be read: {error}") from error
    found: Mapping[str, Any] | None = config.get("quantization_config") if isinstance(config, dict) else None
    return found


def _pairs(
    raw: HfFiles,
    *,
    numbers: str,
    scales: str,
    dtypes: tuple[torch.dtype, ...],
    scale_dtypes: tuple[torch.dtype, ...],
) -> dict[str, Scaled]:
    """Plain name -> its numbers and scales, found by the scales' names. ConversionError when one lacks the other."""
    pairs = {}
    for scale, stored in raw.tensors.items():
        if not scale.endswith(scales):
            continue
        name = scale.removesuffix(scales)
        pair = Scaled(name + numbers, scale)
        if pair.numbers not in raw.tensors:
            raise ConversionError(f"{stored.file}: {scale} is the scale of {pair.numbers}, which is missing")
        found = raw.spec(pair.numbers).dtype
        if found not in dtypes or stored.spec.dtype not in scale_dtypes:
            raise ConversionError(
                f"{raw.file(pair.numbers)}: {pair.numbers} is {found} with a scale of {stored.spec.dtype}, "
                "which is not the quantization that config.json names"
            )
        pairs[name] = pair
    return pairs


def _plain(
    raw: HfFiles, scaled: Mapping[str, Scaled], dtype: torch.dtype, block: tuple[int, int] | None
) -> dict[str, HfTensor]:
    """The tensors as they will be read, in the order of the files. ConversionError when shapes do not fit."""
    plain_name = {pair.numbers: name for name, pair in scaled.items()}
    dropped = {pair.scales for pair in scaled.values()}
    tensors = {}
    for stored_name, stored in raw.tensors.items():
        if stored_name in dropped:
            continue
        name = plain_name.get(stored_name)
        if name is None:
            tensors[stored_name] = stored
            continue
        shape, scales = stored.spec.shape, raw.spec(scaled[name].scales).shape
        wanted = shape[:-1] if block is None else _grid(shape, block)
        if scales != wanted or (block is None and (len(shape) < 3 or shape[-1] != 16)):
            raise ConversionError(
                f"{raw.file(scaled[name].scales)}: {scaled[name].scales} has shape {list(scales)}, but "
                f"{stored_name} of {list(shape)} needs {list(wanted)}"
            )
        spec = TensorSpec(dtype, (*shape[:-3], shape[-2] * 32, shape[-3]) if block is None else shape)
        tensors[name] = HfTensor(spec, stored.file, stored.start)
    return tensors


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    return (*shape[:-2], *(-(-size // by) for size, by in zip(shape[-2:], block, strict=False)))


def _refuse_quantized(raw: HfFiles, *, method: str | None = None, known: Collection[str] = ()) -> None:
    """Raise ConversionError naming a tensor that is quantised, by dtype or name, and not among the `known`."""
    why = f"in no pair of numbers and scales of {method}" if method else "config.json has no quantization_config"
    for name, stored in raw.tensors.items():
        eight = stored.spec.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
        four = name.endswith((BLOCKS, SCALES)) and stored.spec.dtype == torch.uint8
        if name not in known and (eight or four or name.endswith(SCALE)):
            raise ConversionError(f"{stored.file}: {name} ({stored.spec.dtype}) looks quantised, but: {why}")
