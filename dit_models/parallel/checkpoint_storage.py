"""Our files behind ``torch.distributed.checkpoint``, which plans who writes and reads what.

Its storage writers and readers are public interfaces. Planning, resharding and telling every
process of another's failure are PyTorch's; the files, their hashes and the rename are ours.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from dit_models.atomic import fsync_path
from dit_models.checkpoints import (
    INDEX_NAME,
    MANIFEST_NAME,
    PLAIN_NAME,
    SHARDED_VERSION,
    write_manifest,
)
from dit_models.parallel.checkpoint_files import (
    Chunk,
    JoinedTensor,
    index_text,
    shard_name,
)
from dit_models.tensor_files import entry_of, stream_safetensors


def digests_of_plain(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of every tensor that is no ``DTensor``; by them processes compare what they hold."""
    digests = {}
    for name, value in tensors.items():
        if not isinstance(value, DTensor):
            digest = hashlib.sha256(repr((value.shape, value.dtype)).encode())
            for block in entry_of(value).blocks():
                digest.update(block)
            digests[name] = digest.hexdigest()
    return digests


class WrittenChunk(NamedTuple):
    """Where a chunk was written, and the SHA-256 of the whole file."""

    file: str
    sha256: str
    start: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class CheckpointStorageWriter(StorageWriter):
    """Writes a checkpoint under a temporary name, and renames it when every process has written.

    Args:
        target: the folder that is to appear.
        step: optimizer steps done.
        plain: JSON values, from process 0.
        digests: of the tensors that all processes should hold alike.

    Attributes:
        differing: in process 0, names of those that they do not hold alike.
    """

    def __init__(
        self, target: Path, step: int, plain: Mapping[str, Any], digests: Mapping[str, str]
    ) -> None:
        super().__init__()
        self.differing: list[str] = []
        self._digests = digests
        self._is_first = True
        self.target = target
        self.step = step
        self.plain = plain
        self.temporary = target.with_name(f".writing-{target.name}")

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Nothing is kept from one save to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:
        """Which process this is."""
        self._is_first = is_coordinator

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Leave out the empty parts of tensors, and what the first process writes for all.

        Of parts at the same offset PyTorch keeps one, as of copies; where an empty part begins is
        not defined.
        """
        items = [
            item
            for item in plan.items
            if (self._is_first or item.type != WriteItemType.TENSOR)
            and not _is_empty_part(_described(item))
        ]
        return replace(plan, items=items, storage_data=self._digests)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the folder, in process 0 before any process writes, and name each one's file."""
        self.differing = [
            name
            for name, digest in self._digests.items()
            if any(plan.storage_data[name] != digest for plan in plans)
        ]
        self.temporary.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir()
        return [replace(plan, storage_data=shard_name(rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's chunks, hashing what is written."""
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write_shard(plan, planner) if plan.items else [])
        return done

    def _write_shard(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        file: str = plan.storage_data
        if not self.temporary.is_dir():
            raise FileNotFoundError(
                f"{self.temporary}, which process 0 has made, is not there: processes on several "
                "machines need a folder that all of them see"
            )
        items = {item.index.fqn: item for item in plan.items}
        assert len(items) == len(plan.items), "two chunks of a tensor in one process"
        entries = {}
        for name, item in items.items():
            value = planner.resolve_data(item)
            assert isinstance(value, Tensor), f"{name} is no tensor"
            entries[name] = entry_of(value)
        boxes = {name: _described(item).chunk for name, item in items.items()}
        offsets = {name: {"saved_offsets": list(box.offsets)} for name, box in boxes.items()}
        digest = hashlib.sha256()
        with open(self.temporary / file, "wb") as stream:

            def write(block: Any) -> None:
                digest.update(block)
                stream.write(block)

            starts = stream_safetensors(
                write,
                entries,
                # As PyTorch's own safetensors storage names them.
                {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0"},
            )
            stream.flush()
            os.fsync(stream.fileno())
        sha256 = digest.hexdigest()
        return [
            WriteResult(
                item.index,
                entries[name].num_bytes,
                WrittenChunk(
                    file, sha256, starts[name], tuple(boxes[name].offsets), tuple(boxes[name].sizes)
                ),
            )
            for name, item in items.items()
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write index, plain values and manifest, in process 0 after all, and rename."""
        chunks: dict[str, list[dict[str, Any]]] = {}
        hashes = {}
        for result in (result for results_of_one in results for result in results_of_one):
            written: WrittenChunk = result.storage_data
            values = written._asdict()
            hashes[written.file] = values.pop("sha256")
            chunks.setdefault(result.index.fqn, []).append(values)
        tensors = {
            name: (tuple(value.size), value.properties.dtype)
            for name, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        texts = {
            INDEX_NAME: index_text(tensors, chunks),
            PLAIN_NAME: json.dumps(self.plain, indent=2) + "\n",
        }
        for name, text in texts.items():
            (self.temporary / name).write_text(text)
            hashes[name] = hashlib.sha256(text.encode()).hexdigest()
        write_manifest(self.temporary, SHARDED_VERSION, self.step, hashes)
        for name in (*texts, MANIFEST_NAME, "."):
            fsync_path(self.temporary / name)
        os.rename(self.temporary, self.target)
        fsync_path(self.target.parent)

    def remove_unfinished(self) -> None:
        """Remove what was written, after a failure."""
        shutil.rmtree(self.temporary, ignore_errors=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """Any path of a file system."""
        return "://" not in str(checkpoint_id)


def _described(item: WriteItem) -> TensorWriteData:
    assert item.tensor_data is not None, f"{item.index.fqn} is no tensor"
    return item.tensor_data


def _is_empty_part(data: TensorWriteData) -> bool:
    return math.prod(data.chunk.sizes) == 0 and math.prod(data.size) > 0


class JoinedTensorReader(StorageReader):
    """Reads tensors that are in chunks, wherever the chunks are."""

    def __init__(self, tensors: Mapping[str, JoinedTensor]) -> None:
        super().__init__()
        self._tensors = tensors
        self._chunks: dict[MetadataIndex, Chunk] = {}

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Nothing is kept from one load to the next."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """What is stored, as PyTorch's planner wants to know it."""
        described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
            name: TensorStorageMetadata(
                TensorProperties(dtype=tensor.dtype),
                torch.Size(tensor.shape),
                [
                    ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
                    for chunk in tensor.chunks
                ],
            )
            for name, tensor in self._tensors.items()
        }
        self._chunks = {
            MetadataIndex(name, chunk.offsets): chunk
            for name, tensor in self._tensors.items()
            for chunk in tensor.chunks
            if all(chunk.sizes)
        }
        return Metadata(described)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any
    ) -> None:
        """Nothing to prepare."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """A process's plan, as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """All plans, as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what this process needs, a part of a chunk after the other."""
        for request in plan.items:
            chunk = self._chunks[request.storage_index]
            target = planner.resolve_tensor(request).detach()
            target.copy_(_region(chunk, request.storage_offsets, request.lengths))
            planner.commit_tensor(request, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """Any path of a file system."""
        return "://" not in str(checkpoint_id)


def _region(chunk: Chunk, offsets: torch.Size, lengths: torch.Size) -> Tensor:
    if not chunk.sizes:
        return chunk.rows(0, 1)
    region = chunk.rows(offsets[0], offsets[0] + lengths[0])
    for dim in range(1, len(chunk.sizes)):
        region = region.narrow(dim, offsets[dim], lengths[dim])
    return region
