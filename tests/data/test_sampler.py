"""The order of samples is a function of seed and position alone."""

import itertools

import numpy
import pytest

from bridge.config.schema import Train
from bridge.data import sampler


def test_each_epoch_holds_every_sample_once_in_its_own_order() -> None:
    ids = sampler.sample_ids(0, 30, size=10, seed=7)
    epochs = [ids[start : start + 10] for start in (0, 10, 20)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert ids != sampler.sample_ids(0, 30, size=10, seed=8)


@pytest.mark.parametrize("cut", [1, 9, 10, 11, 25])
def test_reading_on_after_a_cut_is_the_same_sequence(cut: int) -> None:
    whole = sampler.sample_ids(0, 30, size=10, seed=7)
    parts = sampler.sample_ids(0, cut, size=10, seed=7) + sampler.sample_ids(cut, 30 - cut, size=10, seed=7)
    assert parts == whole


@pytest.mark.parametrize(("num_ranks", "micro_batch_size"), [(1, 4), (1, 1), (2, 2), (2, 1), (4, 1)])
def test_ranks_share_out_the_global_batch(num_ranks: int, micro_batch_size: int) -> None:
    ids = list(range(100, 108))
    by_rank = [
        sampler.rank_micro_batches(ids, micro_batch_size=micro_batch_size, rank=rank, num_ranks=num_ranks)
        for rank in range(num_ranks)
    ]
    in_order = itertools.chain.from_iterable(zip(*by_rank, strict=True))
    assert [index for batch in in_order for index in batch] == ids


def test_ramp_up_grows_the_batch_and_reads_on_from_any_point() -> None:
    from bridge.training.batches import batch_size_at

    # 8 samples at 2, 8 at 4, 8 at 6 (24 / 3 increments of 2), then 8: megatron-core's --rampup-batch-size 2 2 24.
    train = Train(global_batch_size=8, micro_batch_size=1, rampup_batch_size=[2, 2, 24])
    size_at = batch_size_at(train, data_parallel_size=2)
    sizes, consumed = [], 0
    while consumed < 50:
        sizes.append(size_at(consumed))
        consumed += sizes[-1]
    assert sizes == [2, 2, 2, 2, 4, 4, 6, 6, 8, 8, 8]

    def batches(consumed: int) -> sampler.TrainingBatches:
        return sampler.TrainingBatches(
            size=10, seed=1, consumed=consumed, batch_size_at=size_at, micro_batch_size=1, rank=0, num_ranks=2
        )

    whole = list(itertools.islice(batches(0), 20))
    resumed = list(itertools.islice(batches(12), 14))  # after 8 + 4 samples, of which this rank read 6
    assert resumed == whole[6:]


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 1000])
def test_every_size_is_permuted_whole(size: int) -> None:
    assert sorted(sampler.sample_ids(5 * size, size, size=size, seed=3)) == list(range(size))


def test_order_looks_random() -> None:
    size = 10_000
    places = numpy.arange(size)
    epochs = [numpy.array(sampler.sample_ids(epoch * size, size, size=size, seed=1)) for epoch in (0, 1)]
    for other in (places, epochs[1]):  # correlation of independent orders: 0 with a standard error of 0.01
        assert abs(numpy.corrcoef(epochs[0], other)[0, 1]) < 0.05
    assert abs(numpy.corrcoef(epochs[0][:-1], epochs[0][1:])[0, 1]) < 0.05
    assert (epochs[0] == epochs[1]).sum() < 8  # one on average
