"""Adam with the state layout of Transformer Engine's and Apex's FusedAdam, for machines that have neither.

megatron-core 0.16.1's DistributedOptimizer cannot reload torch.optim.Adam. Where HAVE_APEX_OR_TE is false, state_dict
asserts `len(steps) == 1` on the empty state and load_state_dict hands one shared step tensor to every parameter; and
copying the moments looks for `step` beside them. With the step in the parameter group it takes the code path of
GPUs.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class GroupStepAdam(torch.optim.Optimizer):
    """Adam or AdamW whose step count lives in the parameter group, as FusedAdam's does.

    Parameters and gradients are float32: megatron-core steps 32-bit copies of 16-bit weights.

    Formulas: Kingma and Ba 2015, algorithm 1; with `adam_w_mode` the weight decay of Loshchilov and Hutter 2019, which
    multiplies the weights by 1 - lr * weight_decay before the step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
        }
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "megatron-core never passes a closure"
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group)

    def _update(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        for p in params:
            state = self.state[p]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
        mean = [self.state[p]["exp_avg"] for p in params]
        square = [self.state[p]["exp_avg_sq"] for p in params]
        grads: Any = [p.grad for p in params]
        lr, decay, step = group["lr"], group["weight_decay"], group["step"]
        beta1, beta2 = group["betas"]
        if decay and self.adam_w_mode:
            torch._foreach_mul_(params, 1 - lr * decay)
        elif decay:
            grads = torch._foreach_add(grads, params, alpha=decay)
        torch._foreach_lerp_(mean, grads, 1 - beta1)
        torch._foreach_mul_(square, beta2)
        torch._foreach_addcmul_(square, grads, grads, 1 - beta2)
        correction1, correction2 = 1.0, 1.0
        if group["bias_correction"]:
            correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        denominator = torch._foreach_sqrt(square)
        torch._foreach_div_(denominator, correction2**0.5)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(params, mean, denominator, -lr / correction1)


def install() -> None:
    """Make megatron-core's optimizers build GroupStepAdam, unless Apex or Transformer Engine gave them FusedAdam."""
    import megatron.core.optimizer as optimizer_module
    import megatron.core.optimizer.distrib_optimizer as distributed_module

    optimizer: Any = optimizer_module
    distributed: Any = distributed_module
    if distributed.HAVE_APEX_OR_TE:
        return
    optimizer.Adam = distributed.Adam = GroupStepAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = True
