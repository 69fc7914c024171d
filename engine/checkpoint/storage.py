"""Writes and reads the tensors of a checkpoint folder, in megatron-core's dist_checkpointing format.

Saving is three steps, so that the long middle one can run in the background: ``plan_save`` agrees on who writes what,
``PlannedSave.write`` puts this rank's file on disk, ``PlannedSave.write_index`` ends it on the main rank. The folder is
the one that ``dist_checkpointing.save`` would leave; its writer is not used (megatron-core 0.16.1) because it forks the
training process, starts a server process that outlives a killed rank, and waits for ever when one rank alone meets a
full disk. Loading is megatron-core's planning and placing over readers of ours, because its own unpickle ``.metadata``,
``common.pt`` and the objects among the tensors (random generators, scales of float8).
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig, CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, WriteItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.storage import WriteResult

from reflectron.engine.checkpoint.training_state import TrainingState
from reflectron.engine.files import printable
from reflectron.engine.weights.dist_metadata import CONTENT
from reflectron.engine.weights.dist_reader import DistReader
from reflectron.engine.weights.inert_pickle import ForeignPickle
from reflectron.engine.weights.torch_file import read_torch_file
from reflectron.engine.weights.writers import write_dist_index

# A limit for `common.pt` and `metadata.json`, which hold a few settings.
_MOST_BYTES = 16 << 20


class _SavePlanner(MCoreSavePlanner):
    """Hands out copies of the tensors where ``stage`` has made them."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False)
        self._copies: dict[Any, torch.Tensor] = {}

    def stage(self, plan: SavePlan) -> None:
        """Copy the tensors that ``plan`` writes to the CPU; objects are bytes already."""
        for item in plan.items:
            if item.tensor_data is not None:
                self._copies[item.index] = super().resolve_data(item).detach().to("cpu", copy=True)

    def resolve_data(self, write_item: WriteItem) -> Any:
        """Return what ``write_item`` writes: a tensor or a buffer."""
        # Popped: memory is given back while the file grows.
        staged = self._copies.pop(write_item.index, None)
        return super().resolve_data(write_item) if staged is None else staged


@dataclass(frozen=True)
class PlannedSave:
    """One rank's part in writing a checkpoint."""

    folder: Path
    """Exists when ``write`` is called."""
    writer: FileSystemWriter
    planner: _SavePlanner
    plan: SavePlan
    """What this rank writes."""
    metadata: Metadata | None
    """Where every rank's tensors lie in the whole ones; on the main rank."""
    common: dict[str, Any]
    """What all ranks share."""

    @property
    def bytes(self) -> int:
        """Bytes of this rank's tensors."""
        parts = [item.tensor_data for item in self.plan.items if item.tensor_data is not None]
        return sum(part.chunk.sizes.numel() * part.properties.dtype.itemsize for part in parts)

    def write(self) -> list[WriteResult]:
        """Write this rank's file and sync it; no collectives, so it may run in a thread.

        Raises:
            OSError, RuntimeError: when it cannot be written.
        """
        return self.writer.write_data(self.plan, self.planner).wait() if self.plan.items else []

    def write_index(self, results: list[list[WriteResult]]) -> None:
        """Make the folder complete for ``dist_checkpointing.load``, on the main rank after all ranks' ``results``.

        Raises:
            OSError, RuntimeError: when it cannot be written.
        """
        assert self.metadata is not None, "the main rank has the plans"
        write_dist_index(self.writer, self.folder, self.metadata, results, self.common)


def plan_save(state: TrainingState, folder: Path, *, copy: bool) -> PlannedSave:
    """Share out the writing of ``state``; every rank calls it, nothing is written yet.

    Args:
        folder: where it will be written.
        copy: copy this rank's tensors now, so that training may continue before they are on disk.
    """
    sharded, common = save_preprocess(state.sharded_state(loading=False, rng=True) | {"content_metadata": CONTENT})
    flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    planner, rank = _SavePlanner(), dist.get_rank()
    planner.set_up_planner(mcore_to_pyt_state_dict(flat), is_coordinator=rank == 0)
    plan = planner.create_local_plan()
    plans: list[SavePlan] | None = [plan] * dist.get_world_size() if rank == 0 else None
    dist.gather_object(plan, plans)
    if copy:
        planner.stage(plan)
    return PlannedSave(
        folder=folder,
        # One thread: torch 2.13 loses an exception of any other.
        writer=FileSystemWriter(folder, thread_count=1),
        planner=planner,
        plan=replace(plan, storage_data=_StoragePrefix(f"__{rank}_")),
        metadata=planner.create_global_plan(plans)[1] if plans else None,
        common=common,
    )


def load(state: TrainingState, folder: Path, *, updates: int, same_layout: bool) -> None:
    """Read a checkpoint into ``state``, whatever layout wrote it; every rank calls it.

    Args:
        folder: a checkpoint whose files are known to be intact.
        updates: of the weights before it, which optimizers count.
        same_layout: as many ranks in the same places wrote it, so that random generators continue, too.

    Raises:
        ValueError: in one line, when a tensor is missing, has another shape or is none.
    """
    wanted = state.sharded_state(loading=True, rng=same_layout)
    state.restore(load_checkpoint(wanted, folder), updates)


def load_checkpoint(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Load as ``dist_checkpointing.load`` does, without what it unpickles; every rank calls it.

    Args:
        wanted: descriptions of all tensors and objects that are read.
        folder: a checkpoint of any layout.

    Returns:
        The same with tensors and plain data in their places.

    Raises:
        ValueError: in one line, when something is missing, of another shape, damaged, or no plain data.
    """
    _check_format(folder / CONFIG_FNAME)
    _read_common(folder / COMMON_STATE_FNAME)
    strategy = _Strategy(DistReader(folder))
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(
            wanted, str(folder), strategy, _NothingInCommon(), strict=StrictHandling.RAISE_UNEXPECTED
        )
    except CheckpointException as error:
        # Every rank gets what any of them met, each with a traceback.
        failure = next(iter(error.failures.values()))[0]
        raise ValueError(f"{folder} cannot be loaded: {_said(failure)}") from None
    except CheckpointingException as error:
        raise ValueError(f"{folder} cannot be loaded: {_said(error)}") from None
    return loaded


def _said(error: BaseException) -> str:
    return printable(error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")


def _check_format(path: Path) -> None:
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_MOST_BYTES))
        config = CheckpointingConfig(**content)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; copy the folder again") from None
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{path} is damaged, expected what megatron-core's dist_checkpointing writes") from None
    if config != CheckpointingConfig("torch_dist", 1):
        raise ValueError(f"{path} names {printable(config, 200)}, expected sharded_backend 'torch_dist' of version 1")


def _read_common(path: Path) -> None:
    """See that what all ranks share is there and plain; a run's own needs nothing of it."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ForeignPickle(f"it has {path.stat().st_size} bytes, expected at most {_MOST_BYTES}")
        with path.open("rb") as file:
            if not isinstance(read_torch_file(file), dict):
                raise ForeignPickle("it holds no dictionary")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; copy the folder again") from None
    except ForeignPickle as error:
        raise ValueError(f"{path} cannot be read: {error}; expected a checkpoint of a run of this project") from None


class _NothingInCommon(TorchCommonLoadStrategy):
    def load_common(self, checkpoint_dir: Any) -> dict[str, Any]:
        return {}


class _Strategy(TorchDistLoadShardedStrategy):
    """megatron-core 0.16.1's, which makes its own reader and planner where this one uses ours."""

    def __init__(self, reader: DistReader) -> None:
        super().__init__()
        self.reader = reader

    def load(self, sharded_state_dict: Any, checkpoint_dir: Any) -> Any:
        """Return tensors and objects in the places of their descriptions."""
        tensors = [part for part in nested_values(sharded_state_dict) if isinstance(part, ShardedTensor)]
        keyed, flat, renamed = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        state = mcore_to_pyt_state_dict(keyed, True)
        _load_state_dict(state, self.reader, planner=_planner(tensors))
        unwrapped = {key: _unwrap_pyt_sharded_tensor(value) for key, value in state.items()}
        loaded = _replace_sharded_keys_with_state_dict_keys(unwrapped, flat, renamed)
        _restore_dict_types(loaded, sharded_state_dict)
        return loaded

    def load_tensors_metadata(self, checkpoint_dir: Any, metadata: Metadata | None = None) -> Any:
        """Return the descriptions of the tensors in the folder."""
        return super().load_tensors_metadata(checkpoint_dir, metadata or self.reader.read_metadata())

    def load_sharded_metadata(self, checkpoint_dir: Any) -> Any:
        """Return the descriptions of all that is in the folder."""
        stored = self.reader.read_metadata().state_dict_metadata
        objects = [key for key, value in stored.items() if not isinstance(value, TensorStorageMetadata)]
        described = [ShardedObject.empty_from_unique_key(key) for key in objects]
        return {item.unique_key: item for item in described} | self.load_tensors_metadata(checkpoint_dir)


def _planner(tensors: list[ShardedTensor]) -> _LoadPlanner:
    lenient = {tensor.key: tensor for tensor in tensors if tensor.allow_shape_mismatch}
    return _LoadPlanner(
        shapes_validation_sharded_tensors=[tensor for tensor in tensors if not tensor.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors=lenient,
    )


class _LoadPlanner(MCoreLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], read_torch_file(value))
