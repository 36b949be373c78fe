"""On one GPU and two: Transformer Engine's layers have the gradients of transformers, and the norm of a gradient counts
every parameter once, of every variant of every family.

In float32 and without balancing losses, which tests/training/test_every_model.py compares on megatron-core's layers. On
two GPUs in the layouts that divide a model by its matrices, layers and experts.
"""

from pathlib import Path

import pytest
from transformers.modeling_layers import MtpModel

from bridge import platform
from bridge.models.hf import config as hf_config
from tests import hf_gradients, hf_models
from tests.hf_gradients import Written
from tests.training.every_model import micro_batches
from tests.training.test_every_model import ALL, ALL_WITH_EXPERTS, EP2, PP2, TP2_SP, Layout, train

pytestmark = pytest.mark.gpu

LAYOUTS = {
    "one": Layout(1, {}, ALL, 1),
    "tp2_sp": Layout(2, TP2_SP, ALL, 1),
    "pp2": Layout(2, PP2, ALL, 1),
    "ep2": Layout(2, EP2, ALL_WITH_EXPERTS, 1),
    "tp2_ep2": Layout(2, TP2_SP | EP2, ALL_WITH_EXPERTS, 1),
}
TOLERANCE = 1e-3  # of a gradient's norm; sums in another order than on a CPU, in float32 as there


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    folder = tmp_path_factory.mktemp("hf")
    for name in ALL:
        hf_models.save(name, folder / name, tokenizer=False)
    # Older transformers, as the GPU machines have it, cannot run one prediction module at a time.
    known = [name for name in ALL if hasattr(MtpModel, "forward_layer") or not _predicts(folder / name)]
    return {name: hf_gradients.write(folder / name, micro_batches(0)) for name in known}


def _predicts(directory: Path) -> bool:
    return bool(hf_config.to_mcore(hf_config.read(directory)).get("mtp_num_layers"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_norms_and_gradients(name: str, written: dict[str, Written], tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    if platform.num_devices() < layout.ranks:
        pytest.skip("fewer than two CUDA devices")
    layout = layout._replace(variants=[name for name in layout.variants if name in written])
    assert len(layout.variants) > 20
    seen = train(written, layout, tmp_path, balanced=False, tolerance=TOLERANCE)
    wrong = {variant: [line for rank in ranks for line in rank.wrong][:5] for variant, ranks in seen.items()}
    assert not {variant: lines for variant, lines in wrong.items() if lines}
