"""The gradient's norm on a CPU against one in 64 bits."""

import pytest
import torch
from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

from bridge import parallel


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_gradients_and_their_parts_have_the_same_norm(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    small = [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((3, 5), (4096,), (1,), (0,))]
    large = torch.randn(5000, 1001, generator=generator, dtype=dtype).mul_(1e-3)
    want = float(torch.cat([tensor.flatten() for tensor in (*small, large)]).double().norm())
    with parallel.single_process():
        for parts in ([large], list(large.split(2000)), list(large.t().split(500))):
            assert get_grad_norm_fp32([*small, *parts]) == pytest.approx(want, rel=1e-6)
