"""The run file as pydantic models: every key a user may write, its type, bound, default and meaning.

The string under a field is its documentation: `miles config explain` and docs/reference/config.md print it.
Top-level sections are the defaults of every step; a step's own section (`[steps.warmup.train]`) is merged
over them before validation, so that each resolved step is complete in itself.
Bounds of single values live here; arithmetic between values in `miles.config.rules`, merging in
`miles.config.steps`. `MayChange` marks the keys that a run takes over when they change between two attempts; what
follows from that is in `miles.config.changes`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from miles.config.base import MayChange, NonNegativeInt, Section
from miles.config.cluster import ContainerSection, SlurmSection

Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
FromString = Field(strict=False)
"""For enums: TOML has only their strings, which strict mode would refuse."""


class Backend(StrEnum):
    """Trainer implementation."""

    MEGATRON = "megatron"
    FSDP = "fsdp"


class Dtype(StrEnum):
    """Floating-point type of the parameters."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class DataSection(Section):
    """Where prompts come from. `data = "file.jsonl"` is short for `data.path`."""

    path: str
    """JSONL or Parquet file; `step:NAME/file` names an output of another step. Relative to the run file."""
    prompt: str = "prompt"
    """Column with the prompt: a string, or a list of chat messages (`[{"role": ..., "content": ...}]`)."""
    label: str = "label"
    """Column with the reference answer that the grader compares with."""
    response: str = "response"
    """Column with the demonstration, read by supervised steps only."""
    metadata: str = "metadata"
    """Column with a table of anything else; graders see it. Need not exist."""
    id: str = "id"
    """Column with a stable identifier; a hash of the row where the column does not exist."""
    system: str | None = None
    """System message put before prompts that are plain strings."""
    chat_template: bool = True
    """Apply the tokenizer's chat template. With `false`, a string prompt is tokenized as it is."""
    template_args: dict[str, Any] = {}
    """Extra arguments of the chat template, for example `{enable_thinking = false}`."""
    max_prompt_tokens: PositiveInt | None = None
    """Longest prompt; not set: the model's context length minus the response length."""
    too_long: Literal["error", "drop"] = "error"
    """A longer prompt stops the run before anything starts, or is left out (counted in the log)."""
    shuffle: bool = True
    """Draw prompts in a new order every epoch (seeded); false: in file order."""


class ModelSection(Section):
    """Which model to train. `model = "DIR"` is short for `model.path`."""

    path: str
    """Hugging Face model directory (config, weights, tokenizer); `step:NAME/model` names a step's output."""
    tokenizer: str | None = None
    """Directory of the tokenizer, where it is not the model's."""
    trust_remote_code: bool = False
    """Run Python code shipped in the model directory."""


class RewardSection(Section):
    """One grader; `[[rewards]]` stands once for each, and their scores are added with their weights."""

    grader: str
    """`exact`, `math`, or a Python function as `package.module:function` or `path/file.py:function`."""
    weight: float = 1.0
    """Factor of this grader's score in the reward."""
    args: dict[str, Any] = {}
    """Keyword arguments of the grader."""
    timeout: MayChange[PositiveFloat] = 30.0
    """Seconds one call may take; a grader that takes longer scores `on_error`."""
    on_error: Literal["stop", "zero"] = "stop"
    """What a grader that raises or times out means: stop the run with its message, or score 0 (counted)."""


Rewards = Annotated[list[RewardSection], Field(min_length=1)]


def exact_match() -> list[RewardSection]:
    """The reward of a step that names none."""
    return [RewardSection(grader="exact")]


class RolloutSection(Section):
    """How responses are generated."""

    prompts_per_step: PositiveInt = 32
    """Prompts drawn for one training step."""
    group_size: PositiveInt = 8
    """Responses to each prompt (n; the group of the group-relative advantage)."""
    max_response_tokens: PositiveInt = 1024
    """Longest response; longer ones end with finish reason `length`."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; log-probabilities are those of the temperature-scaled distribution."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling. Values below 1 bias the importance ratio; 1 is recommended for training."""
    top_k: int = -1
    """Sample from the k most likely tokens only; -1: all."""
    stop: list[str] = []
    """Strings that end a response."""
    stop_token_ids: list[int] = []
    """Token ids that end a response, beside the model's end-of-sequence tokens."""
    max_concurrent_groups: MayChange[PositiveInt] = 64
    """Groups in flight at once over all engines."""
    request_timeout: MayChange[PositiveFloat] = 1800.0
    """Seconds after which a generation request counts as lost and is tried again."""
    max_retries: MayChange[NonNegativeInt] = 3
    """How often one request is tried again before its prompt is quarantined."""
    over_sampling: Annotated[float, Field(ge=1.0, le=2.0)] = 1.0
    """Groups generated at once, as a multiple of prompts_per_step. Above 1 the step closes when prompts_per_step groups
    are done; the others are kept as they are and continued in the next step (partial rollout)."""
    max_staleness: PositiveInt = 2
    """Steps that a kept group may lie behind: one that has waited so long must be finished before a step closes."""
    off_policy_tokens: Literal["correct", "mask"] = "correct"
    """Tokens that older weights sampled: trained on with algorithm.importance_correction, or left out of the loss."""
    filter: Literal["none", "zero-variance"] = "none"
    """`zero-variance`: a group whose rewards are all equal is dropped and another prompt drawn (DAPO, 2503.14476)."""
    max_filtered: NonNegativeFloat = 3.0
    """Groups that one step may drop, as a multiple of prompts_per_step; after that it trains on whatever comes."""
    max_quarantined: MayChange[NonNegativeInt] = 16
    """Prompts of a run that may be set aside because no engine can serve them; one more stops the run."""


class Aggregation(StrEnum):
    """How token losses become one number."""

    TOKEN_MEAN = "token-mean"
    SEQUENCE_MEAN_TOKEN_MEAN = "seq-mean-token-mean"
    SEQUENCE_MEAN_TOKEN_SUM_NORM = "seq-mean-token-sum-norm"


class AlgorithmSection(Section):
    """The policy-gradient objective."""

    name: Literal["grpo"] = "grpo"
    """GRPO (Shao et al. 2024, arXiv 2402.03300)."""
    normalize_std: bool = True
    """Divide the advantage by the group's standard deviation; false: Dr. GRPO's choice (arXiv 2503.20783)."""
    clip_low: PositiveFloat = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """The ratio is clipped above at 1 + clip_high (0.28 in DAPO, 2503.14476)."""
    aggregation: Annotated[Aggregation, FromString] = Aggregation.TOKEN_MEAN
    """`token-mean` is DAPO's, `seq-mean-token-mean` GRPO's, `seq-mean-token-sum-norm` Dr. GRPO's."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL penalty against the reference model in the loss; 0: no reference model is loaded."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that KL (Schulman 2020)."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    old_log_probs: Literal["trainer", "engine"] = "trainer"
    """Denominator of the ratio: recomputed by the trainer before the update, or as the engine sampled."""
    importance_correction: Literal["none", "tis"] = "tis"
    """Correct the trainer/engine mismatch by truncated importance sampling per token (Yao et al. 2025)."""
    tis_cap: PositiveFloat = 2.0
    """Upper bound of the importance weight."""


class Schedule(StrEnum):
    """Learning rate after the warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


class TrainSection(Section):
    """The trainer: backend, parallelism, optimizer, budget."""

    backend: Annotated[Backend, FromString] = Backend.MEGATRON
    """`megatron` (megatron-core) or `fsdp` (FSDP2 on the Hugging Face implementation)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPUs of the node where there are any."""
    dtype: Annotated[Dtype, FromString] = Dtype.BFLOAT16
    """Type of parameters and activations; gradients and optimizer states are float32."""
    steps: PositiveInt = 100
    """Training steps: rollout batches for RL, batches for supervised steps."""
    batch_size: PositiveInt = 64
    """Sequences of one supervised step. (RL: rollout.prompts_per_step x rollout.group_size.)"""
    updates_per_step: PositiveInt = 1
    """Optimizer updates that one rollout batch is divided into."""
    max_tokens_per_micro_batch: MayChange[PositiveInt] = 8192
    """Token budget of one forward and backward pass per rank."""
    lr: PositiveFloat = 1e-6
    """Peak learning rate."""
    lr_schedule: Annotated[Schedule, FromString] = Schedule.CONSTANT
    """Shape after the warm-up."""
    lr_warmup_steps: NonNegativeInt = 0
    """Steps over which the rate rises linearly from lr / lr_warmup_steps."""
    min_lr: NonNegativeFloat = 0.0
    """Where a decaying schedule ends."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay (AdamW)."""
    adam_beta1: Decay = 0.9
    """Decay of the gradient's first moment."""
    adam_beta2: Decay = 0.95
    """Decay of the gradient's second moment."""
    adam_eps: PositiveFloat = 1e-8
    """Added to the denominator."""
    clip_grad: NonNegativeFloat = 1.0
    """Bound of the gradient's L2 norm; 0: no clipping."""
    tensor_parallel_size: MayChange[PositiveInt] = 1
    """Ranks that share each layer's matrices (megatron)."""
    pipeline_parallel_size: MayChange[PositiveInt] = 1
    """Stages that the layers are divided into (megatron)."""
    expert_parallel_size: MayChange[PositiveInt] = 1
    """Ranks that the experts are divided over (megatron)."""
    recompute: MayChange[bool] = False
    """Recompute activations in the backward pass instead of keeping them."""
    moe_aux_loss_coef: NonNegativeFloat = 0.0
    """Weight of the router's load-balancing loss."""
    log_prob_chunk_tokens: MayChange[PositiveInt] = 1024
    """Tokens whose logits exist at once when log-probabilities are computed."""


class EngineSection(Section):
    """The inference servers."""

    kind: Literal["auto", "embedded", "sglang"] = "auto"
    """`auto`: sglang where there is a GPU, else the embedded engine."""
    dtype: Annotated[Dtype, FromString] | None = None
    """Type of the engine's weights; not set: as train.dtype."""
    context_length: PositiveInt | None = None
    """Longest prompt plus response; not set: the model's."""
    max_running_requests: MayChange[PositiveInt] = 64
    """Sequences decoded together."""
    return_routed_experts: bool = False
    """Record the experts that each token was routed to (MoE)."""
    startup_timeout: MayChange[PositiveFloat] = 300.0
    """Seconds a server may take until it answers."""
    sync_bucket_mib: MayChange[PositiveInt] = 512
    """Size of the buckets in which weights travel from the trainer to the engine."""
    verify_sync: MayChange[bool] = True
    """Compare checksums of the engine's and the trainer's tensors after every sync (embedded engine)."""
    max_restarts: MayChange[NonNegativeInt] = 3
    """How often each server is started again in one attempt when it dies or hangs."""
    hang_timeout: MayChange[PositiveFloat] = 120.0
    """Seconds without an answer to a health check after which a server counts as hung."""
    extra_args: MayChange[list[str]] = []
    """Further command-line arguments of the SGLang server."""


class EvalSection(Section):
    """Evaluation: pass@1 and pass@k on held-out prompts."""

    data: DataSection | None = None
    """Held-out prompts; not set: no evaluation. Says how rows are read where it differs from `data`."""
    every: MayChange[NonNegativeInt] = 0
    """Evaluate every that many RL steps, beside before the first and after the last; 0: never in between."""
    samples: PositiveInt = 1
    """Samples per prompt; the largest k of pass@k."""
    pass_at: list[PositiveInt] = [1]
    """The k of pass@k (unbiased estimator of Chen et al. 2021, arXiv 2107.03374)."""
    pass_threshold: float = 1.0
    """A sample passes when its reward is at least this."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 0: greedy."""
    max_prompts: PositiveInt | None = None
    """Evaluate on the first that many prompts only."""


class CheckpointSection(Section):
    """When the trainer's state is saved, and which of its checkpoints are kept."""

    every: MayChange[Literal["auto"] | PositiveInt] = "auto"
    """Training steps between checkpoints; `auto`: by the measured stall of a save and rate of failures (Daly 2006)."""
    mtbf_hours: MayChange[PositiveFloat] = 12.0
    """Expected hours between interruptions, for `auto`; the run's own ledger corrects it."""
    asynchronous: MayChange[bool] = True
    """Write in the background: the training step waits only until the state is copied."""
    keep_last: MayChange[PositiveInt] = 2
    """Newest checkpoints that are kept."""
    keep_every: MayChange[NonNegativeInt] = 0
    """Keep the checkpoints of steps divisible by this for good; 0: none."""
    keep_best: MayChange[str | None] = None
    """Keep the checkpoint with the highest value of this metric as well, for example `eval/reward`."""


class JournalSection(Section):
    """The journal of rollouts: what was generated is on disk before anybody depends on it."""

    flush_seconds: MayChange[PositiveFloat] = 5.0
    """Responses, partial ones too, reach the disk within this: a killed run loses at most this much generation."""
    keep: MayChange[Literal["needed", "all"]] = "needed"
    """`needed`: back to the oldest kept checkpoint; `all`: every step of the run."""


class LocalSection(Section):
    """Processes of `miles submit --local`."""

    ranks: MayChange[PositiveInt] = 1
    """Trainer processes (torch.distributed ranks)."""
    engines: MayChange[PositiveInt] = 1
    """Inference servers."""
    threads: MayChange[PositiveInt | None] = None
    """CPU threads of each trainer and engine process; not set: all cores (they work in turns)."""
    time_limit_minutes: MayChange[PositiveFloat | None] = None
    """End each attempt in time, with everything saved, before it has run that long; not set: no limit."""


class TrackingSection(Section):
    """Where metrics go beside metrics.jsonl."""

    tensorboard: MayChange[bool] = False
    """Write TensorBoard events into the run directory."""
    wandb_project: MayChange[str | None] = None
    """Send metrics to this Weights & Biases project."""
    samples_per_step: MayChange[NonNegativeInt] = 4
    """Transcripts kept per step for the report."""


class StepBase(Section):
    """What all kinds of steps share."""

    outputs: ClassVar[tuple[str, ...]] = ()
    """Files that the step leaves under steps/NAME/ and that `step:NAME/...` may refer to."""

    needs: list[str] = []
    """Steps that must be done before; every `step:NAME/...` reference adds NAME by itself."""
    slurm: SlurmSection = Field(default_factory=SlurmSection)
    container: ContainerSection = Field(default_factory=ContainerSection)


class TinyTaskStep(StepBase):
    """Builds a tiny random model with its tokenizer, and data of a small verifiable task.

    Outputs: model/, demonstrations.jsonl, train.jsonl, heldout.jsonl.
    """

    outputs: ClassVar[tuple[str, ...]] = ("model", "demonstrations.jsonl", "train.jsonl", "heldout.jsonl")

    kind: Literal["tiny-task"]
    architecture: Literal["qwen3", "qwen3-moe"] = "qwen3-moe"
    """Model family."""
    task: Literal["sort", "add"] = "sort"
    """`sort`: put six digits in order; `add`: sum of two numbers, least significant digit first."""
    layers: PositiveInt = 2
    """Transformer layers."""
    hidden_size: PositiveInt = 128
    """Width."""
    experts: PositiveInt = 4
    """Experts of an MoE layer; each token takes two."""
    train_prompts: PositiveInt = 4096
    """Rows of train.jsonl."""
    heldout_prompts: PositiveInt = 256
    """Rows of heldout.jsonl; none of them is in the other files."""


class SftStep(StepBase):
    """Supervised fine-tuning on prompt/response pairs. Output: model/."""

    outputs: ClassVar[tuple[str, ...]] = ("model",)

    kind: Literal["sft"]
    model: ModelSection
    data: DataSection
    train: TrainSection = Field(default_factory=TrainSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    local: LocalSection = Field(default_factory=LocalSection)
    tracking: TrackingSection = Field(default_factory=TrackingSection)


class RlStep(StepBase):
    """Reinforcement learning. Output: model/."""

    outputs: ClassVar[tuple[str, ...]] = ("model",)

    kind: Literal["rl"]
    model: ModelSection
    data: DataSection
    rewards: Rewards = Field(default_factory=exact_match)
    rollout: RolloutSection = Field(default_factory=RolloutSection)
    algorithm: AlgorithmSection = Field(default_factory=AlgorithmSection)
    train: TrainSection = Field(default_factory=TrainSection)
    engine: EngineSection = Field(default_factory=EngineSection)
    eval: EvalSection = Field(default_factory=EvalSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    journal: JournalSection = Field(default_factory=JournalSection)
    local: LocalSection = Field(default_factory=LocalSection)
    tracking: TrackingSection = Field(default_factory=TrackingSection)


class EvalStep(StepBase):
    """Evaluation of a model on eval.data. Output: results.json."""

    outputs: ClassVar[tuple[str, ...]] = ("results.json",)

    kind: Literal["eval"]
    model: ModelSection
    rewards: Rewards = Field(default_factory=exact_match)
    rollout: RolloutSection = Field(default_factory=RolloutSection)
    engine: EngineSection = Field(default_factory=EngineSection)
    eval: EvalSection
    local: LocalSection = Field(default_factory=LocalSection)


class ReportStep(StepBase):
    """The report of the run, in its directory report/; without `needs` it needs all other steps."""

    kind: Literal["report"]


Step = Annotated[
    TinyTaskStep | SftStep | RlStep | EvalStep | ReportStep,
    Field(discriminator="kind"),
]


class RunConfig(Section):
    """A whole run file, resolved: every step complete in itself."""

    name: str
    """Name of the run and of its directory: letters, digits, `.`, `_`, `-`."""
    seed: NonNegativeInt = 0
    """Seed of everything random: data order, sampling, initial weights of built models."""
    runs_dir: str = "runs"
    """Directory that holds run directories. Relative to the working directory."""
    steps: dict[str, Step]
    """The steps by name. Without any, one `rl` step called `train` and a `report` step."""
