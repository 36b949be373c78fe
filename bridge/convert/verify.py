"""mode=verify: is a Megatron checkpoint the same model as a Hugging Face directory? Tensors bit by bit, and logits."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridge import parallel, platform
from bridge.config import effect
from bridge.config.routing import Routed
from bridge.config.schema import ConvertConfig
from bridge.errors import ConversionError
from bridge.models import gpt
from bridge.sources import reference as hf_reference
from bridge.sources.described import model_of
from bridge.sources.skeleton import Skeleton, skeleton
from bridge.weights import compare, into_model, locate
from bridge.weights.dist_files import DistFiles, open_dist
from bridge.weights.hf_files import HfFiles, main_dtype
from bridge.weights.key_layouts import canonical
from bridge.weights.ledger import check_megatron, name_some
from bridge.weights.quantized import Dequantized, open_source
from bridge.weights.transfer import specs_of

TEXTS = (
    "The capital of France is",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Once upon a time there was a little girl who lived near the forest. Every morning she",
)
ID_LENGTHS = (5, 17, 48)  # tokens of the prompts made when there is no tokenizer
REPORT = "verify.json"


def run(config: ConvertConfig) -> int:
    assert config.hf is not None and config.megatron is not None
    file = Path(config.report) if config.report else locate.locate(config.megatron).root / REPORT
    report = verify(
        config.hf,
        config.megatron,
        prompts=config.prompts,
        tolerance=config.tolerance,
        model=config.model,
        reference=config.reference,
    )
    file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(describe(report))
    print(f"report: {file}")
    return 0 if report["passed"] else 1


def verify(
    hf: str | Path,
    megatron: str | Path,
    *,
    prompts: Sequence[str] | None = None,
    tolerance: float = 1e-4,
    model: Mapping[str, Any] | None = None,
    reference: str | Path | None = None,
) -> dict[str, Any]:
    """Compare all tensors and the fp32 logits of transformers and megatron-core; the report, ready for JSON.

    `passed`: every tensor equal and no logit further apart than `tolerance`. Prompts are texts when there is a
    tokenizer, else token ids. Both models are held in fp32, one after the other. `model` and `reference` are as for
    `export_hf`. Raises ConversionError, ConfigError.
    """
    found = locate.locate(megatron)
    described = model_of(found, model=model, reference=reference)
    stored = open_dist(found.directory)
    files = open_source(hf, dtype=main_dtype(specs_of(stored).values()))
    bones = skeleton(described.section, hf_names=files.tensors)
    dist = canonical(stored, wanted=[move.mcore_key for move in bones.moves])
    check_megatron(bones.moves, specs_of(dist), source=dist.directory, described_by=described.source)
    tensors = compare.compare_tensors(files, dist, moves=bones.moves, table=bones.table)
    ids = token_ids(hf, bones.routed, prompts=prompts)
    theirs = _transformers_logits(hf, files, ids)
    logits = compare.compare_logits(_megatron_logits(bones, dist, ids), theirs)
    return {
        "hf": str(hf),
        "megatron": str(found.directory),
        "tensors": tensors._asdict(),
        "logits": logits._asdict(),
        "tolerance": tolerance,
        "passed": tensors.equal == tensors.total and logits.max_abs_diff <= tolerance,
    }


def describe(report: dict[str, Any]) -> str:
    """The report in three lines."""
    tensors, logits = report["tensors"], report["logits"]
    cast = f" ({tensors['cast']} after a cast to the stored dtype)" if tensors["cast"] else ""
    different = f"; different: {name_some(tensors['different'])}" if tensors["different"] else ""
    return (
        f"tensors: {tensors['equal']}/{tensors['total']} equal{cast}{different}\n"
        f"logits: largest difference {logits['max_abs_diff']:.2e} (tolerance {report['tolerance']:.0e}), "
        f"cosine {logits['min_cosine']:.7f}, top-1 agreement {logits['top1_agreement']:.2%} "
        f"of {logits['num_positions']} positions\n"
        f"{'verified' if report['passed'] else 'NOT the same model'}"
    )


def token_ids(hf: str | Path, routed: Routed, *, prompts: Sequence[str] | None) -> list[Tensor]:
    """Prompts as int64 [sequence]: `prompts` or TEXTS through the directory's tokenizer, or ids made up without one."""
    vocab_size, longest = routed.gpt["vocab_size"], routed.gpt["max_sequence_length"]
    if not (Path(hf) / "tokenizer_config.json").is_file() and not (Path(hf) / "tokenizer.json").is_file():
        if prompts:
            raise ConversionError(f"prompts: {hf} has no tokenizer; leave prompts out to compare on token ids")
        random = torch.Generator().manual_seed(0)
        return [torch.randint(vocab_size, (min(length, longest),), generator=random) for length in ID_LENGTHS]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf)
    ids = [torch.tensor(tokenizer(text)["input_ids"][:longest]) for text in prompts or TEXTS]
    if any(not len(prompt) or int(prompt.max()) >= vocab_size for prompt in ids):
        raise ConversionError(
            f"prompts: one is empty or has tokens beyond the model's {vocab_size}; choose other prompts"
        )
    return ids


@torch.no_grad()
def _transformers_logits(hf: str | Path, files: HfFiles, prompts: Sequence[Tensor]) -> list[Tensor]:
    """Of a quantised source the weights are read by us: kernels for its format run on GPUs only."""
    model = hf_reference.load(hf, files=files if isinstance(files, Dequantized) else None)
    return [model(ids[None]).logits[0] for ids in prompts]


@torch.no_grad()
def _megatron_logits(bones: Skeleton, dist: DistFiles, prompts: Sequence[Tensor]) -> list[Tensor]:
    routed = replace(bones.routed, transformer=bones.routed.transformer | {"transformer_impl": "local"})
    effect.check(routed)
    vocab_size = routed.gpt["vocab_size"]
    with parallel.single_process(routed.transformer):
        model = gpt.build(routed, dtype=torch.float32, seed=None)
        into_model.load_megatron(model, dist, table=bones.table, vocab_size=vocab_size)
        chunk = model[0].eval()
        logits = []
        for ids in prompts:
            batch = ids[None].to(platform.device())
            positions = torch.arange(len(ids), device=batch.device)[None]
            logits.append(chunk(batch, positions, None)[0, :, :vocab_size].cpu())
    return logits
