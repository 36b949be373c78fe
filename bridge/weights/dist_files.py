"""torch_dist checkpoint folders as streams of whole tensors, without a process group or a model.

The format is torch.distributed.checkpoint's, as megatron-core 0.16 writes it: `.metadata` is a pickled `Metadata` whose
`storage_data` says where each chunk lies (file, offset, length), each chunk being one `torch.save`d tensor; `common.pt`
holds unsharded objects; `metadata.json` names the backends and is written last. A folder written by many ranks has many
files and chunks; here its tensors are put together one at a time.
"""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from bridge.errors import ConversionError, DamagedError
from bridge.weights import names, pages
from bridge.weights.spec import TensorSpec

ALIGNMENT = 64  # of chunks; torch.save aligns within them, so that tensors can be mapped as they are
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
DCP_VERSION = "1.0.0"
# What megatron-core's own scripts ask of a checkpoint before they load its tensors: content_metadata is what they hand
# to `sharded_state_dict` (layers under keys of their own), and the order of rows in linear_qkv is that of version 3.
COMMON = {"content_metadata": {"non_homogeneous_layers": True}, "checkpoint_version": 3.0, "iteration": 0}


class StoredChunk(NamedTuple):
    """One saved piece of a tensor and its place in the whole."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    storage: Any  # torch's _StorageInfo: relative_path, offset, length
    entry: tuple[int, ...] = ()  # which entry of the saved piece this is, along its first dims

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(offset + size for offset, size in zip(self.offsets, self.sizes, strict=True))


class StoredTensor(NamedTuple):
    spec: TensorSpec
    chunks: tuple[StoredChunk, ...]


@dataclass(frozen=True)
class DistFiles:
    """The tensors of one torch_dist folder, by checkpoint key."""

    directory: Path
    tensors: Mapping[str, StoredTensor]

    def spec(self, key: str) -> TensorSpec:
        return self.stored(key).spec

    def stored(self, key: str) -> StoredTensor:
        """What is stored under a key, or for an entry `key[3]` of a stacked tensor."""
        if key in self.tensors:  # entries may be stored one by one
            return self.tensors[key]
        base, index = names.split_index(key)
        stored = self.tensors[base]
        for number in index:
            stored = _entry(stored, number)
        return stored

    def read(self, key: str, place: tuple[slice, ...] | None = None) -> Tensor:
        """The whole tensor on the CPU, or the part of it at `place` (cut where it reaches beyond), from its chunks.

        Only chunks that touch the part are read. Raises ConversionError naming file and key.
        """
        spec, chunks = self.stored(key)
        place = place or tuple(slice(0, size) for size in spec.shape)
        ends = tuple(min(cut.stop, size) for cut, size in zip(place, spec.shape, strict=True))
        starts = tuple(min(cut.start, end) for cut, end in zip(place, ends, strict=True))
        if len(chunks) == 1:
            return self._read_chunk(key, chunks[0])[_box(starts, ends)]
        part = torch.empty([end - start for start, end in zip(starts, ends, strict=True)], dtype=spec.dtype)
        for chunk in chunks:
            low = [max(pair) for pair in zip(starts, chunk.offsets, strict=True)]
            high = [min(pair) for pair in zip(ends, chunk.ends, strict=True)]
            if all(first < last for first, last in zip(low, high, strict=True)):
                piece = self._read_chunk(key, chunk)[_box(low, high, origin=chunk.offsets)]
                part[_box(low, high, origin=starts)] = piece
        return part

    def _read_chunk(self, key: str, chunk: StoredChunk) -> Tensor:
        """The saved tensor is described without its elements, which are then mapped from where they lie."""
        file = self.directory / chunk.storage.relative_path
        try:
            with file.open("rb") as stream:
                view = _create_file_view(stream, chunk.storage.offset, chunk.storage.length)
                saved = torch.load(cast(IO[bytes], view), map_location="meta", weights_only=True)
            if isinstance(saved, Tensor):
                saved = _mapped(saved, file, chunk.storage.offset)
        except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DamagedError(f"{file}: tensor {key} cannot be read ({reason}); the file is damaged") from error
        if not isinstance(saved, Tensor) or tuple(saved[chunk.entry].shape) != chunk.sizes:
            raise DamagedError(
                f"{file}: the data of {key} at {chunk.offsets} does not match .metadata; the file is damaged"
            )
        return saved[chunk.entry]


def open_dist(directory: str | Path) -> DistFiles:
    """Read a folder's `.metadata`. Raises ConversionError when it is damaged or a tensor's chunks do not cover it."""
    directory = Path(directory)
    metadata = _read_metadata(directory / ".metadata")
    tensors = {}
    for key, value in metadata.state_dict_metadata.items():
        if isinstance(value, TensorStorageMetadata):
            spec = TensorSpec(value.properties.dtype, tuple(value.size))
            chunks = []
            for chunk in value.chunks:
                storage = metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
                if storage is None:
                    raise ConversionError(f"{directory}: .metadata does not say where {key} at {chunk.offsets} lies")
                chunks.append(StoredChunk(tuple(chunk.offsets), tuple(chunk.sizes), storage))
            if sum(torch.Size(chunk.sizes).numel() for chunk in chunks) != torch.Size(spec.shape).numel():
                raise ConversionError(f"{directory}: the chunks of {key} do not add up to its shape {spec.shape}")
            tensors[key] = StoredTensor(spec, tuple(chunks))
    return DistFiles(directory, tensors)


def stored_keys(directory: str | Path) -> frozenset[str]:
    """Keys of the tensors and objects of a folder. Raises ConversionError when its `.metadata` is damaged."""
    return frozenset(_read_metadata(Path(directory) / ".metadata").state_dict_metadata)


class StoredObject(NamedTuple):
    """A pickled object between the tensors of a data file: `length` bytes at `offset`."""

    key: str
    file: Path
    offset: int
    length: int


def stored_objects(directory: str | Path) -> list[StoredObject]:
    """The objects of a folder, by key; none is read. Raises ConversionError as `open_dist`, and when a part of the
    checkpoint is said to lie outside the folder."""
    index = Path(directory) / ".metadata"
    metadata = _read_metadata(index)
    found = []
    for place, storage in metadata.storage_data.items():
        file = index.parent / storage.relative_path
        if file.parent != index.parent:
            raise ConversionError(f"{index}: {place.fqn} lies outside the directory ({storage.relative_path}); refused")
        if isinstance(metadata.state_dict_metadata.get(place.fqn), BytesStorageMetadata):
            found.append(StoredObject(place.fqn, file, storage.offset, storage.length))
    return sorted(found)


class Written(NamedTuple):
    """What was appended to a data file: a tensor's chunk, or with no dtype an object."""

    key: str
    dtype: torch.dtype | None
    chunk: StoredChunk


class DataFile:
    """One file of chunks in a folder that is being written. Each thread that writes has one, by `number`."""

    def __init__(self, directory: Path, number: int) -> None:
        self._path = directory / f"__{number}_0.distcp"

    def __enter__(self) -> "DataFile":
        self._path.unlink(missing_ok=True)  # a file someone has mapped must not shrink
        self._stream = self._path.open("wb")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with suppress(OSError) if kind else nullcontext():  # on a full disk closing fails for the same reason
            self._stream.close()

    def write(self, key: str, tensor: Tensor) -> Written:
        """Append one tensor, or one entry (`key[3]`) of a stack. Raises ConversionError when the disk is full."""
        base, index = names.split_index(key)
        tensor = tensor.detach().cpu().contiguous().view((1,) * len(index) + tensor.shape)
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # torch.save writes the whole storage behind a view
        start = torch.Size([*index, *[0] * (tensor.ndim - len(index))])
        return Written(base, tensor.dtype, StoredChunk(start, tensor.shape, self._append(key, tensor)))

    def remove_if_empty(self) -> None:
        if not self._path.stat().st_size:
            self._path.unlink()

    def write_empty_object(self, key: str) -> Written:
        """Append None under the unique key of a megatron-core ShardedObject, such as a layer's `_extra_state`."""
        return Written(key, None, StoredChunk((), (), self._append(key, [None])))

    def _append(self, key: str, value: object) -> _StorageInfo:
        try:
            begin = self._stream.seek(-self._stream.tell() % ALIGNMENT, os.SEEK_CUR)
            torch.save(value, self._stream)
            self._stream.flush()
        except (OSError, RuntimeError) as error:
            reason = system_reason(error)
            if reason is None:
                raise
            raise ConversionError(f"{self._path}: tensor {key} cannot be written ({reason})") from error
        return _StorageInfo(self._path.name, begin, self._stream.tell() - begin)


class DistWriter:
    """Writes whole tensors one at a time into a new torch_dist folder, readable once the `with` block ended well.

    Other threads write into DataFiles of their own, and what they have written is added here.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._objects: dict[str, BytesStorageMetadata] = {}
        self._chunks: dict[str, list[ChunkStorageMetadata]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        self.file = DataFile(self._directory, 0)

    def __enter__(self) -> "DistWriter":
        self.file.__enter__()
        return self

    def write(self, key: str, tensor: Tensor) -> None:
        """Append one tensor, or one entry (`key[3]`) of a stack that is complete in the end, under its key."""
        self.add(self.file.write(key, tensor))

    def write_empty_object(self, key: str) -> None:
        """Append None under the unique key of a megatron-core ShardedObject, such as a layer's `_extra_state`."""
        self.add(self.file.write_empty_object(key))

    def add(self, written: Written) -> None:
        """Enter what a DataFile of this folder has appended into the index."""
        key, dtype, chunk = written
        if dtype is None:
            self._objects[key] = BytesStorageMetadata()
            self._storage[MetadataIndex(key)] = chunk.storage
            return
        place = MetadataIndex(key, torch.Size(chunk.offsets))
        assert place not in self._storage, (key, chunk.offsets)
        assert self._dtypes.setdefault(key, dtype) == dtype, key
        self._storage[place] = chunk.storage
        self._chunks.setdefault(key, []).append(
            ChunkStorageMetadata(offsets=torch.Size(chunk.offsets), sizes=torch.Size(chunk.sizes))
        )

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self.file.__exit__(kind)
        if kind is None:
            self.file.remove_if_empty()
            self._finish()

    def _finish(self) -> None:
        metadata = Metadata(
            state_dict_metadata={**{key: self._tensor(key) for key in self._chunks}, **self._objects},
            planner_data={},
            storage_data=self._storage,
            storage_meta=StorageMeta(),
            version=DCP_VERSION,
        )
        with (self._directory / ".metadata").open("wb") as stream:
            pickle.dump(metadata, stream)
        torch.save(COMMON, self._directory / "common.pt")
        (self._directory / "metadata.json").write_text(json.dumps(FORMAT), encoding="utf-8")

    def _tensor(self, key: str) -> TensorStorageMetadata:
        chunks = self._chunks[key]
        ends = [map(sum, zip(chunk.offsets, chunk.sizes, strict=True)) for chunk in chunks]
        size = torch.Size(map(max, zip(*ends, strict=True)) if chunks[0].offsets else [])
        assert sum(chunk.sizes.numel() for chunk in chunks) == size.numel(), f"{key}: entries are missing"
        return TensorStorageMetadata(TensorProperties(dtype=self._dtypes[key]), size, chunks)


def _entry(stored: StoredTensor, number: int) -> StoredTensor:
    """Entry `number` along dim 0 of a stored tensor, from the chunks that hold it."""
    chunks = tuple(
        StoredChunk(chunk.offsets[1:], chunk.sizes[1:], chunk.storage, (*chunk.entry, number - chunk.offsets[0]))
        for chunk in stored.chunks
        if chunk.offsets[0] <= number < chunk.ends[0]
    )
    return StoredTensor(TensorSpec(stored.spec.dtype, stored.spec.shape[1:]), chunks)


def _mapped(saved: Tensor, file: Path, start: int) -> Tensor:
    """The tensor that torch.load described on the meta device, mapped from the chunk that begins at `start`."""
    storage: Any = saved.untyped_storage()
    flat = TensorSpec(saved.dtype, (storage.nbytes() // saved.dtype.itemsize,))
    data = pages.mapped(file, start + storage._checkpoint_offset, flat)
    return data.as_strided(saved.shape, saved.stride(), saved.storage_offset())


def system_reason(error: BaseException) -> str | None:
    """Why the system refused: torch.save hides the OSError of the stream it writes to behind one of its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause.strerror if isinstance(cause, OSError) else None


def _box(low: Sequence[int], high: Sequence[int], *, origin: Sequence[int] | None = None) -> tuple[slice, ...]:
    shift = origin or (0,) * len(low)
    return tuple(slice(first - by, last - by) for first, last, by in zip(low, high, shift, strict=True))


_DCP = "torch.distributed.checkpoint."
_METADATA_CLASSES = {
    _DCP + "metadata": (
        "Metadata MetadataIndex StorageMeta TensorProperties TensorStorageMetadata BytesStorageMetadata "
        "ChunkStorageMetadata _MEM_FORMAT_ENCODING"
    ),
    _DCP + "filesystem": "_StorageInfo _StoragePrefix",
    _DCP + "planner": "SavePlan WriteItem WriteItemType TensorWriteData",
    "megatron.core.dist_checkpointing.strategies.torch": "MCoreMetadata MCoreSavePlan",
    "torch": "Size",
    "torch.serialization": "_get_layout",
    "collections": "OrderedDict",
    "builtins": "set slice",
    "pathlib": "PosixPath",
}


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles nothing but what `.metadata` is made of: a checkpoint must not be able to run code."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in _METADATA_CLASSES.get(module, "").split():
            return super().find_class(module, name)
        raise _RefusedError(f"{module}.{name} does not belong in it; loading it could run code, the file is refused")


class _RefusedError(Exception):
    pass


def _read_metadata(file: Path) -> Metadata:
    try:
        metadata = _MetadataUnpickler(io.BytesIO(file.read_bytes())).load()
    except OSError as error:
        raise DamagedError(f"{file}: cannot be read ({error.strerror})") from error
    except _RefusedError as error:
        raise ConversionError(f"{file}: not a checkpoint index ({error})") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise DamagedError(f"{file}: not a readable checkpoint index ({error})") from error
    if not isinstance(metadata, Metadata):
        raise DamagedError(f"{file}: not a checkpoint index")
    return metadata
