"""Building a model: padding of the vocabulary, settings that must arrive, precision, recomputation, experts."""

import re
from typing import Any

import pytest
import torch

from bridge import parallel, platform
from bridge.config import effect
from bridge.config.routing import Routed, route
from bridge.errors import ConfigError
from bridge.models import gpt

MODEL: dict[str, Any] = {
    "family": "llama",
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "vocab_size": 131,
    "max_sequence_length": 64,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": "silu",
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}

# Norms behind branches, a cap on scores, and two rotary embeddings: the pieces of Gemma 2 and 3.
GEMMA: dict[str, Any] = {
    "norm_placement": "sandwich",
    "layernorm_zero_centered_gamma": True,
    "attn_logit_softcapping": 0.5,
    "window_size": [4, 0],
    "window_attn_skip_freq": 2,
    "rope_local_base_freq": 10,
}


def routed(
    *, precision: dict[str, Any] | None = None, parallelism: dict[str, Any] | None = None, **model: Any
) -> Routed:
    return route({"model": MODEL | model, "precision": precision or {}, "parallelism": parallelism or {}})


@pytest.fixture
def one_process():
    with parallel.single_process():
        yield


def loss_and_gradients(model: gpt.GPT) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.randint(131, (2, 16), generator=torch.Generator().manual_seed(1))
    loss = model(ids, torch.arange(16).expand_as(ids), None, labels=ids.roll(-1, 1))
    loss.mean().backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_do_not_depend_on_vocabulary_padding(tied: bool):
    settings = {"share_embeddings_and_output_weights": tied}
    (plain,) = gpt.build(routed(**settings))
    (padded,) = gpt.build(routed(make_vocab_size_divisible_by=64, **settings))
    assert (plain.vocab_size, padded.vocab_size, padded.true_vocab_size) == (131, 192, 131)
    with torch.no_grad():
        for small, large in zip(plain.parameters(), padded.parameters(), strict=True):
            large.fill_(3.0)  # padding rows with large logits
            large[tuple(slice(size) for size in small.shape)] = small
    (loss, gradients), (loss_padded, gradients_padded) = loss_and_gradients(plain), loss_and_gradients(padded)
    torch.testing.assert_close(loss_padded, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_padded[name][: len(gradient)], gradient)
        assert not gradients_padded[name][len(gradient) :].any()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    "settings",
    [
        {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "mlp", "core_attn"]},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ],
    ids=["selective", "full"],
)
@pytest.mark.parametrize("pieces", [{}, GEMMA], ids=["plain", "gemma"])
def test_recomputation_changes_nothing(settings: dict[str, Any], pieces: dict[str, Any]):
    (plain,), (recomputing,) = gpt.build(routed(**pieces)), gpt.build(routed(**pieces, **settings))
    recomputing.load_state_dict(plain.state_dict())
    (loss, gradients), (same_loss, same_gradients) = loss_and_gradients(plain), loss_and_gradients(recomputing)
    assert torch.equal(loss, same_loss)
    torch.testing.assert_close(same_gradients, gradients)


@pytest.mark.usefixtures("one_process")
def test_experts_all_alike_are_one_mlp():
    """With equal experts the router's choice does not matter: the mixture is the dense model."""
    settings = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 48}
    (dense,), (mixture,) = gpt.build(routed()), gpt.build(routed(**settings))
    weights = dense.state_dict()
    for name, value in mixture.state_dict().items():
        if ".router." not in name and value is not None:
            source = re.sub(r"experts\.local_experts\.\d+\.", "", name)
            value.copy_(weights[source])
    torch.testing.assert_close(loss_and_gradients(mixture)[0], loss_and_gradients(dense)[0])


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("tied", [False, True])
def test_embedding_multiplier_is_as_good_as_larger_embeddings_of_tokens_alone(tied: bool):
    """Neither learned positions nor the output layer are multiplied, the latter even where it shares the weight."""
    settings = {"position_embedding_type": "learned_absolute", "share_embeddings_and_output_weights": tied}
    (scaled,), (plain,) = gpt.build(routed(embedding_multiplier=4.0, **settings)), gpt.build(routed(**settings))
    plain.load_state_dict(scaled.state_dict())
    ids = torch.arange(16)[None]
    embedded, output = (model.embedding(ids, ids) for model in (plain, scaled))
    words = plain.embedding.word_embeddings(ids).transpose(0, 1)
    torch.testing.assert_close(output, embedded + 3 * words)
    hidden = torch.randn(16, 1, 32)
    weights = [model.shared_embedding_or_output_weight() if tied else None for model in (plain, scaled)]
    logits, same = (
        model.output_layer(hidden, weight)[0] for model, weight in zip((plain, scaled), weights, strict=True)
    )
    assert torch.equal(logits, same)


@pytest.mark.usefixtures("one_process")
def test_embedding_multiplier_is_rounded_to_the_dtype_of_the_weight():
    (model,) = gpt.build(routed(embedding_multiplier=3072**0.5), dtype=torch.bfloat16)
    words = model.embedding.word_embeddings
    ids = torch.arange(16)[None]
    assert torch.equal(words(ids), 55.5 * words.weight[ids])


@pytest.mark.usefixtures("one_process")
def test_capped_logits_reach_the_loss_too():
    padding = {"make_vocab_size_divisible_by": 64}
    (capped,), (plain,) = gpt.build(routed(final_logit_softcapping=0.1, **padding)), gpt.build(routed(**padding))
    plain.load_state_dict(capped.state_dict())
    ids = torch.arange(16)[None]
    labels = ids.roll(-1, 1)
    logits = 0.1 * torch.tanh(plain(ids, ids, None) / 0.1)
    torch.testing.assert_close(capped(ids, ids, None), logits)
    expected = torch.nn.functional.cross_entropy(logits[0, :, :131], labels[0], reduction="none")
    torch.testing.assert_close(capped(ids, ids, None, labels=labels)[0], expected)


def test_padded_size_is_a_multiple_of_tensor_ranks_too():
    parallelism = {"tensor_model_parallel_size": 4}
    assert gpt.padded_vocab_size(routed()) == 131
    assert gpt.padded_vocab_size(routed(parallelism=parallelism)) == 132
    assert gpt.padded_vocab_size(routed(parallelism=parallelism, make_vocab_size_divisible_by=8)) == 160


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transformer_impl": "transformer_engine"}, "model.transformer_impl: transformer_engine needs Transformer"),
        ({"fp8": "hybrid"}, "model.fp8: hybrid needs Transformer Engine"),
        ({"window_attn_skip_freq": 2}, "model.window_attn_skip_freq: 2 has no effect while window_size is null"),
        ({"position_embedding_type": "yarn"}, "model.position_embedding_type: yarn is not supported; set rope"),
        ({"mtp_num_layers": 0}, "model.mtp_num_layers: 0 is not positive; set null"),
        (
            {"mtp_num_layers": 1, "recompute_granularity": "full", "recompute_method": "uniform"}
            | {"recompute_num_layers": 2},
            "model.recompute_num_layers: 2 cannot be combined with model.mtp_num_layers; set 1",
        ),
        ({"kv_lora_rank": 8}, "model.kv_lora_rank: 8 has no effect without latent attention"),
        *(
            (
                {"multi_latent_attention": True, **ignored},
                f"model.{next(iter(ignored))}: .* is not supported with model.m",
            )
            for ignored in (
                {"kv_channels": 16},
                {"num_query_groups": 2},
                {"softmax_scale": 0.5},
                {"apply_rope_fusion": True},
                {"rotary_percent": 0.5},
                {"add_attention_bias": True},
                {"norm_placement": "post"},
            )
        ),
        ({"recompute_granularity": "full"}, "model.recompute_granularity.*: megatron-core refuses it"),
        (
            {"rope_local_base_freq": 10},
            "model.rope_local_base_freq: 10 has no effect while window_size is null",
        ),
        (
            {**GEMMA, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "attention factor of 1.1386.* would also reach the layers with a window",
        ),
        (
            {"attention_softmax_in_fp32": False},
            "attention_softmax_in_fp32: false has no effect: only megatron-core.s own",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        _checked_and_built(routed(**settings))


def _checked_and_built(asked: Routed) -> None:
    """As by every program: the rules first, then the build, which has some of its own."""
    effect.check(asked)
    gpt.build(asked)


def test_a_kernel_that_splits_queries_off_late_cannot_have_an_attention_factor(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "check", lambda *_: None)  # as where Transformer Engine is
    partial = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "rotary_percent": 0.5}
    assert gpt.transformer_config(routed(**partial)).rotated_query_scale == (4, pytest.approx(1.1386**2, rel=1e-4))
    with pytest.raises(ConfigError, match=r"factor of 1.1386.*fused_single_qkv_rope needs model.rotary_percent=1.0"):
        gpt.transformer_config(routed(**partial, fused_single_qkv_rope=True))


@pytest.mark.usefixtures("one_process")
def test_a_value_lost_after_the_build_is_found():
    setup = routed(layernorm_epsilon=1e-3)
    (model,) = gpt.build(setup)
    model.config.layernorm_epsilon = 1e-5
    with pytest.raises(ConfigError, match="model.layernorm_epsilon: 0.001 did not reach the model, which has 1e-05"):
        gpt.check_live(setup, model)


@pytest.mark.usefixtures("one_process")
def test_norms_that_cannot_be_computed_again_are_found():
    setup = routed(recompute_granularity="selective", recompute_modules=["layernorm"])
    (model,) = gpt.build(setup)
    for layer in model.decoder.layers:  # as with Transformer Engine, whose linear layers contain the norms
        layer.recompute_input_layernorm = layer.recompute_pre_mlp_layernorm = False
    with pytest.raises(ConfigError, match="model.recompute_modules: layernorm has no effect"):
        gpt.check_live(setup, model)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("precision", "dtype", "expected"),
    [
        ({}, None, torch.float32),
        ({"bf16": True}, None, torch.bfloat16),
        ({"fp16": True, "params_dtype": "fp16"}, None, torch.float16),
        ({"bf16": True, "params_dtype": "bf16"}, torch.float32, torch.float32),
    ],
)
def test_precision(precision: dict[str, Any], dtype: torch.dtype | None, expected: torch.dtype):
    (model,) = gpt.build(routed(precision=precision), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    (learned,) = gpt.build(routed(precision=precision, position_embedding_type="learned_absolute"), dtype=dtype)
    assert {parameter.dtype for parameter in learned.parameters()} == {expected}
    assert model.config.pipeline_dtype == expected
    (wrapped,) = gpt.build(routed(precision=precision), dtype=dtype, wrap=True)
    assert (type(wrapped).__name__ == "Float16Module") == (expected != torch.float32)


def test_meta_model_of_one_rank_of_many():
    parallelism = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "pipeline_dtype": "fp32"}
    setup = routed(parallelism=parallelism)
    with parallel.fake(8, 5, setup.transformer):
        assert (parallel.rank("pp"), parallel.rank("tp"), parallel.size("dp")) == (1, 1, 2)
        (model,) = gpt.build(setup, meta=True)
    assert (model.pre_process, model.post_process) == (False, True)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.output_layer.weight.shape == (66, 32)
