"""The layouts that are compared with one device: what is added to the command line, and on how many processes."""

from typing import NamedTuple

EXPERTS = (
    "model.family=mixtral",
    "+model.num_moe_experts=8",
    "+model.moe_router_topk=2",
    "+model.moe_aux_loss_coeff=0.01",
    "+model.moe_router_dtype=fp32",
)


class Layout(NamedTuple):
    """`overrides` of train.py on `devices` processes; `reference` names the layout it must equal, itself on one."""

    overrides: tuple[str, ...]
    devices: int
    reference: str


LAYOUTS = {
    "one": Layout(("parallelism=dp",), 1, "one"),
    "dp2": Layout(("parallelism=dp_sharded",), 2, "one"),
    "tp2": Layout(("parallelism=tp2",), 2, "one"),
    "pp2": Layout(("parallelism=pp2",), 2, "one"),
    "pp2_vpp2": Layout(("parallelism=pp2_vpp2",), 2, "one"),
    "cp2": Layout(("parallelism=cp2",), 2, "one"),
    "experts": Layout(("parallelism=dp", *EXPERTS), 1, "experts"),
    "ep2": Layout(("parallelism=dp", "+parallelism.expert_model_parallel_size=2", *EXPERTS), 2, "experts"),
}
