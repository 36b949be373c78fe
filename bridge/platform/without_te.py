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
    # Every MoE router reads this name and takes the torch path when it is None (`if te_general_gemm is not None`).
    moe_utils.te_general_gemm = None
    # CheckpointWithoutOutput calls FP8GlobalStateManager.is_fp8_enabled() to find out whether FP8 is on.
    random.FP8GlobalStateManager = NoFp8
    random.activation_recompute_forward = random.fp8_autocast = no_context
    # True by mistake: the import that sets it also succeeds without Transformer Engine, and
    # `isinstance(self.linear_proj, TELinear)` then fails.
    mla.HAVE_TE = False
