"""DeciLM (Llama-Nemotron) in plain torch, for lack of a class in transformers: what our layers have to compute.

Names of modules and fields, the null fields and the MLP's width are those of the modeling_decilm.py that ships with
nvidia/Llama-3_3-Nemotron-Super-49B-v1.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


@strict
class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"
    intermediate_size: int | None = None
    block_configs: list[dict[str, Any]] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.intermediate_size = self.num_key_value_heads = None
        assert self.block_configs is None or len(self.block_configs) == self.num_hidden_layers


class RMSNorm(nn.Module):
    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(config.hidden_size)), config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide / (wide.square().mean(-1, keepdim=True) + self.eps).sqrt()).to(x.dtype) * self.weight


class Attention(nn.Module):
    def __init__(self, config: DeciLMConfig, heads_in_group: int) -> None:
        super().__init__()
        self.heads, self.shared = config.num_attention_heads, heads_in_group
        self.width = config.hidden_size // self.heads
        groups = self.heads // heads_in_group
        for name, outputs in {"q": self.heads, "k": groups, "v": groups}.items():
            linear = nn.Linear(config.hidden_size, outputs * self.width, bias=config.attention_bias)
            setattr(self, f"{name}_proj", linear)
        self.o_proj = nn.Linear(self.heads * self.width, config.hidden_size, bias=config.attention_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.width)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin).repeat_interleave(self.shared, dim=2)
        scores = torch.einsum("bqhc,bkhc->bhqk", q, k) / self.width**0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        mixed = torch.einsum("bhqk,bkhc->bqhc", weights, v.repeat_interleave(self.shared, dim=2))
        return self.o_proj(mixed.flatten(-2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [batch, sequence, heads, channels], cos and sin [batch, sequence, channels]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, :, None] + torch.cat([-second, first], dim=-1) * sin[:, :, None]


class MLP(nn.Module):
    def __init__(self, config: DeciLMConfig, ffn_mult: float) -> None:
        super().__init__()
        width = int(2 * ffn_mult * config.hidden_size / 3)
        width = width if width % 256 == 0 else width + 256 - width % 256
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: DeciLMConfig, block: dict[str, Any]) -> None:
        super().__init__()
        self.attends, self.thinks = not block["attention"]["no_op"], not block["ffn"]["no_op"]
        if self.attends:
            self.input_layernorm = RMSNorm(config)
            self.self_attn = Attention(config, block["attention"]["n_heads_in_group"])
        if self.thinks:
            self.post_attention_layernorm = RMSNorm(config)
            self.mlp = MLP(config, block["ffn"]["ffn_mult"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin) if self.attends else x
        return x + self.mlp(self.post_attention_layernorm(x)) if self.thinks else x


class Decoder(nn.Module):
    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, block) for block in config.block_configs or [])
        self.norm, self.rotary_emb = RMSNorm(config), LlamaRotaryEmbedding(config)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        cos, sin = self.rotary_emb(x, torch.arange(ids.size(1))[None])
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class DeciLMForCausalLM(PreTrainedModel):
    config_class = DeciLMConfig
    base_model_prefix = "model"
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=F.linear(self.model(input_ids), self.lm_head.weight))
