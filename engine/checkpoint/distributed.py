"""Writes and reads the tensors of a checkpoint folder, in megatron-core's dist_checkpointing format.

Saving is three steps, so that the long middle one can run in the background: ``plan_save`` agrees on who writes what,
``PlannedSave.write`` puts this rank's file on disk, ``PlannedSave.write_index`` ends it on the main rank. The folder is
the one that ``dist_checkpointing.save`` would leave; its writer is not used (megatron-core 0.16.1) because it forks the
training process, starts a server process that outlives a killed rank, and waits for ever when one rank alone meets a
full disk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from reflectron.engine.checkpoint.dist_load import load_checkpoint
from reflectron.engine.checkpoint.training_state import CONTENT, TrainingState


class _Planner(MCoreSavePlanner):
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
        """What ``write_item`` writes: a tensor or a buffer."""
        # Popped: memory is given back while the file grows.
        staged = self._copies.pop(write_item.index, None)
        return super().resolve_data(write_item) if staged is None else staged


@dataclass(frozen=True)
class PlannedSave:
    """One rank's part in writing a checkpoint."""

    folder: Path
    """Exists when ``write`` is called."""
    writer: FileSystemWriter
    planner: _Planner
    plan: SavePlan
    """What this rank writes."""
    metadata: Metadata | None
    """Where every rank's tensors lie in the whole ones; on the main rank."""
    common: dict[str, Any]
    """What all ranks share."""

    @property
    def bytes(self) -> int:
        """Of this rank's tensors."""
        parts = [item.tensor_data for item in self.plan.items if item.tensor_data is not None]
        return sum(part.chunk.sizes.numel() * part.properties.dtype.itemsize for part in parts)

    def write(self) -> list[WriteResult]:
        """Write this rank's file and sync it; no collectives, so it may run in a thread.

        Raises:
            OSError, RuntimeError: when it cannot be written.
        """
        return self.writer.write_data(self.plan, self.planner).wait() if self.plan.items else []

    def write_index(self, results: list[list[WriteResult]]) -> None:
        """On the main rank, after all ranks' ``results``: make the folder complete for ``dist_checkpointing.load``.

        Raises:
            OSError, RuntimeError: when it cannot be written.
        """
        assert self.metadata is not None, "the main rank has the plans"
        write_index(self.writer, self.folder, self.metadata, results, self.common)


def write_index(
    writer: FileSystemWriter,
    folder: Path,
    metadata: Metadata,
    results: list[list[WriteResult]],
    common: dict[str, Any],
) -> None:
    """Make ``folder`` complete for ``dist_checkpointing.load``.

    Args:
        writer: has written the tensors.
        metadata: where each part lies in the whole tensors.
        results: what was written, a list each call.
        common: what all ranks share.

    Raises:
        OSError, RuntimeError: when it cannot be written.
    """
    writer.finish(metadata, results)
    # Through a file of Python's, for torch's own says neither why nor where it could not write.
    with (folder / COMMON_STATE_FNAME).open("wb") as file:
        torch.save(common, file)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


def plan_save(state: TrainingState, folder: Path, *, copy: bool) -> PlannedSave:
    """Share out the writing of ``state``; every rank calls it, nothing is written yet.

    Args:
        folder: where it will be written.
        copy: copy this rank's tensors now, so that training may go on before they are on disk.
    """
    sharded, common = save_preprocess(state.sharded_state(loading=False, rng=True) | {"content_metadata": CONTENT})
    flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    planner, rank = _Planner(), dist.get_rank()
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
