"""megatron-core's torch_dist format, written so that it ends well: when a rank fails, the disk is full or hangs, in the
background too."""

import queue
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.base import StrategyAction, register_default_strategy
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from bridge import parallel
from bridge.checkpoint import checksums
from bridge.checkpoint.agree import FAILURES, any_rank, on_main, reason
from bridge.checkpoint.checksums import Checksum
from bridge.checkpoint.content import METADATA
from bridge.checkpoint.optimizer_state import PREFIX
from bridge.checkpoint.writers import Writer, Writers, copy_tensors

AGREE_SECONDS = 1.0  # between two questions to all ranks, while they wait for their writers


class Writing:
    """One checkpoint on its way into `directory`, which is empty. Writing begins with this object, in threads.

    in_background: the caller goes on with its work, and calls `wait_for_copies` before it updates the weights.
    write_timeout: how long a writer may get no further, as 30m. All ranks call the same, except for `abandon`.
    """

    def __init__(
        self,
        state: dict[str, Any],
        directory: Path,
        *,
        in_background: bool = False,
        write_timeout: str | None = None,
    ) -> None:
        self._directory, self._strategy = directory, _Strategy()
        self._failure: BaseException | None = None
        self._writers = Writers(timeout=write_timeout)
        request = dist_checkpointing.save(
            state, str(directory), sharded_strategy=self._strategy, async_sharded_save=True, content_metadata=METADATA
        )
        # The last of megatron-core's own steps writes metadata.json on rank 0 alone; `finish` does it for all ranks.
        self._collect_results = request.finalize_fns[:-1]
        try:
            self._writers.start(self._strategy.writers(request, in_background))
        except FAILURES as error:  # of this rank alone, as a lack of memory: the others learn of it in `finish`
            self._failure = error

    def wait_for_copies(self) -> None:
        """Wait until the writers read no weights and no optimizer state any more, only their copies."""
        self._writers.wait_for_copies()

    def is_done(self) -> bool:
        """Whether the writers of all ranks have ended or are given up."""
        return not any_rank(self._writers.busy())

    def wait(self) -> None:
        """Wait until it `is_done`. No rank stands in a collective for long meanwhile: those have a time limit, too."""
        while not self.is_done():
            self._writers.wait(AGREE_SECONDS)

    def finish(self) -> dict[str, Checksum]:
        """When it `is_done`: write .metadata, metadata.json and checksums.json.

        Returns the checksums of the files that the writers have flushed to disk. Raises on all ranks when one failed.
        """
        own: dict[str, Checksum] = {}
        try:
            if self._failure is not None:
                raise self._failure
            written = self._writers.written()
            own = {file.name: file.checksum for file in written}
            self._strategy.results.put({number: file.results for number, file in enumerate(written)})
        except FAILURES as error:
            self._strategy.results.put(RuntimeError(reason(error)))
        for collect in self._collect_results:
            collect()
        flushed = {name: checksum for part in parallel.all_gather(own) for name, checksum in part.items()}
        on_main(partial(self._strategy.complete, self._directory, flushed))
        return flushed

    def abandon(self) -> None:
        """End this rank's writers; the checkpoint stays unfinished."""
        self._writers.abandon()


class _Strategy(TorchDistSaveShardedStrategy):
    """Lays out one checkpoint. results: where megatron-core looks for what became of this rank's files."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)
        self.results: Any = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._updated: set[int] = set()  # storages on the CPU that only an optimizer step changes
        self._others: set[int] = set()  # storages on the CPU that anything may change

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Path) -> AsyncRequest:
        filesystem_async._results_queue = self.results  # else megatron-core starts a server process for 2 s
        for value in nested_values(sharded_state_dict):
            if isinstance(value, ShardedTensor) and value.data is not None and value.data.is_cpu:
                is_updated = isinstance(value.data, torch.nn.Parameter) or value.key.startswith(PREFIX)
                storages = self._updated if is_updated else self._others
                storages.add(value.data.untyped_storage().data_ptr())
        return super().async_save(sharded_state_dict, checkpoint_dir)

    def writers(self, request: AsyncRequest, in_background: bool) -> list[Writer]:
        """What writes this rank's share, a file each. What is on a GPU is copied to the host here.

        in_background: so is what shares its memory with the model and may change before an optimizer step does; the
        rest is copied by the writers, while the next forward and backward pass run.
        """
        if request.async_fn is None:  # nothing to write on this rank
            return []
        transforms, use_msc = request.async_fn.args
        buckets = request.preload_fn()
        for _, _, contents in request.async_fn_args[1]:  # megatron-core keeps them until the save is done
            contents[1].clear()
        if in_background:
            for bucket in buckets:
                copy_tensors(bucket, self._others - self._updated)
        to_copy = frozenset(self._updated if in_background else ())
        return [Writer(bucket, to_copy=to_copy, transforms=transforms, use_msc=use_msc) for bucket in buckets]

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
        finish = writer.finish

        def finish_or_note(*arguments: Any) -> None:
            try:
                finish(*arguments)
            except FAILURES as error:  # on rank 0; raised from here it would leave the others in a broadcast
                self._failure = error

        writer.finish = finish_or_note
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)

    def complete(self, directory: Path, flushed: dict[str, Checksum]) -> None:
        """Rank 0: write metadata.json and checksums.json; the files of all ranks lie in `directory`."""
        if self._failure is not None:
            raise self._failure
        save_config(CheckpointingConfig(self.backend, self.version), str(directory))
        own = {file.name: checksums.of_file(file) for file in directory.iterdir() if file.name not in flushed}
        checksums.write(directory, flushed | own)


class _CommonFile(TorchCommonSaveStrategy):
    """common.pt, written by rank 0; its failure reaches the ranks that would wait for rank 0 in the next collective."""

    def save_common(self, common_state_dict: Any, checkpoint_dir: str | Path) -> None:
        on_main(partial(super().save_common, common_state_dict, checkpoint_dir))


register_default_strategy(StrategyAction.SAVE_COMMON, "torch", 1, _CommonFile("torch", 1))
