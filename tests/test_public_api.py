"""`import bridge` is free; its functions load with their first use, under the names other programs call."""

import inspect
import subprocess
import sys

import pytest

import bridge

# Methods of AutoBridge and the arguments programs give them by name or place, in order.
METHODS = {
    "list_supported_models": [],
    "supports": ["config"],
    "why_unsupported": ["config"],
    "can_handle": ["path", "trust_remote_code"],
    "from_hf_config": ["config"],
    "from_hf_pretrained": ["path", "torch_dtype"],
    "from_auto_config": ["megatron_path", "hf_model_id"],
    "get_hf_model_id_from_checkpoint": ["path"],
    "to_megatron_provider": ["load_weights", "hf_path"],
    "to_megatron_model": ["load_weights", "hf_path", "wrap_with_ddp", "parallelism"],
    "load_hf_weights": ["model", "hf_path"],
    "get_conversion_tasks": ["model", "hf_path"],
    "export_hf_weights": ["model", "cpu", "show_progress", "conversion_tasks"],
    "save_hf_pretrained": ["model", "path", "show_progress", "source_path", "overwrite", "max_shard_size"],
    "save_hf_weights": ["model", "path", "show_progress", "overwrite", "max_shard_size"],
    "save_megatron_model": ["model", "path", "overwrite"],
    "load_megatron_model": ["path", "mp_overrides", "wrap_with_ddp"],
    "import_ckpt": ["hf_model_id", "megatron_path", "torch_dtype", "show_progress", "overwrite"],
    "export_ckpt": ["megatron_path", "hf_path", "show_progress", "overwrite", "max_shard_size"],
}


def test_import_costs_no_torch():
    code = "import sys, bridge; assert 'load_model' in dir(bridge); assert not {'torch', 'megatron'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_are_unknown():
    with pytest.raises(AttributeError, match="module 'bridge' has no attribute 'load_modle'"):
        bridge.load_modle  # noqa: B018


def test_every_name_is_there():
    for name in bridge.__all__:
        assert callable(getattr(bridge, name)) and getattr(bridge, name).__doc__


def test_arguments_of_auto_bridge():
    found = {}
    for name, method in inspect.getmembers(bridge.AutoBridge, callable):
        if not name.startswith("_"):
            assert method.__doc__, name
            arguments = inspect.signature(method).parameters.values()
            found[name] = [it.name for it in arguments if it.name != "self" and it.kind is not it.VAR_KEYWORD]
    assert found == METHODS
