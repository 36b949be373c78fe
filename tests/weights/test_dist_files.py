"""Our torch_dist streams against megatron-core's own save and load, on one and on several processes."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from bridge import parallel
from bridge.errors import ConversionError
from bridge.weights.dist_files import DistWriter, open_dist
from tests import plain_megatron
from tests.distributed import run_distributed

RANDOM = torch.Generator().manual_seed(0)  # workers import this file anew and must see the same numbers
TENSORS = {
    "embedding.weight": torch.randn(12, 4, generator=RANDOM).bfloat16(),
    "layers.0.bias": torch.randn(6, generator=RANDOM),
    "layers.0.weight": torch.randn(8, 6, generator=RANDOM).half(),
    "scalar": torch.tensor(2.0),
}


def write(directory, tensors=TENSORS):
    directory.mkdir(exist_ok=True)
    with DistWriter(directory) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor)


def sharded(key, tensor, *, dim=0):
    """This rank's part of a matrix split along `dim`; vectors and scalars are the same on every rank."""
    from megatron.core.dist_checkpointing import ShardedTensor

    rank, size = parallel.rank(), parallel.size()
    if tensor.ndim < 2:
        return ShardedTensor.from_rank_offsets(key, tensor.clone(), replica_id=rank)
    return ShardedTensor.from_rank_offsets(key, tensor.chunk(size, dim)[rank].contiguous(), (dim, rank, size))


def load_with_mcore(directory):
    from megatron.core import dist_checkpointing

    parallel.initialize({})
    state = {key: sharded(key, torch.zeros_like(tensor), dim=1) for key, tensor in TENSORS.items()}
    return dist_checkpointing.load(state, str(directory))


def test_mcore_loads_what_we_wrote_at_any_layout(tmp_path):
    write(tmp_path)
    for world_size in (1, 2):
        loaded = run_distributed(load_with_mcore, world_size, tmp_path)
        for key, tensor in TENSORS.items():
            parts = [part[key] for part in loaded]
            whole = torch.cat(parts, dim=1) if tensor.ndim == 2 else parts[0]
            assert whole.dtype == tensor.dtype and torch.equal(whole, tensor)


def save_with_mcore(directory):
    """Beside an object, which is no tensor, and a plain value, which goes to common.pt."""
    from megatron.core import dist_checkpointing

    parallel.initialize({})
    rank, size = parallel.rank(), parallel.size()
    state = {key: sharded(key, tensor, dim=number % 2) for number, (key, tensor) in enumerate(TENSORS.items())}
    state |= {"step": 3, "rng": dist_checkpointing.mapping.ShardedObject("rng", [rank], (size,), (rank,))}
    plain_megatron.save_checkpoint(state, directory)


@pytest.mark.parametrize("world_size", [1, 2])
def test_we_read_what_mcore_saved(tmp_path, world_size):
    run_distributed(save_with_mcore, world_size, tmp_path, fresh=True)
    assert len(list(tmp_path.glob("*.distcp"))) >= world_size
    dist = open_dist(tmp_path)
    assert set(dist.tensors) == set(TENSORS)
    for key, tensor in TENSORS.items():
        assert dist.spec(key) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(dist.read(key), tensor)
    weight = TENSORS["layers.0.weight"]
    assert torch.equal(dist.read("layers.0.weight", (slice(2, 7), slice(2, 5))), weight[2:7, 2:5])
    assert torch.equal(dist.read("layers.0.weight", (slice(6, 12), slice(0, 6))), weight[6:])


def test_a_view_stores_its_own_elements_only(tmp_path):
    write(tmp_path, {"view": torch.zeros(1_000_000)[:10]})
    assert (tmp_path / "__0_0.distcp").stat().st_size < 10_000


def test_an_interrupted_write_is_no_checkpoint(tmp_path):
    writer = DistWriter(tmp_path)
    with pytest.raises(AssertionError, match="a"), writer:
        [writer.write("a", torch.zeros(3)) for _ in range(2)]
    assert not (tmp_path / "metadata.json").exists()


def test_damaged_files_are_named(tmp_path):
    write(tmp_path)
    data = tmp_path / "__0_0.distcp"
    os.truncate(data, 100)
    with pytest.raises(ConversionError, match=r"__0_0.distcp: tensor scalar cannot be read"):
        open_dist(tmp_path).read("scalar")
    data.unlink()
    with pytest.raises(ConversionError, match=r"__0_0.distcp: tensor scalar cannot be read \(.*No such file"):
        open_dist(tmp_path).read("scalar")
    (tmp_path / ".metadata").write_bytes(b"nonsense")
    with pytest.raises(ConversionError, match=r"\.metadata: not a readable checkpoint index"):
        open_dist(tmp_path)


class Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (Path(self.target),)


def test_metadata_cannot_run_code(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "pwned")))
    with pytest.raises(ConversionError, match="does not belong in it"):
        open_dist(tmp_path)
    assert not (tmp_path / "pwned").exists()
