"""Arithmetic between the values of one step: combinations that cannot work, each with its bound and fix.

Pure functions of a validated step. What needs files is in `miles.config.model_checks`, what needs the other
steps in `miles.config.graph_checks`.
"""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.cluster import SlurmSection
from miles.config.problems import Finding, shown
from miles.config.schema import (
    AlgorithmSection,
    Backend,
    CheckpointSection,
    DataSection,
    EngineSection,
    EvalSection,
    EvalStep,
    LocalSection,
    RewardSection,
    RlStep,
    RolloutSection,
    RunConfig,
    SftStep,
    StepBase,
    TrainSection,
)
from miles.config.slurm_rules import node_bounds, slurm_findings
from miles.errors import ConfigError, did_you_mean

GRADERS = ("exact", "math")
"""Graders that are named without a module."""
MAX_NODES_CHECKED = 1024
"""Numbers of a range of nodes that are looked at one by one."""


def step_findings(step: StepBase) -> Iterator[Finding]:
    """Everything that cannot work together in one step."""
    yield from slurm_findings(step.slurm)
    match step:
        case SftStep():
            yield from _schedule(step.train)
            yield from _parallelism(step.train, step.local, step.slurm)
            yield from _data(step.data, "data")
            yield from _best_checkpoint(step.checkpoint, None)
        case RlStep():
            yield from _schedule(step.train)
            yield from _parallelism(step.train, step.local, step.slurm)
            yield from _data(step.data, "data")
            yield from _batch(step.rollout, step.algorithm, step.train)
            yield from _lengths(step.data, step.rollout, step.train, step.engine)
            yield from _sampling(step.rollout)
            yield from _rewards(step.rewards)
            yield from _evaluation(step.eval, required=False)
            yield from _off_policy(step.rollout, step.algorithm)
            yield from _best_checkpoint(step.checkpoint, step.eval)
        case EvalStep():
            yield from _sampling(step.rollout)
            yield from _rewards(step.rewards)
            yield from _evaluation(step.eval, required=True)


def refuse_ranks_of_one_node(config: RunConfig) -> None:
    """Raise ConfigError for a step that several nodes can hold, as was checked, but this one (`--local`) not."""
    for name, step in config.steps.items():
        if isinstance(step, SftStep | RlStep) and step.train.backend is Backend.MEGATRON:
            finding = _ranks_of_model(step.train, step.local, nodes=1)
            if finding is not None:
                raise ConfigError(f"step '{name}' needs several nodes: on this one, {finding.message}", fix=finding.fix)


def _finding(keys: str, message: str, fix: str) -> Finding:
    return Finding(tuple(tuple(key.split(".")) for key in keys.split()), message, fix)


def _schedule(train: TrainSection) -> Iterator[Finding]:
    if train.min_lr > train.lr:
        yield _finding(
            "train.min_lr train.lr",
            f"train.min_lr = {train.min_lr:g} is above train.lr = {train.lr:g}, from which it should decay",
            f"set train.min_lr to at most {train.lr:g}",
        )
    if train.lr_warmup_steps > train.steps:
        yield _finding(
            "train.lr_warmup_steps train.steps",
            f"train.lr_warmup_steps = {train.lr_warmup_steps} is more than train.steps = {train.steps}: "
            "the rate would never reach train.lr",
            f"set train.lr_warmup_steps to at most {train.steps}",
        )


def _parallelism(train: TrainSection, local: LocalSection, slurm: SlurmSection) -> Iterator[Finding]:
    sizes = {
        "tensor_parallel_size": train.tensor_parallel_size,
        "pipeline_parallel_size": train.pipeline_parallel_size,
        "expert_parallel_size": train.expert_parallel_size,
    }
    if train.backend is Backend.FSDP:
        for name, size in sizes.items():
            if size > 1:
                yield _finding(
                    f"train.{name} train.backend",
                    f'train.{name} = {size} with train.backend = "fsdp", with data-parallel ranks only',
                    f'set train.{name} to 1, or train.backend to "megatron"',
                )
        return
    low, high = node_bounds(slurm)
    for nodes in range(low, min(high, low + MAX_NODES_CHECKED) + 1):
        if finding := _ranks_of_model(train, local, nodes):
            yield finding
            return


def _ranks_of_model(train: TrainSection, local: LocalSection, nodes: int) -> Finding | None:
    """Why this number of nodes cannot hold the model, if it cannot."""
    ranks = nodes * local.ranks
    key, given = "local.ranks", "local.ranks"
    if nodes > 1:
        key, given = "slurm.nodes local.ranks", f"on {nodes} nodes, slurm.nodes x local.ranks = {nodes} x {local.ranks}"
    fix_nodes = ", allow other numbers in slurm.nodes" if nodes > 1 else ""
    model_ranks = train.tensor_parallel_size * train.pipeline_parallel_size
    if ranks % model_ranks:
        return _finding(
            f"{key} train.tensor_parallel_size train.pipeline_parallel_size",
            f"{given} = {ranks} is not divisible by train.tensor_parallel_size x "
            f"train.pipeline_parallel_size = {train.tensor_parallel_size} x {train.pipeline_parallel_size} "
            f"= {model_ranks}",
            f"set local.ranks to {_next_multiple(local.ranks, model_ranks)}{fix_nodes}, or lower the parallel sizes",
        )
    stage = ranks // train.pipeline_parallel_size
    if stage % train.expert_parallel_size:
        wanted = train.pipeline_parallel_size * _next_multiple(
            -(-local.ranks // train.pipeline_parallel_size), train.expert_parallel_size
        )
        return _finding(
            f"train.expert_parallel_size {key} train.pipeline_parallel_size",
            f"train.expert_parallel_size = {train.expert_parallel_size} does not divide the {stage} ranks of "
            f"a pipeline stage ({given} / train.pipeline_parallel_size = {ranks} / {train.pipeline_parallel_size})",
            f"set local.ranks to {wanted}{fix_nodes}, or train.expert_parallel_size to a divisor of {stage}",
        )
    return None


def _batch(rollout: RolloutSection, algorithm: AlgorithmSection, train: TrainSection) -> Iterator[Finding]:
    samples = rollout.prompts_per_step * rollout.group_size
    if samples % train.updates_per_step:
        divisors = [n for n in range(1, samples + 1) if samples % n == 0]
        near = min(divisors, key=lambda n: (abs(n - train.updates_per_step), n))
        yield _finding(
            "train.updates_per_step rollout.prompts_per_step rollout.group_size",
            f"rollout.prompts_per_step x rollout.group_size = {rollout.prompts_per_step} x "
            f"{rollout.group_size} = {samples} samples cannot be divided into train.updates_per_step = "
            f"{train.updates_per_step} equal updates",
            f"set train.updates_per_step to a divisor of {samples}; the nearest is {near}",
        )
    if rollout.group_size == 1:
        yield _finding(
            "rollout.group_size algorithm.normalize_std algorithm.name",
            f'rollout.group_size = 1 with algorithm.name = "{algorithm.name}": the advantage '
            "compares a response with its group, and in a group of one it is always 0",
            "set rollout.group_size to at least 2",
        )


def _lengths(
    data: DataSection, rollout: RolloutSection, train: TrainSection, engine: EngineSection
) -> Iterator[Finding]:
    prompt = data.max_prompt_tokens or 1
    longest = prompt + rollout.max_response_tokens
    parts = f"{prompt} prompt + {rollout.max_response_tokens} response tokens"
    keys = "rollout.max_response_tokens data.max_prompt_tokens"
    if longest > train.max_tokens_per_micro_batch:
        yield _finding(
            f"train.max_tokens_per_micro_batch {keys}",
            f"train.max_tokens_per_micro_batch = {train.max_tokens_per_micro_batch} is less than one "
            f"sequence may have: {parts} = {longest}",
            f"set train.max_tokens_per_micro_batch to at least {longest}, or lower those",
        )
    if engine.context_length is not None and longest > engine.context_length:
        yield _finding(
            f"engine.context_length {keys}",
            f"engine.context_length = {engine.context_length} is less than one sequence may have: {parts} = {longest}",
            f"set engine.context_length to at least {longest}, or shorten the responses",
        )


def _sampling(rollout: RolloutSection) -> Iterator[Finding]:
    if rollout.top_k < 1 and rollout.top_k != -1:
        yield _finding(
            "rollout.top_k",
            f"rollout.top_k = {rollout.top_k}: must be at least 1, or -1 for all tokens",
            "write top_k = -1",
        )
    if "" in rollout.stop:
        yield _finding(
            "rollout.stop",
            "rollout.stop has an empty string, which every response contains from the start",
            'remove "" from rollout.stop',
        )


def _off_policy(rollout: RolloutSection, algorithm: AlgorithmSection) -> Iterator[Finding]:
    if (
        rollout.over_sampling > 1
        and rollout.off_policy_tokens == "correct"
        and algorithm.importance_correction == "none"
    ):
        yield _finding(
            "algorithm.importance_correction rollout.off_policy_tokens rollout.over_sampling",
            f"rollout.over_sampling = {rollout.over_sampling:g} continues responses that older weights began, and with "
            'algorithm.importance_correction = "none" nothing corrects their tokens',
            'set algorithm.importance_correction = "tis", or rollout.off_policy_tokens = "mask"',
        )


def _best_checkpoint(section: CheckpointSection, evaluation: EvalSection | None) -> Iterator[Finding]:
    """`evaluation` is None for a supervised step."""
    name = section.keep_best
    if name is None:
        return
    given = f"checkpoint.keep_best = {shown(name)}"
    if evaluation is None:
        yield _finding(
            "checkpoint.keep_best",
            f"{given}: a supervised step records nothing whose highest value is the best",
            "write it for steps of kind rl only, in [steps.NAME.checkpoint]",
        )
        return
    scores = ["eval/reward", *(f"eval/pass@{k}" for k in evaluation.pass_at)]
    if name not in scores and not name.startswith("reward/"):
        yield _finding(
            "checkpoint.keep_best eval.pass_at",
            f"{given}: no such score.{did_you_mean(name, [*scores, 'reward/mean'])}",
            f"use reward/mean, {' or '.join(scores)}",
        )
    elif name in scores and (evaluation.data is None or not evaluation.every):
        missing = 'eval.data = "FILE.jsonl"' if evaluation.data is None else "eval.every"
        yield _finding(
            "checkpoint.keep_best eval.every",
            f"{given}, but there is no evaluation between the first step and the last",
            f"write {missing}{' and eval.every' if evaluation.data is None else ''}, or keep by reward/mean",
        )


def _rewards(rewards: list[RewardSection]) -> Iterator[Finding]:
    for index, reward in enumerate(rewards):
        module, colon, function = reward.grader.partition(":")
        keys = (("rewards", index, "grader"),)
        if not colon and module not in GRADERS:
            hint = did_you_mean(module, GRADERS)
            yield Finding(
                keys,
                f'rewards[{index}].grader = "{reward.grader}": no such grader.{hint}',
                f"use {' or '.join(GRADERS)}, package.module:function or path/file.py:function",
            )
        elif colon and not (module and function.isidentifier()):
            yield Finding(
                keys,
                f'rewards[{index}].grader = "{reward.grader}": no function after the colon',
                "write package.module:function or path/file.py:function",
            )


def _evaluation(section: EvalSection, *, required: bool) -> Iterator[Finding]:
    if section.data is not None:
        yield from _data(section.data, "eval.data")
    elif required:
        yield _finding("eval", "eval.data is missing: an eval step needs it", 'write eval.data = "FILE.jsonl"')
    elif section.every:
        yield _finding(
            "eval.every",
            f"eval.every = {section.every} without eval.data: there is nothing to evaluate on",
            'write eval.data = "FILE.jsonl", or remove eval.every',
        )
    if (largest := max(section.pass_at, default=0)) > section.samples:
        yield _finding(
            "eval.pass_at eval.samples",
            f"eval.pass_at has k = {largest}, but eval.samples = {section.samples}: pass@k needs k samples",
            f"set eval.samples to at least {largest}, or remove {largest} from eval.pass_at",
        )
    if section.temperature == 0 and section.samples > 1:
        yield _finding(
            "eval.samples eval.temperature",
            f"eval.samples = {section.samples} with eval.temperature = 0: greedy samples are all the same",
            "set eval.samples to 1 and eval.pass_at to [1], or eval.temperature above 0",
        )


def _data(data: DataSection, key: str) -> Iterator[Finding]:
    if not data.path.endswith((".jsonl", ".parquet")):
        yield _finding(
            f"{key}.path",
            f'{key}.path = "{data.path}": not a .jsonl or .parquet file',
            "convert the data to JSON lines (.jsonl) or Parquet (.parquet)",
        )


def _next_multiple(value: int, of: int) -> int:
    return -(-value // of) * of
