"""Settings that only a GPU with Transformer Engine can keep: each arrives in the live object, and a step can be taken.

The same test as tests/training/test_settings.py, of the fields that are refused there.
"""

from pathlib import Path

import pytest

from tests.training import every_field
from tests.training.test_settings import outcome, world_size

pytestmark = pytest.mark.gpu
# What one Hopper GPU, or the GPU image, has not got: Blackwell's formats, several GPUs, Apex, DeepEP, UCC and
# flash-attention; factories of quantizers, which are a user's own; and heads wide enough for attention in FP8, as
# tests/gpu/test_gpu.py has them.
NOT_HERE_NAMES = """
fp4 fp4_param fp4_recipe fp4_quantizer_factory fp8_quantizer_factory gradient_accumulation_fusion
defer_embedding_wgrad_compute wgrad_deferral_limit moe_deepep_num_sms moe_flex_dispatcher_backend moe_hybridep_num_sms
pipeline_model_parallel_comm_backend batch_invariant_mode fp32_residual_connection fp8_dot_product_attention
"""
NOT_HERE = frozenset(NOT_HERE_NAMES.split())
FIELDS = [
    name
    for name in sorted(every_field.NEEDS_GPU - NOT_HERE)
    if world_size(name) == 1 and not name.startswith("tp_comm_") and name != "delay_wgrad_compute"
]


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_arrives(name: str, tmp_path: Path):
    assert outcome(name, tmp_path) == "live"
