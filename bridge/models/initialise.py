"""Random weights that do not depend on the layout: the same seed gives the same model however it is divided.

megatron-core draws each tensor where it is, from generators that every rank has its own of. Here its initialisation
only notes, while the model is built, which function each parameter would be drawn by; `draw` then draws it from the
seed and the key it has in a checkpoint, which is the same in every layout.

A tensor is drawn in blocks of whole rows, each from a generator seeded for it, in float32, and a rank draws the blocks
that it holds rows of: never a tensor whole, unless it is as small as a block. What megatron-core sets to a constant
(biases, norms) it has set already. CPU and CUDA have different generators, so a seed gives other weights on the other.
"""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from bridge import platform
from bridge.platform import whole_weights
from bridge.platform.random_state import keep_random_state
from bridge.weights import shards
from bridge.weights.shards import Piece

# Numbers drawn at a time: 16 MiB. An 8B model has 2,000 blocks; each costs about 30 us of Python. Changing it changes
# every model that is larger.
BLOCK = 2**22
METHODS = ("init_method", "output_layer_init_method", "embedding_init_method")
NOTE = "drawn_by"

Method = Callable[..., Any]  # (tensor, generator=...) fills the tensor
_noting: ContextVar[bool] = ContextVar("noting", default=False)


class Noted:
    """An initialisation function that, inside of `noted`, leaves zeros and a note on the parameter instead of drawing.

    Elsewhere it draws, for modules that a program adds to the model by itself.
    """

    def __init__(self, method: Method) -> None:
        self.method = method

    def __call__(self, tensor: Tensor) -> Any:
        if not _noting.get():
            return self.method(tensor)
        setattr(tensor, NOTE, self.method)
        return torch.nn.init.zeros_(tensor)  # not left as it is: NaN in there would stay in the scales of FP8 weights


@contextlib.contextmanager
def noted(config: Any) -> Iterator[None]:
    """Inside, models built from `config` (a TransformerConfig, changed in place) have notes instead of random weights.

    Nothing is drawn: afterwards every random generator is where it was before.
    """
    for name in METHODS:
        setattr(config, name, Noted(getattr(config, name)))
    token = _noting.set(True)
    try:
        with keep_random_state(), whole_weights.left_out():
            yield
    finally:
        _noting.reset(token)


@torch.no_grad()
def draw(chunks: Sequence[Any], *, seed: int) -> None:
    """Give the parameters of this rank's model chunks that are to be random their values, in place.

    chunks: GPT models built inside of `noted`, not wrapped, on their device. All others keep what they have.
    """
    for chunk in chunks:
        device = torch.device("cpu") if chunk.config.use_cpu_initialization else platform.device()
        source = _Source(seed, torch.Generator(device), chunk.true_vocab_size)
        methods = _methods(chunk)
        for entry in shards.entries(chunk):
            method = methods.pop(id(entry.data), None)
            if method is not None and type(entry.data) is torch.nn.Parameter:
                source.fill(entry, entry.data.detach(), method)
            elif method is not None:  # quantised: no part of it can be written
                values = torch.empty(entry.data.shape, dtype=entry.data.dtype, device=device)
                source.fill(entry, values, method)
                _quantise(entry.data, values)
        assert not methods, f"{len(methods)} random parameters have no key in a checkpoint"
        _zero_softmax_offsets(chunk)


def _methods(chunk: Any) -> dict[int, Method]:
    """The function to draw each random parameter by, by id. Transformer Engine makes parameters anew, without notes,
    but keeps the functions itself."""
    methods = {}
    for module in chunk.modules():
        kept = getattr(module, "param_init_meta", {})
        for name, parameter in module.named_parameters(recurse=False):
            function = getattr(kept.get(name), "init_fn", None)
            method = function.method if isinstance(function, Noted) else getattr(parameter, NOTE, None)
            if method is not None:
                methods[id(parameter)] = method
    if chunk.share_embeddings_and_output_weights and chunk.post_process and id(chunk.output_layer.weight) in methods:
        # A later pipeline stage's copy of the embedding; megatron-core sends it the first stage's.
        methods[id(chunk.output_layer.weight)] = chunk.config.embedding_init_method.method
    return methods


class _Source:
    """Where the numbers come from: `generator`, on the device they are drawn on, seeded anew for each block."""

    def __init__(self, seed: int, generator: torch.Generator, vocab_size: int) -> None:
        self.seed, self.generator, self.vocab_size = seed, generator, vocab_size

    def fill(self, entry: Any, data: Tensor, method: Method) -> None:
        """Draw `data`, a tensor in the place of an entry's. Rows beyond the true vocabulary become 0."""
        for key, held in shards.held(entry, data):
            rows, *others = held.target.shape
            for piece in held.pieces:
                self._fill(piece, min(rows, self.vocab_size) if held.target.padded else rows, others, key, method)

    def _fill(self, piece: Piece, rows: int, others: list[int], key: str, method: Method) -> None:
        size = max(1, min(rows, BLOCK // max(1, math.prod(others))))
        first, stop = piece.offsets[0], min(piece.offsets[0] + piece.data.shape[0], rows)
        piece.data[max(stop - first, 0) :].zero_()
        if stop <= first:
            return
        for start in range(first // size * size, stop, size):
            shape, device = (min(size, rows - start), *others), self.generator.device
            block = torch.empty(shape, dtype=torch.float32, device=device)
            self.generator.manual_seed(_seed_of(self.seed, key, start // size))
            method(block, generator=self.generator)
            begin, end = max(first, start), min(stop, start + size)
            piece.data[begin - first : end - first].copy_(block[(slice(begin - start, end - start), *piece.place[1:])])


def _seed_of(seed: int, key: str, block: int) -> int:
    """63 bits; torch's generator on the CPU uses the lower 32."""
    return int.from_bytes(hashlib.sha256(f"{seed} {key} {block}".encode()).digest()[:8]) >> 1


def _quantise(parameter: Any, values: Tensor) -> None:
    """Write a quantised parameter, and what its optimizer's float32 weights start from (distrib_optimizer.py)."""
    parameter.copy_(values)
    if hasattr(parameter, "get_high_precision_init_val"):
        parameter.get_high_precision_init_val().copy_(values)


def _zero_softmax_offsets(chunk: torch.nn.Module) -> None:
    """Transformer Engine allocates learnable offsets and leaves them as they are; ours start at 0."""
    for name, parameter in chunk.named_parameters():
        if name.endswith(".softmax_offset"):
            parameter.zero_()
