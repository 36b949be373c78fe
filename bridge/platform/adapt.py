"""The one entry to the adaptations: which of them this machine needs, applied once per process."""

import functools
import gc
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from bridge.errors import BridgeError
from bridge.platform.devices import has_transformer_engine, on_cuda

# The adaptations name private parts of this release; another release needs them checked again.
MEGATRON_CORE = "0.16.1"


def check_version() -> None:
    """Raise BridgeError unless the installed megatron-core is the one the adaptations were written for."""
    from importlib.metadata import PackageNotFoundError, version  # the driver, which never asks, is spared 20 ms

    try:
        installed = version("megatron-core")
    except PackageNotFoundError:
        installed = "none"
    if installed != MEGATRON_CORE:
        raise BridgeError(
            f"megatron-core: {installed} is installed, {MEGATRON_CORE} is needed; "
            f"pip install megatron-core=={MEGATRON_CORE}"
        )


# Warnings of megatron-core, and of what it calls, that a user can do nothing about: beginnings of the messages, as
# regular expressions.
UNHELPFUL = (
    "Apex is not installed",
    "Transformer Engine and Apex are not installed",
    "full scope is deprecated",
    "MLP requires ffn_hidden_size",
    "Warning: tp_group is None",
    "The 'megatron.core.transformer.custom_layers",
    "moe_ffn_hidden_size is not set",
    "`load_state_dict` is deprecated",
    r"barrier\(\): using the device under current context",  # each process has one device, chosen by set_local_rank
    "Detected a Jax installation",  # Transformer Engine looks for its extension for every framework it finds
    "`sequence_parallel` is set to `True`, but tensor model parallel size is 1",  # of experts that are not divided
    r"The \.grad attribute of a Tensor that is not a leaf Tensor",  # megatron-core's optimizer looks for main gradients
)
# What of torch is to change is nothing to a user where torch or megatron-core calls it.
LIBRARIES = r"(torch|megatron)\."


def ignore_warnings() -> None:
    """Leave out what these libraries say about themselves on every run."""
    for message in UNHELPFUL:
        warnings.filterwarnings("ignore", message=rf"\s*{message}")
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=LIBRARIES)


# What megatron-core imports when it is installed, for features of its own that nothing here uses. 0.4 of the 2.7 s of
# CPU time that imports take. bridge.training.metrics imports them when a run asks for them.
UNUSED = ("wandb", "torch.utils.tensorboard")


@contextmanager
def importing() -> Iterator[None]:
    """Inside, imports cost less: UNUSED packages are not found, and no garbage is collected (0.35 s of 2.3 s)."""
    hidden = [name for name in UNUSED if name not in sys.modules]
    collecting = gc.isenabled()
    gc.disable()
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: importing it raises ImportError
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        if collecting:
            gc.enable()


@functools.cache
def prepare() -> None:
    """Make megatron-core 0.16.1 usable on this machine. Call before megatron modules are built; later calls do nothing.

    CUDA with Transformer Engine: nothing is patched. CUDA without it: the names Transformer Engine would define and an
    Adam with FusedAdam's state layout. No CUDA: also the CUDA calls, the random generators, the gaps of gloo and the
    norm of a gradient.
    Raises BridgeError when another release of megatron-core is installed.
    """
    check_version()
    ignore_warnings()
    with importing():
        _adapt()


def _adapt() -> None:
    if has_transformer_engine():
        import megatron.core  # noqa: F401

        return
    if not on_cuda():
        from bridge.platform import cpu

        cpu.import_megatron_without_compiling()
        cpu.leave_dynamo_out()
    from bridge.platform import adam, without_te

    without_te.define_missing_names()
    adam.install()
    if not on_cuda():
        from bridge.platform import gloo, grad_norm

        cpu.redirect_cuda_calls()
        cpu.redirect_random_states()
        gloo.fill_gaps()
        grad_norm.install()
