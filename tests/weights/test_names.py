"""Names of entries of stacked tensors."""

import torch

from bridge.weights.names import entry, split_index, spread, stack
from bridge.weights.spec import TensorSpec


def spec(*shape: int) -> TensorSpec:
    return TensorSpec(torch.float32, shape)


def test_an_entry_has_a_name():
    assert entry("a.b", 3, 5) == "a.b[3][5]"
    assert split_index("a.b[3][5]") == ("a.b", (3, 5))
    assert split_index("a.b") == ("a.b", ())


def test_spread_replaces_stacks_of_which_an_entry_is_wanted():
    found = {"a": spec(2, 3, 4), "b": spec(2, 3)}
    assert spread(found, wanted=["a[0]", "b"]) == {"a[0]": spec(3, 4), "a[1]": spec(3, 4), "b": spec(2, 3)}
    assert spread(found, wanted=["a[0][0]"]).keys() == {f"a[{i}][{j}]" for i in range(2) for j in range(3)} | {"b"}
    assert spread(found, wanted=[]) == found


def test_stack_is_the_inverse():
    found = {"a": spec(2, 3, 4), "b": spec(2, 3)}
    assert stack(spread(found, wanted=["a[0]"])) == found
