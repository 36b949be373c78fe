"""Pretraining: every token is predicted from those before it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bridge.objectives.objective import Loss, Objective

if TYPE_CHECKING:
    from torch import Tensor

    from bridge.data.batch import Batch


@dataclass(frozen=True)
class NextToken(Objective):
    """Cross entropy of the labels in nats: the mean, weighted by loss_mask."""

    name: str = "next_token"
    has_perplexity: ClassVar[bool] = True

    def keys(self, chunk: Any) -> tuple[str, ...]:
        """See Objective; nothing between the two ends of a pipeline."""
        return ("tokens", "labels", "loss_mask", "position_ids") if chunk.pre_process or chunk.post_process else ()

    def forward(self, model: Callable[..., Any], batch: "Batch") -> Any:
        """The loss of every token, float32 [B, S]; logits [B, S, padded vocabulary / TP] of a batch without labels."""
        labels, mask = batch.get("labels"), batch.get("loss_mask")
        belonging = {"packed_seq_params": batch.get("packing"), "padding_mask": batch.get("padding_mask")}
        given = {name: value for name, value in belonging.items() if value is not None}
        return model(batch.get("tokens"), batch.get("position_ids"), None, labels=labels, loss_mask=mask, **given)

    def loss(self, output: "Tensor", batch: "Batch") -> Loss:
        """The sum of the token losses `output` [B, S], each times its weight, and the sum of the weights."""
        mask = batch["loss_mask"].view(-1).float()
        return Loss((output.view(-1).float() * mask).sum(), mask.sum())

    def lengths(self, batch: "Batch") -> "Tensor":
        """Those of the samples that share rows, or of the rows, without padding."""
        from torch.nn.functional import pad

        from bridge.data.batch import sample_ends

        tokens = batch["tokens"]
        if "padding_mask" in batch:
            return (~batch["padding_mask"]).sum(dim=1)
        if "segment_ids" in batch:
            real = (batch["segment_ids"].flatten() >= 0).cumsum(0)
            return pad(real, (1, 0))[sample_ends(batch["segment_ids"]).long()].diff()
        return tokens.new_full((tokens.shape[0],), tokens.shape[1])


OBJECTIVE = NextToken
