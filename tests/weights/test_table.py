"""Lookups by exact names with numbered holes."""

import pytest

from bridge.weights.ops import Stack
from bridge.weights.table import Ignore, Row, Table

TABLE = Table(
    [
        Row("embed.weight", "model.embed.weight"),
        Row(
            "layers.{layer}.fc1.weight", ("model.layers.{layer}.gate.weight", "model.layers.{layer}.up.weight"), Stack()
        ),
        Row("projector.0.weight", "model.projector.0.weight"),
        Ignore("model.layers.{layer}.inv_freq", "computed from rope_theta"),
        Ignore("lm_head.weight", "tied", same_as="model.embed.weight"),
    ]
)


def test_lookup_from_either_side_fills_the_holes():
    entry = TABLE.entry("layers.12.fc1.weight")
    assert entry is not None
    assert entry.hf_names == ("model.layers.12.gate.weight", "model.layers.12.up.weight")
    assert TABLE.knows("model.layers.12.up.weight")
    assert not TABLE.knows("model.layers.x.up.weight")


@pytest.mark.parametrize(
    "name", ["layers.x.fc1.weight", "layers.1.2.fc1.weight", "layers.-1.fc1.weight", "xlayers.1.fc1.weight",
             "layers.1.fc1.weight.scale", "layers.1.fc1", "projector.1.weight"]
)  # fmt: skip
def test_a_name_that_is_not_exactly_a_row_is_unknown(name):
    assert TABLE.entry(name) is None


def test_ignored_names():
    found = TABLE.ignored("model.layers.3.inv_freq")
    assert found is not None and found.reason == "computed from rope_theta"
    assert TABLE.knows("model.layers.3.inv_freq")
    tied = TABLE.ignored("lm_head.weight")
    assert tied is not None and tied.same_as == "model.embed.weight"
    assert TABLE.ignored("model.embed.weight") is None


def test_a_name_written_twice_is_our_mistake():
    with pytest.raises(AssertionError, match="two rows for a.weight"):
        Table([Row("a.weight", "x"), Row("a.weight", "y")])


STACKED = Table(
    [Row("layers.{layer}.experts.fc2.weight[{expert}]", "model.layers.{layer}.experts.down[{expert}]")]
)  # fmt: skip


def test_entries_of_stacked_tensors():
    entry = STACKED.entry("layers.3.experts.fc2.weight[11]")
    assert entry is not None and entry.hf_names == ("model.layers.3.experts.down[11]",)
    assert STACKED.entry("layers.3.experts.fc2.weight") is None
    assert STACKED.entry("layers.3.experts.fc2.weight.11") is None
    assert STACKED.knows("model.layers.3.experts.down")
