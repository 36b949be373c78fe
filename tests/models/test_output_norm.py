"""Norms behind attention and MLP: where they stand, what they are called, and zero-centred weights of every norm."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bridge import parallel
from bridge.errors import ConfigError
from bridge.models import gpt
from tests.models.test_gpt import loss_and_gradients, routed

POST = ("self_attention.linear_proj.post_layernorm.weight", "mlp.linear_fc2.post_layernorm.weight")
PRE = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")


def built(**model: Any) -> gpt.GPT:
    (chunk,) = gpt.build(routed(**model))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return chunk


@pytest.fixture(autouse=True)
def one_process():
    with parallel.single_process():
        yield


@pytest.mark.parametrize("placement", ["post", "sandwich"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_by_hand(placement: str, bias: bool):
    model = built(norm_placement=placement, add_bias_linear=bias).eval()
    layer, hidden = model.decoder.layers[0], torch.randn(8, 2, 32)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (32,), weight, model.config.layernorm_epsilon)

    def branch(part: Any, x: torch.Tensor, before: Any, last: Any, **more: Any) -> torch.Tensor:
        inner, norm_behind = norm(x, before.weight) if placement == "sandwich" else x, last.post_layernorm
        last.post_layernorm = torch.nn.Identity()
        output, rest = part(inner, **more)
        last.post_layernorm = norm_behind
        assert rest is None
        return x + norm(output, norm_behind.weight)

    rotary = model.rotary_pos_emb(8)
    attention = {"attention_mask": None, "rotary_pos_emb": rotary}
    with torch.no_grad():
        found, _ = layer(hidden, **attention)
        expected = branch(
            layer.self_attention, hidden, layer.input_layernorm, layer.self_attention.linear_proj, **attention
        )
        expected = branch(layer.mlp, expected, layer.pre_mlp_layernorm, layer.mlp.linear_fc2)
    torch.testing.assert_close(found, expected)


def test_keys_of_a_checkpoint():
    def keys(placement: str) -> set[str]:
        metadata = {"dp_cp_group": torch.distributed.group.WORLD}
        return {value.key for value in built(norm_placement=placement).sharded_state_dict(metadata=metadata).values()}

    pre, post, sandwich = keys("pre"), keys("post"), keys("sandwich")
    before, behind = ({f"decoder.layers.{name}" for name in names} for names in (PRE, POST))
    assert sandwich - pre == behind
    assert pre - sandwich == set()
    assert post == (pre - before) | behind


def test_experts_are_refused():
    with pytest.raises(ConfigError, match="model.norm_placement: sandwich is for dense MLPs, not for MoELayer"):
        built(norm_placement="sandwich", num_moe_experts=4, moe_ffn_hidden_size=48)


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_zero_centred_weights_are_one_less(normalization: str):
    settings = {"normalization": normalization, "qk_layernorm": True, "norm_placement": "sandwich"}
    plain, centred = built(**settings), built(layernorm_zero_centered_gamma=True, **settings)
    fresh = gpt.build(routed(layernorm_zero_centered_gamma=True, **settings))[0]
    norms = [name for name in plain.state_dict() if "norm" in name and name.endswith("weight")]
    assert len(norms) == 2 * 6 + 1
    assert not any(fresh.state_dict()[name].any() for name in norms)
    shifted = {name: value - 1 if name in norms else value for name, value in plain.state_dict().items()}
    centred.load_state_dict(shifted)
    (loss, gradients), (same_loss, same_gradients) = loss_and_gradients(plain), loss_and_gradients(centred)
    torch.testing.assert_close(same_loss, loss)
    torch.testing.assert_close(same_gradients, gradients, atol=1e-5, rtol=1e-4)
