"""What a run would need, without running it: parameters, FLOPs per token, and the memory of every pipeline stage.

Weights, gradients and optimizer state follow from megatron-core's own modules and the rules of its buffers and of its
distributed optimizer; activations are an estimate from the architecture.
"""

from bridge.estimate.report import Parameters, parameters, report
from bridge.estimate.stages import Memory, memory

__all__ = ["Memory", "Parameters", "memory", "parameters", "report"]
