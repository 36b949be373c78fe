"""Names megatron-core 0.16.1 uses but only defines when Transformer Engine imports. Needed on a GPU without it, too."""

import contextlib
from typing import Any


class NoFp8:
    """Stands for transformer_engine's FP8GlobalStateManager: FP8 is never on."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def no_context(**_: Any) -> contextlib.AbstractContextManager[None]:
    """Stands for the FP8 context managers around recomputation."""
    return contextlib.nullcontext()


def define_missing_names() -> None:
    """Give megatron-core's modules the names they look up at run time."""
    import megatron.core.tensor_parallel.random as random_module
    import megatron.core.transformer.moe.moe_utils as moe_utils_module
    import megatron.core.transformer.multi_latent_attention as mla_module

    random: Any = random_module
    moe_utils: Any = moe_utils_module
    mla: Any = mla_module
    # Every MoE router reads this name and takes the torch path when it is None (moe_utils.py:1192).
    moe_utils.te_general_gemm = None
    # CheckpointWithoutOutput asks for the FP8 state even when FP8 is off (random.py:589).
    random.FP8GlobalStateManager = NoFp8
    random.activation_recompute_forward = random.fp8_autocast = no_context
    # True by mistake: what it imports to find out exists without Transformer Engine, too (:62, isinstance at :185).
    mla.HAVE_TE = False
