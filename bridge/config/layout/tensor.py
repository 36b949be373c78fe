"""Rules about weight matrices and sequences divided over processes."""

from bridge.config import divisibility
from bridge.config.divisibility import Number, divisors, either, nearest
from bridge.config.layout.sizes import Batch, Fields, Layout
from bridge.errors import ConfigError


def heads(fields: Fields, layout: Layout) -> None:
    heads = fields.number("num_attention_heads")
    if fields.get("kv_channels") is None:
        divisibility.require(fields.number("hidden_size"), by=[heads])
    divisibility.require(heads, by=[fields.number("num_query_groups")])


def tensor_parallel(fields: Fields, layout: Layout) -> None:
    tp, heads = fields.number("tensor_model_parallel_size"), fields.number("num_attention_heads")
    divisibility.require(heads, by=[tp])
    groups = fields.get("num_query_groups", heads.value)
    if groups % layout.tp and layout.tp % groups:
        legal = [size for size in divisors(heads.value) if groups % size == 0 or size % groups == 0]
        raise ConfigError(
            f"{fields.key(tp.name)}: num_query_groups % TP or TP % num_query_groups must be 0, but "
            f"{groups} % {layout.tp} = {groups % layout.tp} and {layout.tp} % {groups} = {layout.tp % groups}; "
            f"set {fields.key(tp.name)} to {either(nearest(legal, layout.tp))}"
        )
    divisibility.require(fields.number("ffn_hidden_size", 4 * fields.get("hidden_size")), by=[tp])
    divisibility.require(fields.number("moe_shared_expert_intermediate_size", layout.tp), by=[tp])
    if fields.get("multi_latent_attention", False) and layout.tp > 1 and not fields.get("sequence_parallel", False):
        # The down-projections are on every rank: without it each would add up the gradient of the whole sequence.
        raise ConfigError(
            f"parallelism.sequence_parallel: must be true for latent attention with TP > 1, but it is false with "
            f"TP = {layout.tp}; set it to true"
        )
    if fields.get("sequence_parallel", False) and layout.tp == 1:
        smallest = divisors(heads.value)[1:2]
        more = f", or parallelism.tensor_model_parallel_size to {either(smallest)}" if smallest else ""
        raise ConfigError(
            f"{fields.key('sequence_parallel')}: TP > 1 must hold, but TP = 1; set it to false{more}",
        )


def sequence_length(fields: Fields, layout: Layout, batch: Batch) -> None:
    """No longer than the model's positions."""
    length, longest = batch.sequence_length, fields.get("max_sequence_length")
    if length > longest:
        raise ConfigError(
            f"data.sequence_length: sequence_length <= max_sequence_length must hold, but {length} > {longest}; "
            f"set data.sequence_length to {longest} or less, or model.max_sequence_length to {length} or more"
        )


def sequence_parts(fields: Fields, layout: Layout, batch: Batch) -> None:
    length = Number("sequence_length", batch.sequence_length, "data.sequence_length")
    cp = fields.number("context_parallel_size")
    if layout.cp > 1:
        # Every rank takes one chunk from the front and one from the back, so that causal attention is even work.
        divisibility.require(length, by=(Number("2", 2, movable=False), cp))
    if fields.get("sequence_parallel", False):
        divisibility.require(length, by=(cp, fields.number("tensor_model_parallel_size")))
