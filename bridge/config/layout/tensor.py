"""Rules about weight matrices and sequences divided over processes."""

from bridge.config import divisibility
from bridge.config.divisibility import Number, divisors, either, nearest
from bridge.config.layout.sizes import Batch, Layout
from bridge.config.routing import Routed
from bridge.errors import ConfigError


def heads(routed: Routed, layout: Layout) -> None:
    heads = routed.number("num_attention_heads")
    if routed.given.get("kv_channels") is None:
        divisibility.require(routed.number("hidden_size"), by=[heads])
    divisibility.require(heads, by=[routed.number("num_query_groups")])


def tensor_parallel(routed: Routed, layout: Layout) -> None:
    tp, heads = routed.number("tensor_model_parallel_size"), routed.number("num_attention_heads")
    divisibility.require(heads, by=[tp])
    groups = routed.get("num_query_groups")
    if groups % layout.tp and layout.tp % groups:
        legal = [size for size in divisors(heads.value) if groups % size == 0 or size % groups == 0]
        raise ConfigError(
            f"{routed.key(tp.name)}: num_query_groups % TP or TP % num_query_groups must be 0, but "
            f"{groups} % {layout.tp} = {groups % layout.tp} and {layout.tp} % {groups} = {layout.tp % groups}; "
            f"set {routed.key(tp.name)} to {either(nearest(legal, layout.tp))}"
        )
    divisibility.require(routed.number("ffn_hidden_size"), by=[tp])
    divisibility.require(routed.number("moe_shared_expert_intermediate_size", layout.tp), by=[tp])
    if routed.get("multi_latent_attention") and layout.tp > 1 and not routed.get("sequence_parallel"):
        # The down-projections are on every rank: without it each would add up the gradient of the whole sequence.
        raise ConfigError(
            f"parallelism.sequence_parallel: must be true for latent attention with TP > 1, but it is false with "
            f"TP = {layout.tp}; set it to true"
        )
    if routed.get("sequence_parallel") and layout.tp == 1:
        smallest = divisors(heads.value)[1:2]
        more = f", or parallelism.tensor_model_parallel_size to {either(smallest)}" if smallest else ""
        raise ConfigError(
            f"{routed.key('sequence_parallel')}: TP > 1 must hold, but TP = 1; set it to false{more}",
        )


def sequence_length(routed: Routed, layout: Layout, batch: Batch) -> None:
    """No longer than the model's positions."""
    length, longest = batch.sequence_length, routed.get("max_sequence_length")
    if length > longest:
        raise ConfigError(
            f"data.sequence_length: sequence_length <= max_sequence_length must hold, but {length} > {longest}; "
            f"set data.sequence_length to {longest} or less, or model.max_sequence_length to {length} or more"
        )


def prediction_in_parts(routed: Routed, layout: Layout) -> None:
    """megatron-core's prediction modules divide by the tokens of a rank's own part; the loop of train.py never does."""
    if layout.cp > 1 and routed.get("mtp_num_layers") and not routed.get("calculate_per_token_loss"):
        raise ConfigError(
            f"{routed.key('calculate_per_token_loss')}: false with mtp_num_layers and CP = {layout.cp} gives wrong "
            "gradients, without an error; set it to true, with a loss function that returns a sum and its token count"
        )


def sequence_parts(routed: Routed, layout: Layout, batch: Batch) -> None:
    length = Number("sequence_length", batch.sequence_length, "data.sequence_length")
    cp = routed.number("context_parallel_size")
    if layout.cp > 1:
        # Every rank takes one chunk from the front and one from the back, so that causal attention is even work.
        divisibility.require(length, by=(Number("2", 2, movable=False), cp))
    if routed.get("sequence_parallel"):
        divisibility.require(length, by=(cp, routed.number("tensor_model_parallel_size")))
