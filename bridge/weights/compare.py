"""Whether two models hold the same tensors and answer the same: counts and differences, no judgement."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bridge.weights.dist_files import DistFiles
from bridge.weights.hf_files import HfFiles
from bridge.weights.ledger import Move, check_hf, check_megatron
from bridge.weights.progress import Progress
from bridge.weights.table import Table
from bridge.weights.transfer import bit_equal, cast, check_ignored, export_specs, specs_of, split


class TensorReport(NamedTuple):
    """`cast` counts tensors stored in another dtype than the source's: those are compared after the same cast."""

    equal: int
    total: int
    cast: int
    different: list[str]


class LogitReport(NamedTuple):
    """Differences of two fp32 logit arrays over all positions of all prompts."""

    max_abs_diff: float
    mean_abs_diff: float
    min_cosine: float
    top1_agreement: float
    num_positions: int


def compare_tensors(hf: HfFiles, dist: DistFiles, *, moves: Sequence[Move], table: Table) -> TensorReport:
    """Every Hugging Face tensor against what an export of `dist` would write, bit by bit, one at a time.

    Raises ConversionError when a tensor is missing, left over or misshapen on either side.
    """
    check_hf(moves, specs_of(hf), table=table, source=hf.directory)
    check_megatron(moves, specs_of(dist), source=dist.directory)
    check_ignored(hf, table)
    specs = export_specs(dist, moves=moves, dtype=None)
    progress = Progress("verify", num_tensors=len(specs), num_bytes=sum(spec.num_bytes for spec in specs.values()))
    different, num_cast = [], 0
    for move in moves:
        for name, part in zip(move.hf_names, split(dist.read(move.mcore_key), move), strict=True):
            dtype = specs[name].dtype
            num_cast += hf.spec(name).dtype != dtype
            if not bit_equal(cast(hf.read(name), dtype), part.to(dtype)):
                different.append(name)
            progress.add(specs[name].num_bytes, name=name)
    progress.finish()
    return TensorReport(len(specs) - len(different), len(specs), num_cast, different)


def compare_logits(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> LogitReport:
    """`ours` and `theirs`: per prompt float32 [sequence, vocab]."""
    a, b = (torch.cat([logits.float() for logits in prompts]) for prompts in (ours, theirs))
    difference = (a - b).abs()
    return LogitReport(
        max_abs_diff=float(difference.max()),
        mean_abs_diff=float(difference.mean()),
        min_cosine=float(torch.nn.functional.cosine_similarity(a.double(), b.double()).min()),
        top1_agreement=float((a.argmax(-1) == b.argmax(-1)).double().mean()),
        num_positions=a.shape[0],
    )
