"""Settings survive: after the build, every key the user set is compared with the megatron-core object that owns it.

megatron-core rewrites fields in constructors (bucket_size without overlap_grad_reduce, to name one) and says so, if at
all, in a warning. Rules before the build refuse what is known; this finds the rest.
"""

from collections.abc import Iterator
from typing import Any

from megatron.core.utils import unwrap_model

from bridge import parallel
from bridge.config.routing import Routed
from bridge.models.settings_of_model import check_live, same, same_fields
from bridge.optim.optimizer import typed


def check(routed: Routed, *, model: list[Any], optimizer: Any) -> None:
    """Raise ConfigError for the first key whose live value is another one.

    `model`: the chunks in DistributedDataParallel; `optimizer` over them. Process groups must exist.
    """
    for chunk in model:
        check_live(routed, unwrap_model(chunk))
        same_fields(chunk.ddp_config, routed.ddp, routed, owner="megatron-core's DistributedDataParallel")
    wanted = {name: typed(name, value) for name, value in routed.optimizer.items()}
    for part in _parts(optimizer):
        same_fields(part.config, wanted, routed, owner="megatron-core's optimizer")
    sizes, asked = parallel.sizes(), routed.given
    for name in asked.keys() & sizes.keys():
        same(sizes[name], asked[name], key=routed.key(name), owner="the process groups")


def _parts(optimizer: Any) -> Iterator[Any]:
    """The optimizers in a chain, itself included: dense and expert weights have one each."""
    yield optimizer
    for part in getattr(optimizer, "chained_optimizers", ()):
        if part is not optimizer:
            yield from _parts(part)
