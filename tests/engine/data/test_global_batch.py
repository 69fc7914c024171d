"""Global batches: what they weigh and count is independent of ranks and budget, and equals what enters the model.

The test of the model starts this file as the one rank of a job: ``test_global_batch.py STORE OUT``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reflectron.engine.config import BatchConfig, Config, DataConfig, DataFile, LossConfig, MaskConfig, ModelConfig
from reflectron.engine.data.batch_source import SampleId, StepSamples, StoreSource
from reflectron.engine.data.global_batch import GlobalBatch, GlobalBatches, assemble
from reflectron.engine.data.masking import visible_tokens
from reflectron.engine.data.packing import CostModel
from reflectron.engine.data.sampler import Draws, SampleOrder
from reflectron.engine.data.store import TokenStore, build_store
from reflectron.engine.data.tokenizer import load_tokenizer
from reflectron.engine.data.views import SampleViews, make_views
from testkit.places import TESTS_DIR

GOLDEN_DIR = TESTS_DIR / "golden"
GOLDEN: dict[str, Any] = json.loads((GOLDEN_DIR / "golden.json").read_text(encoding="utf-8"))
DATA = DataConfig(train=(DataFile(path=str(GOLDEN_DIR / "samples.jsonl")),), max_length=448, workers=1)
COST = CostModel(per_token=1e5, per_token_squared=200.0, per_row=9e4)
RATES = {"0": 0.0, "0.5": 0.5, "1.0": 1.0}
STEPS = 5


def open_samples(folder: Path) -> TokenStore:
    return build_store(DATA, DATA.train, load_tokenizer(str(GOLDEN_DIR / "tokenizer_after"), "reflection"), folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return open_samples(tmp_path_factory.mktemp("store"))


def make_config(**batch: int) -> Config:
    sizes = {"global_batch_size": 8, "tokens_per_microbatch": 768} | batch
    return Config(
        model=ModelConfig(path=str(GOLDEN_DIR / "llama_after"), dtype="float32"),
        data=DATA,
        mask=MaskConfig(strategy="random_token"),
        batch=BatchConfig(**sizes),
    )


def make_batches(store: TokenStore, config: Config, rank: int = 0, ranks: int = 1) -> GlobalBatches:
    order = SampleOrder([1.0], np.zeros(len(store), int), config.seed)
    source = StoreSource(store, order, config, total_steps=STEPS, epochs=None)
    return GlobalBatches(source, config, COST, data_parallel_rank=rank, data_parallel_size=ranks)


def block_views(store: TokenStore, rate: float) -> list[SampleViews]:
    """Views of all samples with the mask ``block``, whose visible tokens are recorded."""
    return [make_views(s, visible_tokens(s, MaskConfig(), rate, Draws(0))) for s in map(store.__getitem__, range(24))]


def tensors_of(batch: GlobalBatch) -> list[torch.Tensor]:
    records = [record for m in batch.microbatches for record in (m, m.loss_rows)]
    return [value for record in records for value in vars(record).values() if isinstance(value, torch.Tensor)]


def weight_sums(batches: Sequence[GlobalBatch]) -> dict[str, float]:
    """Sums of the row weights of each term over the microbatches of all ranks."""
    sums = {"ce_teacher": 0.0, "ce_student": 0.0, "ce_generation": 0.0, "kl": 0.0}
    for rows in (microbatch.loss_rows for batch in batches for microbatch in batch.microbatches):
        unpaired = rows.ce_weight.double()
        sums["ce_generation"] += unpaired[: rows.generation_rows].sum().item()
        sums["ce_teacher"] += (
            unpaired[rows.generation_rows :].sum().item() + rows.ce_teacher_weight.double().sum().item()
        )
        sums["ce_student"] += rows.ce_student_weight.double().sum().item()
        sums["kl"] += rows.kl_weight.double().sum().item()
    return sums


@pytest.mark.parametrize("weighting", ["sample", "token"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("budget", [768, 1024, 4096])
def test_weights_do_not_depend_on_ranks_or_budget(store: TokenStore, weighting: Any, ranks: int, budget: int) -> None:
    config = make_config(tokens_per_microbatch=budget)
    views, loss = block_views(store, 0.5), LossConfig(weighting=weighting)
    config = Config(model=config.model, data=DATA, batch=config.batch, loss=loss)
    batches = [assemble(views, config, COST, 0.5, rank, ranks) for rank in range(ranks)]
    sums = weight_sums(batches)
    for batch in batches:
        assert vars(batch.term_weights) == pytest.approx(sums, rel=1e-6)
        assert len(batch.microbatches) == len(batches[0].microbatches)
        assert batch.sequence_length == batches[0].sequence_length <= budget
        assert all(len(m.tokens) == batch.sequence_length for m in batch.microbatches)
        assert (batch.fill, batch.tokens) == (batches[0].fill, batches[0].tokens)
    if weighting == "sample":
        # 24 samples of one each: cross entropy of all, divergence of the 12 with a reflection.
        assert sums["ce_teacher"] + sums["ce_student"] == pytest.approx(0.5)
        assert (sums["ce_generation"], sums["kl"]) == pytest.approx((0.5, 0.5))
    else:
        assert sums["ce_teacher"] + sums["ce_student"] + sums["ce_generation"] == pytest.approx(1)
        assert sums["kl"] == pytest.approx(1)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_microbatches_of_all_ranks_hold_exactly_the_batch(store: TokenStore, ranks: int) -> None:
    views = block_views(store, 0.5)
    batches = [assemble(views, make_config(), COST, 0.5, rank, ranks) for rank in range(ranks)]
    found = []
    for microbatch in (m for batch in batches for m in batch.microbatches):
        padding = len(microbatch.tokens) - sum(microbatch.segment_lengths)
        *segments, _ = microbatch.tokens.split([*microbatch.segment_lengths, padding])
        found += [segment.numpy().tobytes() for segment in segments]
    expected = []
    for view in views:
        ids = view.input_ids.astype(np.int64)
        expected += [ids.tobytes()] + ([ids[view.student_positions].tobytes()] if len(view.student_positions) else [])
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("rate", RATES)
def test_students_count_their_visible_tokens(store: TokenStore, rate: str) -> None:
    views = block_views(store, RATES[rate])
    batch = assemble(views, make_config(), COST, RATES[rate], 0, 1)
    recorded = GOLDEN["masks"]["values"]["block_tce"]
    for sample in GOLDEN["samples"]:
        if sample["name"] in recorded:
            view = views[sample["index"]]
            assert len(view.student_positions) == recorded[sample["name"]][rate].count("1")
    assert batch.tokens.teacher == sum(len(view.input_ids) for view in views[12:])
    assert batch.tokens.generation == sum(len(view.input_ids) for view in views[:12])
    assert batch.tokens.student == sum(len(view.student_positions) for view in views[12:])
    assert batch.tokens.saved == batch.tokens.teacher - batch.tokens.student
    segments = sum(sum(microbatch.segment_lengths) for microbatch in batch.microbatches)
    assert segments == batch.tokens.total
    assert batch.fill == segments / (len(batch.microbatches) * batch.sequence_length)


def test_none_shares_one_view(store: TokenStore) -> None:
    mask = MaskConfig(strategy="none")
    samples = [store[index] for index in range(24)]
    views = [make_views(s, visible_tokens(s, mask, 0.5, Draws(0))) for s in samples]
    batch = assemble(views, make_config(), COST, 0.5, 0, 1)
    assert batch.tokens.student == 0
    assert batch.tokens.total == int(store.lengths.sum())
    assert batch.term_weights.ce_student > 0


def test_a_batch_is_a_function_of_its_step(store: TokenStore) -> None:
    config = make_config()
    first = [make_batches(store, config).batch(step) for step in range(STEPS)]
    again = make_batches(store, config)
    for step in (3, 0, 4):
        same = again.batch(step)
        assert all(map(torch.equal, tensors_of(first[step]), tensors_of(same)))
        assert same.mask_rate == (step + 1) / STEPS
    assert not torch.equal(first[0].microbatches[0].tokens, first[1].microbatches[0].tokens)


@pytest.mark.parametrize("start", [0, 3, 4])
def test_prefetching_changes_nothing(store: TokenStore, start: int) -> None:
    batches = make_batches(store, make_config(), rank=1, ranks=2)
    fetched = list(batches.from_step(start))
    assert len(fetched) == STEPS - start
    for step, batch in enumerate(fetched, start):
        expected = batches.batch(step)
        assert all(map(torch.equal, tensors_of(batch), tensors_of(expected)))
        assert (batch.mask_rate, batch.tokens, batch.term_weights) == (
            expected.mask_rate,
            expected.tokens,
            expected.term_weights,
        )


class Rollouts:
    """A source whose samples depend on what training has done so far."""

    knows_steps_ahead, total_steps = False, STEPS

    def __init__(self, source: StoreSource) -> None:
        self.source, self.asked = source, list[int]()

    def samples(self, step: int) -> StepSamples:
        self.asked.append(step)
        return self.source.samples(step)

    def sample_ids(self, step: int) -> list[SampleId]:
        return self.source.sample_ids(step)


def test_a_source_that_knows_no_step_ahead_is_asked_when_its_step_begins(store: TokenStore) -> None:
    ahead = make_batches(store, make_config())
    assert isinstance(ahead.source, StoreSource)
    source = Rollouts(ahead.source)
    batches = GlobalBatches(source, make_config(), COST, data_parallel_rank=0, data_parallel_size=1)
    for step, (batch, expected) in enumerate(zip(batches.from_step(0), ahead.from_step(0), strict=True)):
        assert source.asked == list(range(step + 1))
        assert all(map(torch.equal, tensors_of(batch), tensors_of(expected)))


def test_batches_for_cuda_are_page_locked_by_the_thread_that_prepares_them(
    store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's part is a stand-in: every tensor of every record goes through it, on a thread that has the device set."""
    device, set_on, locked = torch.device("cuda", 1), [], []

    def lock(tensor: torch.Tensor) -> torch.Tensor:
        locked.append((tensor.clone(), threading.current_thread().name))
        return locked[-1][0]

    monkeypatch.setattr(torch.cuda, "set_device", lambda d: set_on.append((d, threading.current_thread().name)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lock)
    (batch,) = make_batches(store, make_config()).from_step(STEPS - 1, device)
    expected = make_batches(store, make_config()).batch(STEPS - 1)
    assert all(map(torch.equal, tensors_of(batch), tensors_of(expected)))
    assert {id(tensor) for tensor in tensors_of(batch)} <= {id(tensor) for tensor, _ in locked}
    assert set_on[0][0] == device
    assert {name for _, name in locked} == {set_on[0][1]} != {threading.current_thread().name}


def test_a_failure_while_prefetching_reaches_the_caller(store: TokenStore) -> None:
    batches = make_batches(store, make_config(tokens_per_microbatch=448))
    with pytest.raises(ValueError, match="tokens_per_microbatch"):
        list(batches.from_step(0))


@pytest.mark.slow
def test_only_visible_tokens_enter_the_model(store: TokenStore, tmp_path: Path) -> None:
    """Counted where tokens cost: by the embedding, and by the attention of every layer, in the engine's own forward."""
    out = tmp_path / "entered.json"
    subprocess.run([sys.executable, __file__, str(tmp_path), str(out)], check=True, capture_output=True, text=True)
    entered = json.loads(out.read_text())
    for rate, (embedded, attended) in entered.items():
        views = block_views(store, RATES[rate])
        batch = assemble(views, make_config(), COST, RATES[rate], 0, 1)
        assert attended == [sum(len(view.input_ids) + len(view.student_positions) for view in views)] * 3
        # The embedding and the linear layers see the padding as well, and nothing else.
        assert embedded == len(batch.microbatches) * batch.sequence_length
        assert attended[0] / embedded == batch.fill > 0.8
    assert entered["1.0"][1][0] < entered["0.5"][1][0] < entered["0"][1][0]


def count_entering_tokens(store: TokenStore) -> dict[str, Any]:
    """Tokens that pass the embedding, and that each layer's attention attends, in a forward of all samples by rate."""
    from reflectron.engine.model.attention import PackedCausalAttention
    from reflectron.engine.model.inputs import read_model_inputs
    from reflectron.engine.parallel.process_groups import start_process_groups, stop_process_groups
    from reflectron.engine.training.build import load_model
    from reflectron.engine.training.step import forward_backward

    config = make_config()
    groups = start_process_groups(config.parallel, config.seed)
    (model,) = load_model(config, read_model_inputs(config), groups, torch.float32)
    embedded: list[int] = []
    attended: dict[torch.nn.Module, int] = {}

    def count_embedded(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        embedded.append(args[0].numel())

    def count_attended(module: torch.nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        # Every token attends at least to itself, so its output is not zero; padding attends to nothing.
        attended[module] += int((output.flatten(1) != 0).any(dim=1).sum())

    model.embedding.word_embeddings.register_forward_pre_hook(count_embedded)
    for module in model.modules():
        if isinstance(module, PackedCausalAttention):
            attended[module] = 0
            module.register_forward_hook(count_attended, with_kwargs=True)
    entered = {}
    with torch.no_grad():
        for name, rate in RATES.items():
            embedded.clear()
            attended |= dict.fromkeys(attended, 0)
            batch = assemble(block_views(store, rate), config, COST, rate, 0, 1)
            forward_backward([model], groups, batch, forward_only=True)
            entered[name] = (sum(embedded), list(attended.values()))
    stop_process_groups()
    return entered


if __name__ == "__main__":
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    Path(sys.argv[2]).write_text(json.dumps(count_entering_tokens(open_samples(Path(sys.argv[1])))))
