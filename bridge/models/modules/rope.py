"""Rotary position embeddings with every scaling that transformers knows, from a Hugging Face config's parameters.

The formulas are those of transformers' ROPE_INIT_FUNCTIONS (modeling_rope_utils.py, 5.23), so that angles agree to
rounding: linear (Chen et al. 2023), dynamic NTK, YaRN (Peng et al. 2023), Llama 3, LongRoPE (Ding et al. 2024).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from bridge.config.routing import ROPE_KEYS
from bridge.errors import ConfigError, did_you_mean, shown

# Length the model was trained at before its context was extended; max_sequence_length if absent, as in transformers.
TRAINED = "original_max_position_embeddings"


class Rope(NamedTuple):
    """`inv_freq`: radians per position, float32 [dim / 2]; `attention_factor`: what cos and sin are multiplied by."""

    inv_freq: Tensor
    attention_factor: float


class Request(NamedTuple):
    """What one formula needs besides its own parameters. `dim`: rotated channels; lengths count tokens."""

    base: float
    dim: int
    seq_len: int
    max_sequence_length: int


def inverse_frequencies(
    rope_parameters: Mapping[str, Any] | None,
    *,
    rotary_base: float,
    dim: int,
    seq_len: int,
    max_sequence_length: int,
) -> Rope:
    """Rotation speeds of `dim` channels for a sequence of `seq_len` tokens, and the factor on cos and sin.

    `rope_parameters` holds `rope_type` and that type's parameters, as transformers' field of this name without
    rope_theta; None is plain RoPE. `max_sequence_length` is transformers' max_position_embeddings.
    Raises ConfigError for an unknown type, an unknown parameter or a missing one.
    """
    parameters = {name: value for name, value in (rope_parameters or {}).items() if value is not None}
    scaling = _scaling(parameters)
    if TRAINED in _names(parameters.get("rope_type", "default")):
        parameters.setdefault(TRAINED, max_sequence_length)
    request = Request(float(rotary_base), dim, seq_len, max_sequence_length)
    return scaling.formula({name: value for name, value in parameters.items() if name != "rope_type"}, request)


def attention_factor(rope_parameters: Mapping[str, Any] | None, *, max_sequence_length: int) -> float:
    """What cos and sin are multiplied by; no type lets it depend on the other arguments of `inverse_frequencies`."""
    rope = inverse_frequencies(
        rope_parameters,
        rotary_base=10000.0,
        dim=_any_dim(rope_parameters),
        seq_len=1,
        max_sequence_length=max_sequence_length,
    )
    return rope.attention_factor


def _any_dim(parameters: Mapping[str, Any] | None) -> int:
    """A dim the formula accepts: LongRoPE's lists of factors fix it."""
    return 2 * len((parameters or {}).get("short_factor") or [1.0, 1.0])


def _plain(base: float, dim: int) -> Tensor:
    return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.int64, device="cpu").float() / dim))


def _default(parameters: Mapping[str, Any], request: Request) -> Rope:
    return Rope(_plain(request.base, request.dim), 1.0)


def _linear(parameters: Mapping[str, Any], request: Request) -> Rope:
    return Rope(_plain(request.base, request.dim) / parameters["factor"], 1.0)


def _dynamic(parameters: Mapping[str, Any], request: Request) -> Rope:
    """The base grows once the sequence is longer than the trained length."""
    factor, trained, dim = parameters["factor"], request.max_sequence_length, request.dim
    length = max(request.seq_len, trained)
    base = request.base * ((factor * length / trained) - (factor - 1)) ** (dim / (dim - 2))
    return Rope(_plain(base, dim), 1.0)


def _llama3(parameters: Mapping[str, Any], request: Request) -> Rope:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    factor, low, high = parameters["factor"], parameters["low_freq_factor"], parameters["high_freq_factor"]
    trained = parameters[TRAINED]
    plain = _plain(request.base, request.dim)
    wavelength = 2 * math.pi / plain
    smooth = (trained / wavelength - low) / (high - low)
    blended = (1 - smooth) * plain / factor + smooth * plain
    stretched = torch.where(wavelength > trained / low, plain / factor, plain)
    between = (wavelength >= trained / high) & (wavelength <= trained / low)
    return Rope(torch.where(between, blended, stretched), 1.0)


def _yarn(parameters: Mapping[str, Any], request: Request) -> Rope:
    """A ramp over the channels between keeping a frequency and dividing it by `factor`."""
    trained = parameters[TRAINED]
    factor = parameters.get("factor") or request.max_sequence_length / trained
    given, mscale, mscale_all = (parameters.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is None and mscale and mscale_all:
        given = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all)
    elif given is None:
        given = _yarn_mscale(factor, 1.0)

    def channel(rotations: float) -> float:
        """The channel that turns `rotations` times over the trained length."""
        return request.dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(request.base))

    low = channel(parameters.get("beta_fast") or 32)
    high = channel(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, request.dim - 1)
    if low == high:
        high += 0.001  # as transformers: a step instead of a division by zero
    ramp = ((torch.arange(request.dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    plain = _plain(request.base, request.dim)
    return Rope(plain / factor * (1 - kept) + plain * kept, float(given))


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(parameters: Mapping[str, Any], request: Request) -> Rope:
    """One divisor per frequency: `short_factor` within the trained length, `long_factor` beyond it."""
    trained = parameters[TRAINED]
    factor = parameters.get("factor") or request.max_sequence_length / trained
    given = parameters.get("attention_factor")
    if given is None:
        given = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    divisors = parameters["long_factor" if request.seq_len > trained else "short_factor"]
    if len(divisors) != request.dim // 2:
        raise ConfigError(
            f"model.rope_parameters: long_factor and short_factor need {request.dim // 2} numbers each, "
            f"half of the {request.dim} rotated channels; one of them has {len(divisors)}"
        )
    exponents = torch.arange(0, request.dim, 2, dtype=torch.int64, device="cpu").float() / request.dim
    scale = torch.tensor(list(divisors), dtype=torch.float32, device="cpu")
    return Rope(1.0 / (scale * request.base**exponents), float(given))


class Scaling(NamedTuple):
    """One rope_type: its formula, and the parameters without which transformers has no value to take."""

    formula: Callable[[Mapping[str, Any], Request], Rope]
    required: frozenset[str] = frozenset()


SCALINGS = {
    "default": Scaling(_default),
    "linear": Scaling(_linear, frozenset({"factor"})),
    "dynamic": Scaling(_dynamic, frozenset({"factor"})),
    "llama3": Scaling(_llama3, frozenset({"factor", "low_freq_factor", "high_freq_factor"})),
    "yarn": Scaling(_yarn),
    "longrope": Scaling(_longrope, frozenset({"long_factor", "short_factor"})),
}


def _names(kind: str) -> set[str]:
    """Every parameter a rope_type may have."""
    return {name for names in ROPE_KEYS[kind] for name in names}


def _scaling(parameters: Mapping[str, Any]) -> Scaling:
    key = "model.rope_parameters"
    kind = parameters.get("rope_type", "default")
    if kind not in SCALINGS:
        raise ConfigError(
            f"{key}.rope_type: {shown(kind)} is not one of {', '.join(SCALINGS)}{did_you_mean(kind, SCALINGS)}"
        )
    scaling = SCALINGS[kind]
    known = _names(kind) | {"rope_type"}
    for name in parameters:
        if name not in known:
            raise ConfigError(f"{key}.{name}: rope_type {kind} has no such parameter{did_you_mean(name, known)}")
    for name in sorted(scaling.required - parameters.keys()):
        raise ConfigError(f"{key}.{name}: missing; rope_type {kind} needs it")
    return scaling


class ScaledRotaryEmbedding(RotaryEmbedding):
    """megatron-core's RotaryEmbedding with the frequencies of `rope_parameters`.

    Angles only: the attention factor goes elsewhere (`mcore_config.attention_factor_fields`). Frequencies are asked for
    at each sequence length, because dynamic and longrope depend on it; megatron-core caches the result.
    """

    def __init__(
        self,
        rope_parameters: Mapping[str, Any],
        *,
        kv_channels: int,
        rotary_percent: float,
        rotary_interleaved: bool,
        rotary_base: float,
        max_sequence_length: int,
        cp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__(
            kv_channels=kv_channels,
            rotary_percent=rotary_percent,
            rotary_interleaved=rotary_interleaved,
            rotary_base=rotary_base,
            use_cpu_initialization=True,
            cp_group=cp_group,
        )
        self.dim = 2 * self.inv_freq.numel()
        self.rope_parameters, self.rotary_base = dict(rope_parameters), rotary_base
        self.max_sequence_length = max_sequence_length

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Angles in radians, float32 [max_seq_len, dim / 2]."""
        rope = inverse_frequencies(
            self.rope_parameters,
            rotary_base=self.rotary_base,
            dim=self.dim,
            seq_len=max_seq_len + offset,
            max_sequence_length=self.max_sequence_length,
        )
        positions = torch.arange(max_seq_len, dtype=torch.float32, device=self.inv_freq.device) + offset
        return torch.outer(positions, rope.inv_freq.to(positions.device))
