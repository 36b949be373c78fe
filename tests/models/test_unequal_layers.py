"""Layers of unequal sizes: what Llama-Nemotron's configs mean, what is refused, and what a token costs."""

import copy
from typing import Any

import pytest

from bridge import parallel
from bridge.config.routing import route
from bridge.errors import ConfigError, ConversionError
from bridge.models import gpt
from bridge.models.families.llama_nemotron import ffn_width
from bridge.models.hf import config as hf_config
from bridge.training import flops
from tests import hf_models
from tests.models.test_gpt import MODEL

GROUPS, WIDTHS = "num_query_groups_by_layer", "ffn_hidden_size_by_layer"
# ffn_mult -> width at a hidden size of 8192, of layers whose tensors are published (Llama-3.3-Nemotron-Super-49B-v1).
PUBLISHED = {5.25: 28672, 3.28125: 17920, 2.625: 14336, 1.3125: 7168, 1.0: 5632, 0.5: 2816}


def test_width_of_the_mlp():
    assert {share: ffn_width(share, 8192) for share in PUBLISHED} == PUBLISHED


def test_every_width_that_a_config_can_mean_survives_a_round_trip():
    hf = hf_models.config("llama_nemotron").to_dict()
    for share in (0.1, 1.0, 5.25, 7.9999, 8.0, 8.0001, 77.7):
        hf["block_configs"][0]["ffn"]["ffn_mult"] = share
        section = hf_config.to_mcore(hf)
        assert section[WIDTHS][0] == ffn_width(share, 48)
        assert hf_config.to_mcore(hf_config.to_hf(section, dtype="float32"))[WIDTHS] == section[WIDTHS]


@pytest.mark.parametrize(
    ("branch", "change", "message"),
    [
        ("attention", {"replace_with_linear": True}, "attention.replace_with_linear: true cannot be converted"),
        ("attention", {"window_length": 5}, "attention.window_length: 5"),
        ("attention", {"num_sink_tokens": 2}, "attention.num_sink_tokens: 2"),
        ("attention", {"n_heads_in_group": 3}, "n_heads_in_group has to divide num_attention_heads, 4"),
        ("attention", {"n_heads_in_group": None}, "attention.n_heads_in_group: null"),
        ("ffn", {"replace_with_linear": True}, "ffn.replace_with_linear: true"),
        ("ffn", {"ffn_mult": None}, "ffn.ffn_mult: null"),
        ("ffn", {"sparsify": ["a"]}, "ffn.sparsify"),
        ("parallel", {"no_op": True}, "block_configs parallel"),
    ],
)
def test_a_block_with_other_settings_is_refused(branch: str, change: dict[str, Any], message: str):
    hf = copy.deepcopy(hf_models.config("llama_nemotron").to_dict())
    hf["block_configs"][0].setdefault(branch, {}).update(change)
    with pytest.raises(ConversionError, match=message):
        hf_config.to_mcore(hf)


def test_a_list_of_another_length_is_refused():
    hf = hf_models.config("llama_nemotron").to_dict()
    with pytest.raises(ConversionError, match="it needs an entry for each of 3 layers"):
        hf_config.to_mcore({**hf, "num_hidden_layers": 3})


@pytest.mark.parametrize(
    ("fields", "tp", "message"),
    [
        ({GROUPS: [2]}, 1, f"model.{GROUPS}: .* for each of 2 layers"),
        ({WIDTHS: [48, -1]}, 1, f"model.{WIDTHS}: .* from 0 up"),
        ({GROUPS: [3, 0]}, 1, f"model.{GROUPS}: 3 has to divide num_attention_heads, 4"),
        ({WIDTHS: [48, 33]}, 2, f"model.{WIDTHS}: 33 has to be a multiple of tensor_model_parallel_size, 2"),
        (
            {GROUPS: [2, 0], "qk_layernorm_full_width": True},
            1,
            "model.qk_layernorm_full_width: true needs equal layers",
        ),
    ],
)
def test_refused_at_build(fields: dict[str, Any], tp: int, message: str):
    routed = route({"model": MODEL | fields, "parallelism": {"tensor_model_parallel_size": tp}})
    with parallel.fake(tp, 0, routed.transformer), pytest.raises(ConfigError, match=message):
        gpt.build(routed, meta=True)


def test_a_token_costs_what_its_layers_have():
    """Two equal layers cost as much as the same two in lists; without any branch only the output layer is left."""

    def cost(**fields: Any) -> float:
        config = gpt.transformer_config(route({"model": MODEL | fields}), meta=True)
        return flops.per_token(config, vocab_size=131, sequence_length=16)

    both = cost(num_query_groups=2, ffn_hidden_size=48)
    assert cost(**{GROUPS: [2, 2], WIDTHS: [48, 48]}) == both
    without = cost(**{GROUPS: [0, 0], WIDTHS: [0, 0]})
    assert without == 6 * 32 * 131
    assert cost(**{GROUPS: [0, 2], WIDTHS: [48, 0]}) == (both + without) / 2
