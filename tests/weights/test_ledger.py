"""What is missing, left over or misshapen is named before anything moves; the account balances or complains."""

import pytest
import torch

from bridge.errors import ConversionError
from bridge.weights.ledger import Ledger, Target, check_hf, check_megatron, name_some, plan
from bridge.weights.ops import Stack
from bridge.weights.spec import TensorSpec
from bridge.weights.table import Ignore, Row, Table

TABLE = Table(
    [
        Row("embed", "wte"),
        Row("layers.{layer}.fc1", ("h.{layer}.gate", "h.{layer}.up"), Stack()),
        Ignore("h.{layer}.inv_freq", "a buffer"),
    ]
)
TARGETS = {"embed": Target((8, 2), True, torch.float32), "layers.0.fc1": Target((6, 2), False, torch.float32)}
MOVES = plan(TABLE, TARGETS, vocab_size=5)
HF = {"wte": (5, 2), "h.0.gate": (3, 2), "h.0.up": (3, 2)}


def specs(shapes):
    return {name: TensorSpec(torch.float32, shape) for name, shape in shapes.items()}


def test_plan_gives_shapes_without_padding():
    embed, fc1 = MOVES
    assert (embed.shape, embed.hf_shapes, embed.target.shape) == ((5, 2), ((5, 2),), (8, 2))
    assert (fc1.hf_names, fc1.hf_shapes) == (("h.0.gate", "h.0.up"), ((3, 2), (3, 2)))


def test_plan_names_keys_without_a_row():
    with pytest.raises(ConversionError, match=r"no row for layers.0.fc9, layers.1.fc9 of the model"):
        plan(TABLE, {f"layers.{n}.fc9": Target((1,), False, torch.float32) for n in range(2)}, vocab_size=5)


def test_plan_refuses_one_tensor_for_two_keys():
    table = Table([Row("a", "x")])
    twice = Table([Row("a", "x"), Row("b", ("y", "z"), Stack())])
    plan(table, {"a": Target((1,), False, torch.float32)}, vocab_size=5)
    object.__setattr__(twice.rows[1], "hf_names", ("x", "z"))
    targets = {"a": Target((1,), False, torch.float32), "b": Target((2,), False, torch.float32)}
    with pytest.raises(ConversionError, match="uses x for more than one tensor"):
        plan(twice, targets, vocab_size=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wte": None}, "src: wte missing"),
        ({"h.0.up": None, "h.0.gate": None, "wte": None}, "src: wte, h.0.gate, h.0.up missing"),
        ({"h.0.up": (4, 2)}, r"src: h.0.up has shape \[4, 2\], but the model's config makes it \[3, 2\]"),
        ({"wte": (8, 2)}, r"wte has shape \[8, 2\], but the model's config makes it \[5, 2\]"),
        ({"h.1.gate": (3, 2)}, "src: h.1.gate would be lost"),
        ({"h.0.gate.scale": (1,)}, "src: h.0.gate.scale would be lost"),
    ],
)
def test_hugging_face_side(change, message):
    found = {name: shape for name, shape in (HF | change).items() if shape is not None}
    with pytest.raises(ConversionError, match=message):
        check_hf(MOVES, specs(found), table=TABLE, source="src")


def test_ignored_tensors_are_no_leftovers():
    check_hf(MOVES, specs(HF | {"h.0.inv_freq": (7,)}), table=TABLE, source="src")


@pytest.mark.parametrize("num_rows", [5, 6, 8, 64])
def test_any_vocabulary_padding_fits(num_rows):
    check_megatron(MOVES, specs({"embed": (num_rows, 2), "layers.0.fc1": (6, 2)}), source="src")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"layers.0.fc1": (6, 2)}, "src: embed missing"),
        ({"embed": (4, 2), "layers.0.fc1": (6, 2)}, r"embed has shape \[4, 2\], but model.yaml makes it \[5, 2\]"),
        ({"embed": (8, 3), "layers.0.fc1": (6, 2)}, r"embed has shape \[8, 3\]"),
        ({"embed": (8, 2), "layers.0.fc1": (7, 2)}, r"layers.0.fc1 has shape \[7, 2\]"),
        ({"embed": (8, 2), "layers.0.fc1": (6, 2), "optimizers": (1,)}, "optimizers would be lost"),
    ],
)
def test_megatron_side(found, message):
    with pytest.raises(ConversionError, match=message):
        check_megatron(MOVES, specs(found), source="src")


def test_optimizer_state_is_passed_over():
    check_megatron(MOVES, specs({"embed": (8, 2), "layers.0.fc1": (6, 2), "optimizer.state.x": (1,)}), source="src")


def test_account():
    ledger = Ledger(read=["a", "b"], written=["c"])
    ledger.read("a")
    ledger.wrote("c")
    with pytest.raises(ConversionError, match="b not read exactly once"):
        ledger.balance()
    ledger.read("b")
    ledger.balance()
    ledger.wrote("c")
    with pytest.raises(ConversionError, match="c not written exactly once"):
        ledger.balance()


def test_long_lists_are_counted():
    assert name_some("abc") == "a, b, c"
    assert name_some("abcdefg") == "a, b, c and 4 more tensors"
