"""Transformer Engine's communication buffers, which overlap matrix products with tensor-parallel communication.

megatron-core passes `tp_comm_overlap` on to the layers and leaves the buffers to the training program.
"""

from collections.abc import Mapping
from typing import Any


def create(fields: Mapping[str, Any], *, num_tokens: int) -> None:
    """Make the buffers for every layer of a model. Collective; once per process, before the model is built.

    `fields` holds values of TransformerConfig by name, as a configuration writes them; `num_tokens` are those of a
    micro-batch on one tensor-parallel group, all its ranks together.
    """
    import torch
    from transformer_engine.pytorch.module import base

    modes = base.UserBufferQuantizationMode
    quantization = [modes.FP8 if fields.get("fp8") else modes.NONE]
    if fields.get("fp8") and fields.get("first_last_layers_bf16"):
        quantization.append(modes.NONE)
    base.initialize_ub(
        shape=[num_tokens, fields["hidden_size"]],
        tp_size=fields["tensor_model_parallel_size"],
        quantization_modes=quantization,
        dtype=torch.bfloat16 if fields.get("bf16") else torch.float16,
        ub_cfgs=fields.get("tp_comm_overlap_cfg"),
        bootstrap_backend=fields.get("tp_comm_bootstrap_backend", "nccl"),
    )
