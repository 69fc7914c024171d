"""Model and optimizer as one sharded state dict that loads on any layout, and back from it.

Every tensor is described by its place in the whole tensor, never by the rank that holds it: parameters and AdamW's
moments under megatron-core's parameter names, Adafactor's averages whole under Hugging Face names. So a checkpoint does
not know how many ranks wrote it, whether optimizer state was sharded over replicas, or how far the vocabulary was
padded. Invariant: after ``restore`` the next step is bitwise the one that would have followed ``sharded_state``.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map, make_sharded_optimizer_tensor
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from reflectron.engine.model.architecture import Architecture
from reflectron.engine.model.gpt import PackedGPT
from reflectron.engine.model.hf_mapping import HfPiece, hf_pieces, tied_copy
from reflectron.engine.model.parallelize import gather_parameters
from reflectron.engine.optim.adafactor import Adafactor
from reflectron.engine.optim.optimizer import optimizer_parts
from reflectron.engine.parallel.process_groups import ParallelGroups, ParameterGroups
from reflectron.engine.weights.dist_metadata import CONTENT

_MOMENTS = ("exp_avg", "exp_avg_sq")
# What only transformer-engine's norms have in a state dict, and it is empty; linear layers have one with any parts.
_STATE_OF_NORM = "layernorm._extra_state"
# The dimension of a tensor along which each of Adafactor's averages runs.
_AVERAGE_DIM = {"exp_avg_sq_row": 0, "exp_avg_sq_col": 1, "exp_avg_sq": 0}

ShardedState = dict[str, Any]


@dataclass(frozen=True)
class TrainingState:
    """What a step changes, as one rank holds it."""

    chunks: Sequence[PackedGPT]
    """This rank's part of the model, without wrappers."""
    optimizer: MegatronOptimizer
    """The optimizer of its parameters."""
    arch: Architecture
    """Names and shapes of the Hugging Face tensors."""
    groups: ParallelGroups
    """Process groups."""

    def sharded_state(self, *, loading: bool, rng: bool) -> ShardedState:
        """Return the descriptions of every tensor of this rank; every rank calls it.

        Args:
            loading: the tensors' content does not matter, and sharded optimizer state is not gathered.
            rng: with the states of the random generators, which belong to a rank of this very layout.
        """
        if self._is_distributed:
            gather_parameters(self._parts[0].model_chunks)
        if not loading:
            self._begin_optimizer()
        metadata = CONTENT | {"dp_cp_group": self.groups.dp_cp}
        model = {
            _key(index): _without_states_of_norms(chunk.sharded_state_dict(metadata=metadata))
            for index, chunk in enumerate(self.chunks)
        }
        optimizer = self._distributed_state(model, loading) if self._is_distributed else self._plain_state(model)
        state = {"model": model, "optimizer": optimizer}
        return state | {"rng": _sharded_rng_state()} if rng else state

    def restore(self, loaded: ShardedState, updates: int) -> None:
        """Take over what was loaded into a ``sharded_state(loading=True)``; every rank calls it.

        Args:
            loaded: tensors in place of their descriptions.
            updates: of the weights before this state.
        """
        config = self.chunks[0].config
        with trusted_scales() if config.fp8 and config.fp8_recipe == "delayed" else nullcontext():
            for index, chunk in enumerate(self.chunks):
                missing, unexpected = chunk.load_state_dict(loaded["model"][_key(index)], strict=False)
                assert not unexpected, unexpected
                assert all(key.endswith(_STATE_OF_NORM) for key in missing), missing
        if self._is_distributed:
            self._restore_distributed(loaded["optimizer"])
        else:
            self._restore_plain(loaded["optimizer"])
        self._set_step(updates)
        if "rng" in loaded:
            _restore_rng_state(loaded["rng"])

    @property
    def _parts(self) -> Sequence[MegatronOptimizer]:
        return optimizer_parts(self.optimizer)

    @property
    def _kept_keys(self) -> tuple[str, ...]:
        """Tensors of a parameter's shape that are kept beside it; only a bfloat16 one has a main copy."""
        return ("param", *_MOMENTS) if self.chunks[0].config.bf16 else _MOMENTS

    @property
    def _is_distributed(self) -> bool:
        return isinstance(self._parts[0], DistributedOptimizer)

    def _initialize(self) -> list[torch.optim.Optimizer]:
        """Return torch's optimizer of each part, its state there as after a first step."""
        return [_initialized(part) for part in self._parts]

    def _initialized_states(self, *, factored: bool) -> dict[torch.Tensor, dict[str, Any]]:
        """Return the state of each main parameter that has Adafactor's averages, or of those that have moments."""
        return {
            parameter: state
            for inner in self._initialize()
            if isinstance(inner, Adafactor) == factored
            for parameter, state in inner.state.items()
        }

    def _begin_optimizer(self) -> None:
        """Give an optimizer that has not made an update yet the state from which its first one starts.

        So the steps so far may all have been skipped.
        """
        parts = self._torch_optimizers()
        if not any(part.state[p] for part in parts for group in part.param_groups for p in group["params"]):
            self._initialize()
            self._set_step(0)

    def _torch_optimizers(self) -> Sequence[torch.optim.Optimizer]:
        inner = [part.optimizer for part in self._parts]
        return [
            optimizer
            for one in inner
            for optimizer in (one.sub_optimizers if isinstance(one, HybridDeviceOptimizer) else [one])
        ]

    def _set_step(self, step: int) -> None:
        """Give every parameter a count of its own: torch's AdamW counts in place, so that a shared one counts twice."""
        for optimizer in self._torch_optimizers():
            if isinstance(optimizer, Adafactor):
                for state in optimizer.state.values():
                    state["step"] = step
            elif isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        # A fused one counts on the device.
                        device = parameter.device if group.get("fused") else "cpu"
                        optimizer.state[parameter]["step"] = torch.tensor(float(step), device=device)
            else:
                for group in optimizer.param_groups:
                    group["step"] = step

    def _named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield every parameter of this rank, by a name that no other of them has."""
        for index, chunk in enumerate(self.chunks):
            for name, parameter in chunk.named_parameters():
                yield f"{_key(index)}.{name}", parameter

    # State that replicas share out ------------------------------------------------------------------------------------

    def _numbered(self, part: DistributedOptimizer) -> Iterator[tuple[int, str, torch.nn.Parameter]]:
        """Yield the parameters of ``part``: megatron-core's number of each, with its name."""
        names = {parameter: name for name, parameter in self._named_parameters()}
        parameters = (parameter for buffer in part.buffers for parameter in buffer.param_index_map)
        for index, parameter in enumerate(parameters):
            yield index, names[parameter], parameter

    def _distributed_state(self, model: ShardedState, loading: bool) -> ShardedState:
        state: ShardedState = {}
        for part in self._parts:
            with _places_without_padding(part.buffers):
                numbered = part.sharded_param_state_fully_reshardable(model, loading, CONTENT)
            for index, name, _ in self._numbered(part):
                state[name] = {key: numbered[index][key] for key in self._kept_keys}
        return state

    def _restore_distributed(self, state: ShardedState) -> None:
        for part, inner in zip(self._parts, self._initialize(), strict=True):
            # load_parameter_state_from_fully_reshardable fails with KeyError on torch's step (megatron-core 0.16.1).
            if not isinstance(inner, HybridDeviceOptimizer):
                for moments in inner.state.values():
                    moments.pop("step", None)
            # The parameters of a float32 model are their own main copies.
            numbered = {
                index: {"param": parameter.detach()} | state[name] for index, name, parameter in self._numbered(part)
            }
            part.load_parameter_state_from_fully_reshardable(numbered)

    # State that every replica has -------------------------------------------------------------------------------------

    def _plain_tensors(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Yield (parameter's name, key, tensor of the parameter's shape)."""
        moments = self._initialized_states(factored=False)
        for name, parameter in self._named_parameters():
            main = getattr(parameter, "main_param", parameter)
            for key in self._kept_keys:
                if key == "param":
                    yield name, key, main
                elif main in moments:
                    yield name, key, moments[main][key]

    def _plain_state(self, model: ShardedState) -> ShardedState:
        named = list(self._named_parameters())
        numbered = get_param_id_to_sharded_param_map(model, (parameter for _, parameter in named))
        described = {name: numbered[index] for index, (name, _) in enumerate(named)}
        state: ShardedState = {}
        for name, key, tensor in self._plain_tensors():
            sharded = make_sharded_optimizer_tensor(described[name], tensor, f"optimizer.state.{key}")
            state.setdefault(name, {})[key] = sharded
        for share in self._average_shares():
            state[share.key] = ShardedTensor.from_rank_offsets(share.key, share.whole(), replica_id=share.replica_id)
        return state

    def _restore_plain(self, state: ShardedState) -> None:
        with torch.no_grad():
            for name, key, tensor in self._plain_tensors():
                tensor.copy_(state[name][key])
            for share in self._average_shares():
                share.local.copy_(state[share.key][share.rows])

    def _average_shares(self) -> Iterator[_AverageShare]:
        """Yield Adafactor's averages; nothing with AdamW."""
        averages = self._initialized_states(factored=True)
        if not averages:
            return
        tied = tied_copy(self.chunks, self.arch)
        for parameter, pieces in hf_pieces(self.chunks, self.arch, self.groups.tp.size()):
            state = averages[getattr(parameter, "main_param", parameter)]
            groups, copy = self.groups.of(parameter), int(parameter is tied)
            for piece in pieces:
                for name, local in state[piece.name].items():
                    yield _average_share(piece, name, local, piece.view(parameter).numel(), copy, groups)


@dataclass(frozen=True)
class _AverageShare:
    """One of Adafactor's averages, of which this rank may hold a part."""

    key: str
    """Its name in the checkpoint."""
    local: torch.Tensor
    """float32 [rows of this rank]."""
    length: int
    """Rows of all ranks, without vocabulary padding."""
    rows: slice
    """Where this rank's lie."""
    split: bool
    """Other ranks hold the rest."""
    replica_id: tuple[int, int, int]
    """All 0 on the rank that writes it."""
    shards: dist.ProcessGroup
    """Ranks that hold parts of the average."""

    def whole(self) -> torch.Tensor:
        """Return the whole average, the same on all ranks of ``shards``; averages are small, and parts may be
        uneven."""
        if not self.split:
            return self.local
        whole = self.local.new_zeros(self.length)
        whole[self.rows] = self.local
        dist.all_reduce(whole, group=self.shards)
        return whole


def _average_share(
    piece: HfPiece, average: str, local: torch.Tensor, local_numel: int, copy: int, groups: ParameterGroups
) -> _AverageShare:
    dim = _AVERAGE_DIM[average]
    split = piece.shard_dim == dim and groups.shards.size() > 1
    # A padded vocabulary gives each rank more rows than its share of the tensor's.
    start = groups.shards.rank() * (local_numel * piece.shape[dim] // math.prod(piece.shape)) if split else 0
    return _AverageShare(
        key=f"optimizer.state.{average}.{piece.name}",
        local=local,
        length=piece.shape[dim],
        rows=slice(start, start + len(local)),
        split=split,
        replica_id=(copy, groups.shards.rank(), groups.replicas.rank()),
        shards=groups.shards,
    )


@contextmanager
def trusted_scales() -> Iterator[None]:
    """Let transformer-engine (2.20) unpickle the scales of float8, which are a run's own and found as it wrote them."""
    name = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _initialized(part: MegatronOptimizer) -> torch.optim.Optimizer:
    inner = part.optimizer
    if isinstance(inner, Adafactor):
        inner.initialize_state()
    elif isinstance(inner, HybridDeviceOptimizer):
        _initialize_offloaded(inner)
    elif part.config.use_precision_aware_optimizer:
        # init_state_fn omits an argument that transformer-engine 2 asks for (megatron-core 0.16.1).
        for parameter in _unseen_parameters(inner):
            inner.initialize_state(parameter, store_param_remainders=False)
    else:
        part.init_state_fn(inner, part.config)
    return inner


def _unseen_parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """Return the parameters that have no state yet."""
    return [p for group in optimizer.param_groups for p in group["params"] if not optimizer.state[p]]


def _initialize_offloaded(optimizer: HybridDeviceOptimizer) -> None:
    # Its own dummy_step would change the parameters.
    for part in optimizer.sub_optimizers:
        for parameter in _unseen_parameters(part):
            zeros = {key: torch.zeros_like(parameter) for key in _MOMENTS}
            part.state[parameter] = zeros | {"step": torch.zeros(())}
    optimizer._sync_sub_optimizers_state_to_hdo()


@contextmanager
def _places_without_padding(buffers: Sequence[Any]) -> Iterator[None]:
    """Place parameters in the buffers of gradients as if there were no padding between the buckets.

    megatron-core 0.16.1 cuts the parameters out of gathered optimizer state, which has no padding, by places that count
    it: all parameters behind a padded bucket would be saved shifted, without an error.
    """
    padded = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        starts = list(itertools.accumulate((bucket.numel_unpadded for bucket in buffer.buckets), initial=0))
        shifts = [bucket.offset - start for bucket, start in zip(buffer.buckets, starts, strict=False)]
        buffer.param_index_map = {
            parameter: (start - shifts[bucket], end - shifts[bucket], bucket)
            for parameter, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, places in zip(buffers, padded, strict=True):
            buffer.param_index_map = places


def _without_states_of_norms(state: ShardedState) -> ShardedState:
    return {key: value for key, value in state.items() if not key.endswith(_STATE_OF_NORM)}


def _key(chunk: int) -> str:
    """Return the place of a chunk in the state dict: megatron-core's optimizer expects this name where there are
    several."""
    return f"model{chunk}"


def _sharded_rng_state() -> ShardedObject:
    state = {"cpu": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return ShardedObject("rng_state", state, (dist.get_world_size(),), (dist.get_rank(),))


def _restore_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
