"""What a script of megatron-core's users does, with none of this project's code: build, fill, save, load a GPTModel.

Weights come from a tiny Hugging Face model of `tests.hf_models` by a mapping written out here by hand.
"""

import argparse
import queue
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

LAYERS, HIDDEN, HEADS, GROUPS, FFN, VOCAB, EPS, BASE = 4, 48, 4, 2, 88, 259, 5e-3, 1234
EXPERTS, EXPERT_FFN = 8, 40
PADDED = 384  # 259 rounded up to Megatron-LM's default multiple of 128


def build(kind: str, *, tp: int, pp: int, te_keys: bool = False) -> Any:
    """This rank's GPTModel of kind llama, qwen3_tied or qwen3_moe_no_dense, after the usual initialisation.

    `te_keys`: the norm before experts has the key it has with Transformer Engine's layers; megatron-core's two specs do
    not agree on it.
    """
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    qwen3, experts = "qwen3" in kind, "moe" in kind
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=16 if qwen3 else HIDDEN // HEADS,
        normalization="RMSNorm",
        layernorm_epsilon=EPS,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        qk_layernorm=qwen3,
        num_moe_experts=EXPERTS if experts else None,
        moe_ffn_hidden_size=EXPERT_FFN if experts else None,
        moe_router_topk=3,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
    )
    spec = get_gpt_layer_local_spec(config.num_moe_experts, qk_layernorm=qwen3, normalization="RMSNorm")
    if experts and te_keys:
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return GPTModel(
        config,
        spec,
        vocab_size=PADDED,
        max_sequence_length=64,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights="tied" in kind,
        position_embedding_type="rope",
        rotary_base=BASE,
    )


def fill(model: Any, hf: Path) -> None:
    """Copy this rank's part of every weight out of Hugging Face directory `hf`."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_part(name, load_file(hf / "model.safetensors"), model))


def count_wrong(model: Any, hf: Path) -> int:
    """How many of this rank's weights are not those of `hf`."""
    stored = load_file(hf / "model.safetensors")
    return sum(not torch.equal(value, _part(name, stored, model)) for name, value in model.named_parameters())


def _part(name: str, hf: dict[str, Tensor], model: Any) -> Tensor:
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    first = parallel_state.get_pipeline_model_parallel_rank() * len(model.decoder.layers)
    pad = (0, 0, 0, PADDED - VOCAB)
    if name.startswith(("embedding.", "output_layer.")):
        output = name.startswith("output") and "lm_head.weight" in hf
        return F.pad(hf["lm_head.weight" if output else "model.embed_tokens.weight"], pad).chunk(size)[rank]
    if name == "decoder.final_layernorm.weight":
        return hf["model.norm.weight"]
    number, _, place = name.removeprefix("decoder.layers.").partition(".")
    return _layer_part(place, hf, f"model.layers.{first + int(number)}.", rank=rank, size=size)


def _layer_part(place: str, hf: dict[str, Tensor], layer: str, *, rank: int, size: int) -> Tensor:
    norms = {
        "input_layernorm": "input_layernorm",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "self_attention.q_layernorm": "self_attn.q_norm",
        "self_attention.k_layernorm": "self_attn.k_norm",
        "mlp.router": "mlp.gate",
    }
    if place.removesuffix(".weight") in norms:
        return hf[f"{layer}{norms[place.removesuffix('.weight')]}.weight"]
    if place == "self_attention.linear_qkv.weight":
        query, key, value = (hf[f"{layer}self_attn.{which}_proj.weight"] for which in "qkv")
        groups = zip(query.chunk(GROUPS), key.chunk(GROUPS), value.chunk(GROUPS), strict=True)
        return torch.cat([part for group in groups for part in group]).chunk(size)[rank]
    if place == "self_attention.linear_proj.weight":
        return hf[f"{layer}self_attn.o_proj.weight"].chunk(size, 1)[rank]
    prefix, _, kind = place.rpartition(".linear_")
    mlp = f"{layer}mlp.experts.{prefix.rpartition('.')[2]}." if "experts" in prefix else f"{layer}mlp."
    if kind == "fc2.weight":
        return hf[f"{mlp}down_proj.weight"].chunk(size, 1)[rank]
    return torch.cat([hf[f"{mlp}{half}_proj.weight"].chunk(size)[rank] for half in ("gate", "up")])


def save(kind: str, hf: Path, directory: Path, layout: dict[str, int], metadata: dict[str, Any] | None, prefix: str):
    """Run on every rank: a checkpoint as training scripts write it, with random state and counters beside the model."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    model = build(kind, **layout)
    fill(model, hf)
    if torch.distributed.get_rank() == 0:
        directory.mkdir(parents=True)
    torch.distributed.barrier()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    content = {
        "model": model.sharded_state_dict(prefix=prefix, metadata=metadata),
        "rng_state": ShardedObject("rng_state", [torch.get_rng_state()], (world,), (rank,)),
        "iteration": 1000,
        "checkpoint_version": 3.0,
    }
    save_checkpoint(content, directory, content_metadata=metadata)


def save_checkpoint(content: dict[str, Any], directory: Path, **options: Any) -> None:
    """megatron-core's own save. What its writers tell goes through a queue of this process, which waits for them: else
    each rank's first save starts a server for it, a process that imports torch for 2 s."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(content, str(directory), **options)


def load(kind: str, hf: Path, directory: Path, layout: dict[str, int]) -> int:
    """Run on every rank: load as Megatron-LM's load_checkpoint does, then `count_wrong`."""
    from megatron.core import dist_checkpointing

    model = build(kind, te_keys=True, **layout)
    common = dist_checkpointing.load_common_state_dict(str(directory))
    assert common["checkpoint_version"] >= 3  # else rows of linear_qkv are put into another order
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=metadata)}, str(directory))
    model.load_state_dict(loaded["model"])
    return count_wrong(model, hf)


def training_arguments() -> argparse.Namespace:
    """The arguments that matter of those Megatron-LM keeps in common.pt for `llama`, and some that do not."""
    return argparse.Namespace(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        group_query_attention=True,
        num_query_groups=GROUPS,
        kv_channels=HIDDEN // HEADS,
        normalization="RMSNorm",
        norm_epsilon=EPS,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=False,
        qk_layernorm=False,
        position_embedding_type="rope",
        rotary_base=BASE,
        rotary_percent=1.0,
        rotary_interleaved=False,
        untie_embeddings_and_output_weights=True,
        max_position_embeddings=64,
        num_experts=None,
        multi_latent_attention=False,
        padded_vocab_size=PADDED,
        params_dtype=torch.bfloat16,
        moe_router_topk=2,
        q_lora_rank=None,
    )
