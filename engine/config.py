"""Every setting of a run, as frozen dataclasses: real defaults, and under each field its meaning, unit and range.

A value is checked where it is declared, relations between sections in ``check_relations``. Every error is a
``ValueError`` of one line that names the key, the value found and the value expected. Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

# megatron-core's names of the parts of a dense layer that it can compute again; its "layernorm" needs
# transformer-engine (0.16.1).
_RECOMPUTE_MODULES = ("core_attn", "mlp")


# What computes each part of a run, in the order in which ``auto`` tries them; the last is plain and always works.
AttentionBackend = Literal[
    "transformer_engine", "flash_attention_3", "flash_attention_4", "flash_attention_2", "torch_varlen", "sdpa"
]
LayersBackend = Literal["transformer_engine", "liger", "torch"]
WeightGradientBackend = Literal["apex", "addmm", "torch"]
AdamwBackend = Literal["transformer_engine", "apex", "torch_fused", "torch"]


def _require(ok: bool, key: str, value: Any, expected: str) -> None:
    if not ok:
        raise ValueError(f"{key} is {value!r}, expected {expected}")


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """One source of conversations."""

    path: str
    """Local ``.jsonl`` or ``.json`` file (one record a line, or one array; also compressed), ``.parquet`` file, or the
    id of a dataset on the hub."""
    repeat: float = 1.0
    """How many times an epoch lists each record; a fraction lists that share, drawn anew each epoch."""
    split: str = "train"
    """Split of a hub dataset; local files have none."""
    revision: str | None = None
    """Git revision of a hub dataset, a commit or tag; null takes the newest."""

    def __post_init__(self) -> None:
        _require(bool(self.path), "data.*.path", self.path, "a file or a dataset id")
        key = f"data.*.repeat of {self.path}"
        _require(0 < self.repeat < math.inf, key, self.repeat, "a finite number above 0")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on, and how records become tokens."""

    train: tuple[DataFile, ...] = ()
    """Training files; their records are shuffled together in every epoch."""
    validation: tuple[DataFile, ...] = ()
    """Held-out files for ``reflectron validate`` and ``train.validate_every``."""
    template: Literal["reflection", "magicoder"] = "reflection"
    """How a conversation is rendered: ReflectionCoder's tags, or Magicoder's ``@@ Instruction`` prompt."""
    max_length: int = 4096
    """Longest sample in tokens, BOS and EOS included; a longer one is skipped and counted, never cut."""
    special_tokens_in_content: Literal["keep", "spell_out"] = "spell_out"
    """What becomes of a special token that a content spells, as HTML may spell ``</s>``: ``spell_out`` tokenises it as
    ordinary text, so that a sample has one EOS; ``keep`` makes it the token's id, as the reference does."""
    store_dir: str | None = None
    """Folder of the token store; ``<output_dir>/token_store`` when null."""
    workers: int = 0
    """Processes that tokenise; 0 means one per core."""
    max_reject_share: float = 0.05
    """Largest share of a file's records that may be rejected, 0 to 1; more stops the run. Samples that are too long do
    not count."""

    def __post_init__(self) -> None:
        _require(self.max_length >= 16, "data.max_length", self.max_length, "at least 16 tokens")
        _require(self.workers >= 0, "data.workers", self.workers, "0 (all cores) or more")
        _require(0 <= self.max_reject_share <= 1, "data.max_reject_share", self.max_reject_share, "0 to 1")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer turns text into ids."""

    path: str | None = None
    """Folder with ``tokenizer.json`` or ``tokenizer.model``, or a ``.model`` file; ``model.path`` when null."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is trained."""

    path: str | None = None
    """Hugging Face checkpoint folder to start from (``config.json`` and safetensors)."""
    config: str | None = None
    """A ``config.json`` to initialise at random instead of ``path``."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Parameters and activations; optimizer state and gradients are float32 in either case."""
    fp8: Literal["none", "delayed", "current"] = "none"
    """FP8 products in the linear layers of transformer-engine, E4M3 forward and E5M2 backward: scaled by the largest
    values of the step before (``delayed``) or of the tensor itself (``current``). Needs ``dtype`` bfloat16."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this times the tensor-parallel size; exports are not padded."""

    def __post_init__(self) -> None:
        key = "model.make_vocab_size_divisible_by"
        _require(self.make_vocab_size_divisible_by >= 1, key, self.make_vocab_size_divisible_by, "at least 1")
        _require(
            self.fp8 == "none" or self.dtype == "bfloat16", "model.fp8", self.fp8, "'none' with model.dtype float32"
        )


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """The dynamic mask: what the student sees of the reflection sequence (ReflectionCoder, section 3.3)."""

    strategy: Literal[
        "block", "sequential_block", "random_block", "sequential_token", "random_token", "all", "none"
    ] = "block"
    """Which part is hidden first."""
    order: str = "tce"
    """For ``block``: the order in which text, code and execution blocks are hidden."""

    def __post_init__(self) -> None:
        _require(sorted(self.order) == ["c", "e", "t"], "mask.order", self.order, "a permutation of 'tce'")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Terms of the loss and their weights."""

    weighting: Literal["sample", "token"] = "sample"
    """``sample``: mean over samples of their means over rows (the paper); ``token``: mean over all rows of a batch."""
    ce_teacher_weight: float = 1.0
    """Factor of the teacher's and the generation samples' cross entropy."""
    ce_student_weight: float = 1.0
    """Factor of the student's cross entropy; the rows of a cross entropy with factor 0 do not count in a mean."""
    kl_weight: float = 1.0
    """Factor of the divergence between teacher and student."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """forward_kl is KL(teacher || student), the paper's."""
    jsd_beta: float = 0.5
    """Mixture weight of the teacher for ``jsd``, 0 to 1."""
    temperature: float = 1.0
    """Temperature of both distributions in the divergence; above 0, at most 100."""
    backend: Literal["auto", "reference", "triton"] = "auto"
    """Implementation of the distillation head; ``auto`` takes plain torch until the kernels are measured on a GPU."""

    def __post_init__(self) -> None:
        for name in ("ce_teacher_weight", "ce_student_weight", "kl_weight"):
            _require(getattr(self, name) >= 0, f"loss.{name}", getattr(self, name), "0 or more")
        _require(0 <= self.jsd_beta <= 1, "loss.jsd_beta", self.jsd_beta, "0 to 1")
        # The divergence is multiplied by its square, and the rounding of float32 with it.
        _require(0 < self.temperature <= 100, "loss.temperature", self.temperature, "above 0 and at most 100")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Sizes of a step."""

    global_batch_size: int = 512
    """Samples of one optimizer step, over all ranks."""
    tokens_per_microbatch: int = 8192
    """Most tokens (teacher and student views together) that one forward may hold on a data-parallel rank, over its
    context-parallel ranks together; rounded up to what tensor- and context-parallel ranks can share out."""

    def __post_init__(self) -> None:
        _require(self.global_batch_size >= 1, "batch.global_batch_size", self.global_batch_size, "at least 1")
        _require(
            self.tokens_per_microbatch >= 64, "batch.tokens_per_microbatch", self.tokens_per_microbatch, "at least 64"
        )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model and the batch are spread over processes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes CUDA when a device is visible; ``cpu`` runs megatron-core on gloo."""
    tensor_model_parallel_size: int = 1
    """Ranks that share every layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """Stages the layers are split into."""
    virtual_pipeline_model_parallel_size: int = 1
    """Chunks of layers that each stage holds and runs in turn (interleaved schedule): less idle time at the ends of a
    step for more communication. The number of microbatches is rounded up to a multiple of the stages."""
    context_parallel_size: int = 1
    """Ranks that share the tokens of every pack, for samples that are too long for one. Each layer keeps the keys and
    values of whole packs all the same, unless ``recompute`` makes them again."""
    data_parallel_size: int | None = None
    """Replicas; null means all remaining processes of the launcher, or 1 (CPU) when reflectron starts them."""
    sequence_parallel: bool = False
    """Split activations along the tokens between tensor-parallel regions."""
    layers_per_stage: tuple[int, ...] = ()
    """Transformer layers of each pipeline stage; empty splits them as evenly as they go, fewer on the last stages.
    With an interleaved pipeline, of every stage's first chunk, then of every stage's second chunk, and so on."""
    distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks (AdamW only)."""
    overlap_grad_reduce: bool | None = None
    """Reduce gradients over replicas bucket by bucket during the backward; null does so on CUDA where there are
    replicas."""
    overlap_param_gather: bool | None = None
    """Gather the parameters that the distributed optimizer has updated while the next forward runs; null does so
    where gradients are reduced that way. Needs ``overlap_grad_reduce``."""
    bucket_size: int | None = None
    """Parameters that are reduced or gathered together when that overlaps; null takes megatron-core's 40 million, or
    1 million a replica if that is more."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward computes again instead of keeping: ``full`` all of a layer from its input, ``selective`` what
    ``recompute_modules`` names."""
    recompute_modules: tuple[str, ...] = ("core_attn",)
    """For ``selective``: ``core_attn`` (rotated queries and keys, attended values), ``mlp`` (most of what a layer
    keeps), or both."""

    def __post_init__(self) -> None:
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "context_parallel_size",
        ):
            _require(getattr(self, name) >= 1, f"parallel.{name}", getattr(self, name), "at least 1")
        stages, chunks = self.pipeline_model_parallel_size, self.virtual_pipeline_model_parallel_size
        if chunks > 1:
            key = "parallel.virtual_pipeline_model_parallel_size"
            _require(stages > 1, key, chunks, "1 when parallel.pipeline_model_parallel_size is 1")
        if self.data_parallel_size is not None:
            _require(self.data_parallel_size >= 1, "parallel.data_parallel_size", self.data_parallel_size, "at least 1")
        if self.sequence_parallel:
            key, size = "parallel.sequence_parallel", self.tensor_model_parallel_size
            _require(size > 1, key, True, "false when parallel.tensor_model_parallel_size is 1")
        if self.overlap_param_gather:
            key = "parallel.overlap_param_gather"
            _require(self.distributed_optimizer, key, True, "false when parallel.distributed_optimizer is false")
            _require(
                self.overlap_grad_reduce is not False, key, True, "false when parallel.overlap_grad_reduce is false"
            )
        if self.recompute == "selective":
            modules = self.recompute_modules
            ok = bool(modules) and set(modules) <= set(_RECOMPUTE_MODULES)
            _require(ok, "parallel.recompute_modules", list(modules), "core_attn, mlp or both")
        if self.bucket_size is not None:
            _require(self.bucket_size >= 1, "parallel.bucket_size", self.bucket_size, "at least 1")
        if self.layers_per_stage:
            ok = len(self.layers_per_stage) == stages * chunks and min(self.layers_per_stage) >= 1
            expected = f"{stages * chunks} positive numbers, one a {'stage' if chunks == 1 else 'chunk'}"
            _require(ok, "parallel.layers_per_stage", list(self.layers_per_stage), expected)


@dataclass(frozen=True, kw_only=True)
class BackendsConfig:
    """Which implementation computes what; ``auto`` takes the first of the list that works on the machine, the plain one
    at its end always does. What a run took is printed at its start, and may change when it resumes."""

    attention: Literal["auto", AttentionBackend] = "auto"
    """Attention of packed rows; ``sdpa`` is torch's scaled dot product, one call for each segment."""
    layers: Literal["auto", LayersBackend] = "auto"
    """Norms, rotation and SwiGLU; with transformer_engine the linear layers, too."""
    weight_gradient: Literal["auto", WeightGradientBackend] = "auto"
    """How a linear layer's weight gradient gets into its float32 sum over microbatches: ``torch`` makes the gradient
    first and then adds it."""
    adamw: Literal["auto", AdamwBackend] = "auto"
    """AdamW's update; not used by Adafactor."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The update rule."""

    name: Literal["adamw", "adafactor"] = "adamw"
    """AdamW (ReflectionCoder) or Adafactor (Magicoder)."""
    learning_rate: float = 5e-5
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay; norms and biases are exempt."""
    clip_grad_norm: float = 1.0
    """Largest L2 norm of the whole gradient; 0 does not clip."""
    beta1: float = 0.9
    """AdamW: decay of the first moment."""
    beta2: float = 0.999
    """AdamW: decay of the second moment."""
    eps: float = 1e-8
    """AdamW: added to the root of the second moment."""
    exp_avg_dtype: Literal["float32", "bfloat16"] = "float32"
    """AdamW: type of the first moment; bfloat16 takes 2 bytes a parameter less, on CUDA with transformer-engine."""
    exp_avg_sq_dtype: Literal["float32", "bfloat16"] = "float32"
    """AdamW: type of the second moment, likewise; bfloat16 needs ``beta2`` of at most 0.996, for it keeps no smaller
    changes."""
    cpu_offload_fraction: float = 0.0
    """AdamW: share of the optimizer state that is kept and updated on the CPU, 0 to 1; on CUDA with
    transformer-engine."""
    adafactor_decay_rate: float = -0.8
    """Adafactor: exponent of the second moment's decay over steps."""
    adafactor_clip_threshold: float = 1.0
    """Adafactor: largest root mean square of one parameter's update."""

    def __post_init__(self) -> None:
        _require(self.learning_rate >= 0, "optimizer.learning_rate", self.learning_rate, "0 or more")
        _require(self.clip_grad_norm >= 0, "optimizer.clip_grad_norm", self.clip_grad_norm, "0 (no clipping) or more")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "0 to below 1")
        fraction = self.cpu_offload_fraction
        _require(0 <= fraction <= 1, "optimizer.cpu_offload_fraction", fraction, "0 to 1")
        # Half a unit in bfloat16's last place, relative to the smallest number with the same exponent.
        _require(
            self.exp_avg_sq_dtype == "float32" or 1 - self.beta2 >= 2**-8,
            "optimizer.exp_avg_sq_dtype",
            self.exp_avg_sq_dtype,
            f"'float32' with optimizer.beta2 {self.beta2}: bfloat16 loses changes smaller than 1/256",
        )
        for key in self.needs_cuda:
            value = getattr(self, key)
            _require(self.name == "adamw", f"optimizer.{key}", value, f"the default with optimizer.name {self.name}")
        if fraction and self.lowers_precision:
            key = next(key for key in ("exp_avg_dtype", "exp_avg_sq_dtype") if getattr(self, key) != "float32")
            expected = "'float32' when optimizer.cpu_offload_fraction is above 0: the CPU's AdamW knows no other"
            _require(False, f"optimizer.{key}", getattr(self, key), expected)

    @property
    def lowers_precision(self) -> bool:
        """Whether a moment is kept in less than float32."""
        return "bfloat16" in (self.exp_avg_dtype, self.exp_avg_sq_dtype)

    @property
    def needs_cuda(self) -> tuple[str, ...]:
        """The keys that are set to something that only CUDA can do."""
        keys = ("exp_avg_dtype", "exp_avg_sq_dtype", "cpu_offload_fraction")
        return tuple(key for key in keys if getattr(self, key) not in ("float32", 0))


@dataclass(frozen=True, kw_only=True)
class LrScheduleConfig:
    """Learning rate over the steps of a run."""

    shape: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after the warm-up, to ``min_learning_rate`` at the end of the run."""
    warmup_ratio: float = 0.05
    """Share of all steps spent warming up, rounded up; not used when ``warmup_steps`` is set."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; the first update already has a learning rate above 0."""
    min_learning_rate: float = 0.0
    """Learning rate at the end of the decay."""

    def __post_init__(self) -> None:
        _require(0 <= self.warmup_ratio <= 1, "lr_schedule.warmup_ratio", self.warmup_ratio, "0 to 1")
        if self.warmup_steps is not None:
            _require(self.warmup_steps >= 0, "lr_schedule.warmup_steps", self.warmup_steps, "0 or more")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length of the run and what is recorded."""

    epochs: float = 2.0
    """Passes over the training files; not used when ``steps`` is set."""
    steps: int | None = None
    """Optimizer steps of the run."""
    validate_every: int = 0
    """Steps between validations; 0 validates never."""
    tensorboard: bool = True
    """Write TensorBoard events under ``<output_dir>/tensorboard``."""
    wandb_project: str | None = None
    """Weights & Biases project to log to; needs the package ``wandb``."""
    collective_timeout_minutes: float = 10.0
    """Time without progress of any rank, by a microbatch or more, after which the watchdog ends the job; six times as
    much while building, loading, saving and in the first step. 0 waits for ever."""
    heartbeat_timeout_seconds: float = 40.0
    """Time without a sign of life of a rank after which the watchdog ends the job; at least 5."""
    spike_threshold: float = 8.0
    """A loss that exceeds the median of ``spike_window`` steps by so many robust standard deviations is noted in
    ``spikes.jsonl`` with its samples; 0 notes none."""
    spike_window: int = 100
    """Steps that a loss is compared with; at least 20."""
    max_skipped_steps: int = 3
    """Steps in a row that may be skipped because loss or gradient are not finite; one more stops the run."""

    def __post_init__(self) -> None:
        _require(0 < self.epochs < math.inf, "train.epochs", self.epochs, "a finite number above 0")
        if self.steps is not None:
            _require(self.steps >= 1, "train.steps", self.steps, "at least 1")
        _require(self.validate_every >= 0, "train.validate_every", self.validate_every, "0 (never) or more")
        for key, value, least in (
            ("collective_timeout_minutes", self.collective_timeout_minutes, 0),
            ("heartbeat_timeout_seconds", self.heartbeat_timeout_seconds, 5),
            ("spike_threshold", self.spike_threshold, 0),
            ("spike_window", self.spike_window, 20),
        ):
            _require(value >= least, f"train.{key}", value, f"{least} or more")
        _require(self.max_skipped_steps >= 0, "train.max_skipped_steps", self.max_skipped_steps, "0 (none) or more")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """pass@1 during training: the main rank generates and scores while the others wait."""

    every: int = 0
    """Steps between evaluations; 0 evaluates never."""
    dataset: Literal["humaneval", "mbpp"] = "humaneval"
    """Which benchmark."""
    data: str | None = None
    """Its file as evalplus publishes it; null looks where ``reflectron eval run`` looks."""
    limit: int = 32
    """Only the first problems, for time; 0 takes all."""
    max_new_tokens: int = 512
    """Most tokens of an answer."""

    def __post_init__(self) -> None:
        _require(self.every >= 0, "eval.every", self.every, "0 (never) or more")
        _require(self.limit >= 0, "eval.limit", self.limit, "0 (all) or more")
        _require(self.max_new_tokens >= 1, "eval.max_new_tokens", self.max_new_tokens, "at least 1")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Training checkpoints under ``<output_dir>/checkpoints``, from which the same command continues a run."""

    save_every: int = 500
    """Steps between checkpoints; 0 saves only the last step, and when SIGTERM or SIGUSR1 stops the run."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are kept for good; 0 keeps none."""
    asynchronous: bool = False
    """Write while training continues; takes memory for a copy of this rank's share on the CPU."""
    resume: Literal["auto", "never"] = "auto"
    """``auto`` continues the run in ``output_dir``; ``never`` starts over and puts what it holds aside."""

    def __post_init__(self) -> None:
        _require(self.save_every >= 0, "checkpoint.save_every", self.save_every, "0 (never) or more")
        _require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "at least 1")
        _require(self.keep_every >= 0, "checkpoint.keep_every", self.keep_every, "0 (none) or more")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    output_dir: str = "outputs/run"
    """Folder of everything the run writes; a relative path starts at the working directory."""
    seed: int = 3407
    """Seed of sample order, random masks and random initialisation."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Which model is trained."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Which tokenizer turns text into ids."""
    data: DataConfig = field(default_factory=DataConfig)
    """What is trained on."""
    mask: MaskConfig = field(default_factory=MaskConfig)
    """The dynamic mask."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Terms of the loss."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    """Sizes of a step."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the work is spread over processes."""
    backends: BackendsConfig = field(default_factory=BackendsConfig)
    """Which implementations compute it."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The update rule."""
    lr_schedule: LrScheduleConfig = field(default_factory=LrScheduleConfig)
    """Learning rate over the steps."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length of the run."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """pass@1 during training."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and resuming."""

    def __post_init__(self) -> None:
        _require(self.seed >= 0, "seed", self.seed, "0 or more")
        is_path = bool(self.output_dir.strip()) and "\0" not in self.output_dir
        _require(is_path, "output_dir", self.output_dir, "the path of a folder")
        check_relations(self)


def check_relations(config: Config) -> None:
    """Check what no section can see alone.

    Raises:
        ValueError: naming both keys and the fix.
    """
    model, tokenizer, batch, data = config.model, config.tokenizer, config.batch, config.data
    lowest, peak = config.lr_schedule.min_learning_rate, config.optimizer.learning_rate
    if model.path and model.config:
        raise ValueError("model.path and model.config are both set; keep model.path to train a checkpoint")
    if model.config and not tokenizer.path:
        raise ValueError("tokenizer.path is null, expected a folder: model.config brings no tokenizer")
    if batch.tokens_per_microbatch < data.max_length:
        raise ValueError(
            f"batch.tokens_per_microbatch is {batch.tokens_per_microbatch}, expected at least data.max_length "
            f"({data.max_length}): a sample is never cut"
        )
    if config.parallel.overlap_param_gather and config.optimizer.name != "adamw":
        raise ValueError(
            f"parallel.overlap_param_gather is True, expected false or null: optimizer.name {config.optimizer.name} is "
            "not sharded over replicas"
        )
    for key in config.optimizer.needs_cuda:
        value = getattr(config.optimizer, key)
        if not config.parallel.distributed_optimizer:
            raise ValueError(f"optimizer.{key} is {value!r}, expected parallel.distributed_optimizer true beside it")
        if model.dtype != "bfloat16":
            raise ValueError(
                f"optimizer.{key} is {value!r}, expected model.dtype bfloat16 beside it, not {model.dtype}"
            )
    if not 0 <= lowest <= peak:
        raise ValueError(f"lr_schedule.min_learning_rate is {lowest}, expected 0 to optimizer.learning_rate ({peak})")
