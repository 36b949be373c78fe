"""The fields read from megatron-core's source are those of the imported classes."""

import ast
import dataclasses
import inspect
import subprocess
import sys

import pytest

from bridge.config import mcore_fields


def imported(part: str) -> dict[str, object]:
    """Name -> default of the real class, as Python sees it."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    if part == "gpt":
        arguments = inspect.signature(GPTModel.__init__).parameters.values()
        return {argument.name: argument.default for argument in arguments if argument.name != "self"}
    kinds = {"transformer": TransformerConfig, "ddp": DistributedDataParallelConfig, "optimizer": OptimizerConfig}
    latent = dataclasses.fields(MLATransformerConfig) if part == "transformer" else ()
    return {field.name: field.default for field in (*latent, *dataclasses.fields(kinds[part]))}


@pytest.mark.parametrize("part", ["transformer", "ddp", "optimizer", "gpt"])
def test_fields_and_defaults_are_those_of_the_class(part: str):
    fields, real = mcore_fields.targets()[part], imported(part)
    assert fields.keys() == real.keys()
    for name, field in fields.items():
        if field.default is None:
            assert real[name] in (dataclasses.MISSING, inspect.Parameter.empty), name
        else:
            assert (field.default == "None") == (real[name] is None), name
        try:
            value = ast.literal_eval(field.default or "")
        except (ValueError, SyntaxError):
            continue  # an expression such as torch.float32
        assert value == real[name], name


def test_enumerations_have_the_members_of_the_class():
    from megatron.core.transformer.enums import AttnBackend

    assert mcore_fields.enums()["AttnBackend"] == tuple(AttnBackend.__members__)


def test_reading_costs_no_torch_import():
    code = "from bridge.config import run_config, layout, mcore_fields; mcore_fields.targets(); import sys;"
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'megatron', 'hydra', 'numpy')))"
    subprocess.run([sys.executable, "-c", code], check=True)
