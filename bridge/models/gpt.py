"""The GPT model of one process: from routed config values to megatron-core model chunks."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper, roll_tensor
from torch import Tensor

from bridge import parallel, platform
from bridge.config.routing import Routed
from bridge.errors import ConfigError
from bridge.models import counted_once, initialise
from bridge.models.layer_spec import block_spec, prediction_spec
from bridge.models.mcore_config import Config, MLAConfig, transformer_config
from bridge.models.modules import scales
from bridge.models.modules.rotary import place_rotary_embeddings
from bridge.models.settings_of_model import check_live

__all__ = ["GPT", "build", "check_live", "padded_vocab_size", "transformer_config"]


# Model keys that are ours, not arguments of GPTModel.
OWN_KEYS = ("family", "vocab_size", "make_vocab_size_divisible_by")


class GPT(GPTModel):
    """megatron-core's GPTModel whose loss ignores the padding of the vocabulary, with every family's rotary embeddings.

    `vocab_size` is the padded size, as in megatron-core; `true_vocab_size` the number of tokens there are. Logits come
    with the padded columns; cut them with `[..., :true_vocab_size]`. `routed` is the configuration it was built from.
    """

    routed: Routed
    config: Any  # Config or MLAConfig
    rotary_pos_emb: torch.nn.Module
    prediction_sums: Tensor | None = None  # float64 [prediction modules, 2]: sum of the losses and number of tokens

    def __init__(
        self, *, config: Config | MLAConfig, true_vocab_size: int, rotary_base: float = 10000, **kwargs: Any
    ) -> None:
        super().__init__(config=config, rotary_base=rotary_base, **kwargs)
        self.true_vocab_size = true_vocab_size
        if self.position_embedding_type == "learned_absolute" and self.pre_process:
            # megatron-core leaves this module alone in float32 and on the CPU.
            words = self.embedding.word_embeddings.weight
            self.embedding.position_embeddings.to(device=words.device, dtype=words.dtype)
        if self.mtp_process and self.post_process and self.share_embeddings_and_output_weights:
            # The prediction modules' copy of the embedding is the output layer's weight, also on a later pipeline
            # stage, where megatron-core makes another one that it neither uses nor lets into a checkpoint.
            self.output_layer.weight = None
        # Sums for a log, with an entry for each layer of the process's last model: another one may have more.
        MTPLossLoggingHelper.tracker.clear()
        get_moe_layer_wise_logging_tracker().clear()
        place_rotary_embeddings(self, rotary_base=rotary_base)
        scales.apply_at_both_ends(self)

    def _preprocess(self, *args: Any, padding_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """padding_mask: bool [batch, sequence], true for tokens that routers do not count. megatron-core gives each
        tensor rank its part of it on the first pipeline stage only."""
        if self.config.num_moe_experts is None:
            padding_mask = None
        elif padding_mask is not None and self.config.sequence_parallel and not self.pre_process:
            padding_mask = padding_mask.chunk(self.pg_collection.tp.size(), dim=1)[self.pg_collection.tp.rank()]
        return super()._preprocess(*args, padding_mask=padding_mask, **kwargs)

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Logits, or the loss when there are labels; multi-token prediction only where its own loss has a gradient.

        megatron-core runs it whenever the model has it, and needs labels for that.
        """
        if self.config.mtp_num_layers is None:
            return super()._postprocess(hidden_states, *args, **kwargs)
        if kwargs["labels"] is not None and torch.is_grad_enabled():
            output: Tensor = super()._postprocess(hidden_states, *args, **kwargs)
            self._measure_predictions(kwargs["labels"], kwargs["loss_mask"], kwargs.get("packed_seq_params"))
            return output
        whole, self.config = self.config, copy.copy(self.config)
        try:
            self.config.mtp_num_layers = None
            return super()._postprocess(hidden_states, *args, **(kwargs | {"mtp_in_postprocess": False}))
        finally:
            self.config = whole

    def start_measuring(self) -> None:
        """Add up the losses of prediction modules in training passes from 0."""
        modules = self.config.mtp_num_layers if self.post_process else None
        self.prediction_sums = modules and torch.zeros(modules, 2, dtype=torch.float64, device=platform.device())

    def measured(self) -> Iterator[tuple[str, Tensor]]:
        """name -> [sum, count] of the tokens of this rank."""
        rows = () if self.prediction_sums is None else self.prediction_sums
        return ((f"mtp_{number}_loss", row) for number, row in enumerate(rows, start=1))

    def _measure_predictions(self, labels: Tensor, mask: Tensor | None, packing: Any) -> None:
        """megatron-core has just noted the mean of each loss over the tokens of this micro-batch and rank, as many as
        `mask` [batch, sequence] counts after one more shift for each module."""
        means = MTPLossLoggingHelper.tracker.pop("values", None)
        if self.prediction_sums is None or means is None:
            return
        mask = torch.ones_like(labels) if mask is None else mask
        for row, mean in zip(self.prediction_sums, means, strict=True):
            mask, count = roll_tensor(mask, cp_group=self.cp_group, packed_seq_params=packing)
            row[0] += torch.where(count > 0, mean * count, 0)
            row[1] += count

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross entropy over the true vocabulary, float [batch, sequence], of logits [sequence, batch, padded / TP].

        The padded columns are set, in place, to the lowest finite number: their probability and gradient are exactly 0.
        Not to -inf, which gives NaN in a fused kernel when a rank holds nothing but padding.
        """
        columns = logits.size(-1)
        real = self.true_vocab_size - parallel.rank("tp") * columns
        if real < columns:
            logits[..., max(real, 0) :] = torch.finfo(logits.dtype).min
        return super().compute_language_model_loss(labels, logits)


def padded_vocab_size(routed: Routed) -> int:
    """Rows of the embedding: vocab_size rounded up to a multiple of make_vocab_size_divisible_by times tensor ranks."""
    multiple = routed.get("make_vocab_size_divisible_by") * routed.get("tensor_model_parallel_size")
    return -(-_required(routed, "vocab_size") // multiple) * multiple


def _required(routed: Routed, key: str) -> Any:
    value = routed.gpt.get(key)
    if value is None:
        raise ConfigError(f"model.{key}: missing; every model needs it")
    return value


def build(
    routed: Routed,
    *,
    dtype: torch.dtype | None = None,
    meta: bool = False,
    wrap: bool = False,
    only_stage: int | None = None,
    seed: int | None = 1234,
) -> list[GPT] | list[Float16Module]:
    """The model chunks of this process, one unless virtual pipeline stages are used, on this platform's device.

    Process groups must exist (`bridge.parallel`). `dtype` overrides the precision fields. `meta`: shapes, no storage.
    `wrap`: put bf16 and fp16 chunks into Float16Module, as megatron-core's schedules and optimizers expect.
    `only_stage`: of several virtual pipeline stages, this one alone.
    `seed`: of the random weights, the same in every layout; None leaves them 0, for a caller that loads weights.
    Raises ConfigError when a value cannot be honoured; for keys without effect call `config.effect.check` before.
    """
    platform.set_switches(routed.transformer)
    config = transformer_config(routed, dtype=dtype, meta=meta)
    vp_size = config.virtual_pipeline_model_parallel_size
    stages = (None,) if not vp_size else range(vp_size) if only_stage is None else (only_stage,)
    with torch.device("meta") if meta else initialise.noted(config):
        chunks = [_chunk(routed, config, vp_stage=stage) for stage in stages]
    for chunk in chunks:
        chunk.routed = routed
        check_live(routed, chunk, dtype=dtype, meta=meta)
        if not meta:  # routers and shared-expert gates are built on the CPU whatever use_cpu_initialization says
            chunk.to(platform.device())
            counted_once.mark(chunk)
    if seed is not None and not meta:
        initialise.draw(chunks, seed=seed)
    return in_float16_module(chunks) if wrap else chunks


def in_float16_module(chunks: list[GPT]) -> list[GPT] | list[Float16Module]:
    """Each chunk in megatron-core's Float16Module if it computes in bf16 or fp16, else the chunks."""
    config = chunks[0].config
    return [Float16Module(config, chunk) for chunk in chunks] if config.bf16 or config.fp16 else chunks


def _chunk(routed: Routed, config: Config, *, vp_stage: int | None) -> GPT:
    stage = {"vp_stage": vp_stage, "vp_size": config.virtual_pipeline_model_parallel_size}
    predictions = prediction_spec(config, vp_stage=vp_stage)
    if predictions and not parallel.is_pipeline_last_stage(**stage):
        raise ConfigError(
            "parallelism.pipeline_model_parallel_layout: multi-token prediction (m) is not on the stage of the loss; "
            "put m before L there"
        )
    return GPT(
        config=config,
        transformer_layer_spec=block_spec(config, vp_stage=vp_stage),
        mtp_block_spec=predictions,
        true_vocab_size=_required(routed, "vocab_size"),
        vocab_size=padded_vocab_size(routed),
        pre_process=parallel.is_pipeline_first_stage(**stage),
        post_process=parallel.is_pipeline_last_stage(**stage),
        vp_stage=vp_stage,
        **{key: value for key, value in routed.gpt.items() if key not in OWN_KEYS},
    )
