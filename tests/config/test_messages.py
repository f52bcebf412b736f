"""Everything that can be wrong with a run file: each message has its line, value, bound and fix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from miles.config.load import load_run
from miles.config.problems import InvalidConfigError
from miles.errors import ConfigError

HEAD = 'name = "r"\nmodel = "hf"\ndata = "prompts.jsonl"\n'
"""Three lines that are right, so that the text of a case begins at line 4."""

STEPS = """name = "r"
[steps.prepare]
kind = "tiny-task"
[steps.train]
kind = "rl"
model = "step:prepare/model"
data = "step:prepare/train.jsonl"
"""
"""Seven lines that are right."""

CASES = {
    # Keys
    "unknown top-level key": (
        'nmae = "x"\n' + HEAD,
        "run.toml:1: nmae: unknown key 'nmae' in the top level. Did you mean 'name'?",
        "fix: correct the spelling, or remove it",
    ),
    "unknown key in a section": (
        HEAD + "[train]\nlrr = 1.0",
        "run.toml:5: train.lrr: unknown key 'lrr' in [train]. Did you mean 'lr'?",
        "fix: correct the spelling, or remove it",
    ),
    "unknown key far from every other": (
        HEAD + "[local]\nxyz = 1",
        "run.toml:5: local.xyz: unknown key 'xyz' in [local].",
        "fix: the keys here are ranks, engines, threads",
    ),
    "key of another section at the top level": (
        HEAD + "group_size = 4",
        "run.toml:4: group_size: unknown key 'group_size' in the top level. It belongs in [rollout].",
        "fix: write rollout.group_size",
    ),
    "key of another section in a section": (
        HEAD + "[train]\ngroup_size = 4",
        "run.toml:5: train.group_size: unknown key 'group_size' in [train]. It belongs in [rollout].",
        "fix: write rollout.group_size",
    ),
    "key of a section in a step": (
        STEPS + "lr = 1e-6",
        "run.toml:8: steps.train.lr: unknown key 'lr' in a step of kind rl. It belongs in [train].",
        "fix: write steps.train.train.lr",
    ),
    "key of another section in a step's section": (
        STEPS + "train.group_size = 4",
        "run.toml:8: steps.train.train.group_size: unknown key 'group_size' in [train]. It belongs in [rollout].",
        "fix: write steps.train.rollout.group_size",
    ),
    "section that the kind does not have": (
        STEPS + "[steps.report]\nkind = 'report'\nrollout.group_size = 4",
        "steps.report.rollout: a step of kind report has no section rollout (its sections: slurm, container)",
        "fix: remove it, or move it to a step of kind rl or eval",
    ),
    "unknown key in a reward": (
        HEAD + '[[rewards]]\ngrader = "math"\n[[rewards]]\ngrader = "exact"\nwheight = 1.0',
        "run.toml:8: rewards[1].wheight: unknown key 'wheight' in [rewards]. Did you mean 'weight'?",
        "fix: correct the spelling, or remove it",
    ),
    "unknown key in a section that no step takes": (
        'name = "r"\n[train]\nlrr = 1.0\n[steps.prepare]\nkind = "tiny-task"',
        "run.toml:3: train.lrr: unknown key 'lrr' in [train]. Did you mean 'lr'?",
        "fix: correct the spelling, or remove it",
    ),
    "no name": ('model = "hf"\ndata = "prompts.jsonl"', "name is missing", 'fix: write name = "my-run"'),
    "no model": (
        'name = "r"\ndata = "prompts.jsonl"',
        "run.toml: model is missing: step train needs it",
        'fix: write model = "DIR" at the top of the file, or steps.train.model = "DIR" for one step',
    ),
    "no model in several steps": (
        'name = "r"\ndata = "prompts.jsonl"\n[steps.a]\nkind = "sft"\n[steps.b]\nkind = "rl"',
        "run.toml:3: model is missing: steps a, b need it",
        'fix: write model = "DIR" at the top of the file, or steps.a.model = "DIR" for one step',
    ),
    "no data": (
        'name = "r"\nmodel = "hf"',
        "data is missing: step train needs it",
        'fix: write data = "FILE.jsonl" at the top of the file',
    ),
    "no path": (
        'name = "r"\nmodel = "hf"\n[data]\nprompt = "q"',
        "run.toml:3: data.path is missing",
        'fix: write path = "..." in data',
    ),
    "no grader": (
        HEAD + "[[rewards]]\nweight = 1.0",
        "run.toml:4: rewards[0].grader is missing",
        'fix: write grader = "..." in rewards[0]',
    ),
    "step without a kind": (
        STEPS + "[steps.more]",
        "run.toml:8: steps.more: the step has no kind",
        'fix: write kind = "tiny-task", "sft", "rl", "eval" or "report"',
    ),
    "step of an unknown kind": (
        STEPS + "[steps.more]\nkind = 'evl'",
        "run.toml:9: steps.more.kind = \"evl\": no such kind of step. Did you mean 'eval'?",
        'fix: write kind = "tiny-task", "sft", "rl", "eval" or "report"',
    ),
    "steps is not a table": (
        HEAD + "steps = 3",
        "run.toml:4: steps = 3: a table is wanted",
        "fix: write [steps.NAME] tables",
    ),
    # Types and bounds
    "string for a number": (
        HEAD + '[train]\nlr = "fast"',
        'run.toml:5: train.lr = "fast" is a string: a number is wanted',
        "fix: for example the default, lr = 1e-06",
    ),
    "number for a whole number": (
        HEAD + "[train]\nsteps = 1.5",
        "run.toml:5: train.steps = 1.5 is a number: a whole number is wanted",
        "fix: for example the default, steps = 100",
    ),
    "whole number for true or false": (
        HEAD + "[tracking]\ntensorboard = 1",
        "run.toml:5: tracking.tensorboard = 1 is a whole number: true or false is wanted",
        "fix: for example the default, tensorboard = false",
    ),
    "true for a number": (
        HEAD + "[train]\nlr = true",
        "run.toml:5: train.lr = true is a true/false value: a number is wanted",
        "fix: for example the default, lr = 1e-06",
    ),
    "number for a string": (
        HEAD + "runs_dir = 3",
        "run.toml:4: runs_dir = 3 is a whole number: a string is wanted",
        'fix: for example the default, runs_dir = "runs"',
    ),
    "wrong element of a list": (
        HEAD + '[rollout]\nstop = [\n  "a",\n  3,\n]',
        "run.toml:7: rollout.stop[1] = 3 is a whole number: a string is wanted",
        "fix: for example the default, stop = []",
    ),
    "value for a section": (
        HEAD + "train = 3",
        "run.toml:4: train = 3 is a whole number: a table is wanted",
        "fix: write it as a table, [train]",
    ),
    "table for the rewards": (
        HEAD + '[rewards]\ngrader = "exact"',
        'run.toml:4: rewards = {grader = "exact"} is a table: a list of tables is wanted',
        "fix: write it as [[rewards]], with two brackets, once for each grader",
    ),
    "no rewards": (
        HEAD + "rewards = []",
        "run.toml:4: rewards = []: must not be empty",
        "fix: write it as [[rewards]]",
    ),
    "wrong type of an optional value": (
        HEAD + '[local]\nthreads = "two"',
        'run.toml:5: local.threads = "two" is a string: a whole number is wanted',
        "fix: write a whole number >= 1, or leave threads out",
    ),
    "value of an enumeration": (
        HEAD + '[train]\nbackend = "megatronn"',
        'run.toml:5: train.backend = "megatronn": must be "megatron" or "fsdp". Did you mean \'megatron\'?',
        'fix: for example the default, backend = "megatron"',
    ),
    "value of a fixed choice": (
        HEAD + '[algorithm]\nkl_estimator = "k4"',
        'run.toml:5: algorithm.kl_estimator = "k4": must be "k1", "k2" or "k3".',
        'fix: for example the default, kl_estimator = "k3"',
    ),
    "type of an enumeration": (
        HEAD + "[engine]\ndtype = 16",
        'run.toml:5: engine.dtype = 16 is a whole number: "float32" or "bfloat16" is wanted',
        'fix: write "float32" or "bfloat16", or leave dtype out',
    ),
    "below a bound": (
        HEAD + "[rollout]\ngroup_size = 0",
        "run.toml:5: rollout.group_size = 0: must be >= 1",
        "fix: for example the default, group_size = 8",
    ),
    "outside two bounds": (
        HEAD + "[rollout]\ntop_p = 1.5",
        "run.toml:5: rollout.top_p = 1.5: must be > 0 and <= 1",
        "fix: for example the default, top_p = 1.0",
    ),
    "not finite": (
        HEAD + '[[rewards]]\ngrader = "exact"\nweight = inf',
        "run.toml:6: rewards[0].weight = inf: must be finite",
        "fix: for example the default, weight = 1.0",
    ),
    # Arithmetic
    "batch that updates do not divide": (
        HEAD + "[rollout]\nprompts_per_step = 10\ngroup_size = 3\n[train]\nupdates_per_step = 4",
        "run.toml:8: rollout.prompts_per_step x rollout.group_size = 10 x 3 = 30 samples cannot be divided "
        "into train.updates_per_step = 4 equal updates",
        "fix: set train.updates_per_step to a divisor of 30; the nearest is 3",
    ),
    "group of one": (
        HEAD + "[rollout]\ngroup_size = 1",
        'run.toml:5: rollout.group_size = 1 with algorithm.name = "grpo": the advantage compares a response '
        "with its group, and in a group of one it is always 0",
        "fix: set rollout.group_size to at least 2",
    ),
    "min_lr above lr": (
        HEAD + "[train]\nlr = 1e-6\nmin_lr = 1e-5",
        "run.toml:6: train.min_lr = 1e-05 is above train.lr = 1e-06, from which it should decay",
        "fix: set train.min_lr to at most 1e-06",
    ),
    "warm-up longer than training": (
        HEAD + "[train]\nsteps = 10\nlr_warmup_steps = 11",
        "run.toml:6: train.lr_warmup_steps = 11 is more than train.steps = 10",
        "fix: set train.lr_warmup_steps to at most 10",
    ),
    "ranks that do not divide": (
        HEAD + "[train]\ntensor_parallel_size = 2\npipeline_parallel_size = 2\n[local]\nranks = 6",
        "run.toml:8: local.ranks = 6 is not divisible by train.tensor_parallel_size x "
        "train.pipeline_parallel_size = 2 x 2 = 4",
        "fix: set local.ranks to 8, or lower the parallel sizes",
    ),
    "ranks that are not written": (
        HEAD + "[train]\ntensor_parallel_size = 2",
        "run.toml:5: local.ranks = 1 is not divisible by",
        "fix: set local.ranks to 2, or lower the parallel sizes",
    ),
    "experts over too few ranks": (
        'name = "r"\nmodel = "hf-moe"\ndata = "prompts.jsonl"\n'
        "[train]\npipeline_parallel_size = 2\nexpert_parallel_size = 3\n[local]\nranks = 4",
        "run.toml:6: train.expert_parallel_size = 3 does not divide the 2 ranks of a pipeline stage "
        "(local.ranks / train.pipeline_parallel_size = 4 / 2)",
        "fix: set local.ranks to 6, or train.expert_parallel_size to a divisor of 2",
    ),
    "fsdp with tensor parallelism": (
        HEAD + '[train]\nbackend = "fsdp"\ntensor_parallel_size = 2\n[local]\nranks = 2',
        'run.toml:6: train.tensor_parallel_size = 2 with train.backend = "fsdp"',
        'fix: set train.tensor_parallel_size to 1, or train.backend to "megatron"',
    ),
    "sequence above the token budget": (
        HEAD + "[train]\nmax_tokens_per_micro_batch = 512",
        "run.toml:5: train.max_tokens_per_micro_batch = 512 is less than one sequence may have: "
        "1 prompt + 1024 response tokens = 1025",
        "fix: set train.max_tokens_per_micro_batch to at least 1025",
    ),
    "sequence above the engine's context": (
        HEAD + "[engine]\ncontext_length = 1000",
        "run.toml:5: engine.context_length = 1000 is less than one sequence may have: "
        "1 prompt + 1024 response tokens = 1025",
        "fix: set engine.context_length to at least 1025",
    ),
    "top_k of zero": (
        HEAD + "[rollout]\ntop_k = 0",
        "run.toml:5: rollout.top_k = 0: must be at least 1, or -1 for all tokens",
        "fix: write top_k = -1",
    ),
    "empty stop string": (
        HEAD + '[rollout]\nstop = [""]',
        "run.toml:5: rollout.stop has an empty string",
        'fix: remove "" from rollout.stop',
    ),
    "pass@k with too few samples": (
        HEAD + '[eval]\ndata = "prompts.jsonl"\nsamples = 2\npass_at = [1, 4]',
        "run.toml:7: eval.pass_at has k = 4, but eval.samples = 2",
        "fix: set eval.samples to at least 4, or remove 4 from eval.pass_at",
    ),
    "several greedy samples": (
        HEAD + '[eval]\ndata = "prompts.jsonl"\nsamples = 2\ntemperature = 0',
        "run.toml:6: eval.samples = 2 with eval.temperature = 0: greedy samples are all the same",
        "fix: set eval.samples to 1",
    ),
    "evaluation without data": (
        HEAD + "[eval]\nevery = 5",
        "run.toml:5: eval.every = 5 without eval.data",
        'fix: write eval.data = "FILE.jsonl", or remove eval.every',
    ),
    "eval step without data": (
        'name = "r"\nmodel = "hf"\n[steps.e]\nkind = "eval"\neval.samples = 1',
        "run.toml:5: eval.data is missing",
        'fix: write eval.data = "FILE.jsonl"',
    ),
    # State
    "neither a number nor a word": (
        HEAD + "[checkpoint]\nevery = 1.5",
        'run.toml:5: checkpoint.every = 1.5 is a number: "auto" or whole number is wanted',
        'fix: for example the default, every = "auto"',
    ),
    "number below its bound where a word may stand": (
        HEAD + "[checkpoint]\nevery = 0",
        'run.toml:5: checkpoint.every = 0: must be "auto" or >= 1',
        'fix: for example the default, every = "auto"',
    ),
    "tokens of older weights that nothing corrects": (
        HEAD + '[rollout]\nover_sampling = 1.5\n[algorithm]\nimportance_correction = "none"',
        "run.toml:7: rollout.over_sampling = 1.5 continues responses that older weights began, and with "
        'algorithm.importance_correction = "none" nothing corrects their tokens',
        'fix: set algorithm.importance_correction = "tis", or rollout.off_policy_tokens = "mask"',
    ),
    "best checkpoint by an unknown score": (
        HEAD + '[checkpoint]\nkeep_best = "eval/pass@2"',
        "run.toml:5: checkpoint.keep_best = \"eval/pass@2\": no such score. Did you mean 'eval/pass@1'?",
        "fix: use reward/mean, eval/reward or eval/pass@1",
    ),
    "best checkpoint by an evaluation that is not made": (
        HEAD + '[checkpoint]\nkeep_best = "eval/reward"',
        'run.toml:5: checkpoint.keep_best = "eval/reward", but there is no evaluation between the first step and the',
        'fix: write eval.data = "FILE.jsonl" and eval.every, or keep by reward/mean',
    ),
    "best checkpoint of a supervised step": (
        STEPS.replace('"rl"', '"sft"') + '[checkpoint]\nkeep_best = "reward/mean"',
        'run.toml:9: checkpoint.keep_best = "reward/mean": a supervised step records nothing whose highest value is',
        "fix: write it for steps of kind rl only, in [steps.NAME.checkpoint]",
    ),
    # Names and the graph
    "name of the run": (
        'name = "my run/1"\nmodel = "hf"\ndata = "prompts.jsonl"',
        'run.toml:1: name = "my run/1": a run name has letters, digits,',
        'fix: for example name = "my-run-1"',
    ),
    "name of a step": (
        STEPS + '[steps."a b"]\nkind = "report"',
        'run.toml:8: step "a b": a step name has letters, digits,',
        "fix: for example [steps.a-b]",
    ),
    "need of an unknown step": (
        STEPS + 'needs = ["prepaer"]',
        "run.toml:8: steps.train.needs: no step 'prepaer'. Did you mean 'prepare'?",
        "fix: the steps are prepare, train",
    ),
    "need of itself": (
        STEPS + 'needs = ["train"]',
        "run.toml:8: steps.train.needs: step train needs itself",
        'fix: remove "train" from it',
    ),
    "reference to an unknown step": (
        STEPS + 'eval.data = "step:prep/heldout.jsonl"',
        "run.toml:8: steps.train.eval.data = \"step:prep/heldout.jsonl\": no step 'prep'.",
        "fix: the steps are prepare, train",
    ),
    "reference to an unknown output": (
        STEPS + 'eval.data = "step:prepare/held.jsonl"',
        'run.toml:8: steps.train.eval.data = "step:prepare/held.jsonl": step prepare (kind tiny-task) has no '
        "output 'held.jsonl'. Did you mean 'heldout.jsonl'?",
        "fix: its outputs are model, demonstrations.jsonl, train.jsonl, heldout.jsonl",
    ),
    "reference to itself": (
        'name = "r"\nmodel = "step:train/model"\ndata = "prompts.jsonl"\n[steps.train]\nkind = "rl"',
        'run.toml:2: model = "step:train/model": step train refers to its own output',
        "fix: name another step, or set the key for step train only, in [steps.train]",
    ),
    "circle of steps": (
        'name = "r"\ndata = "prompts.jsonl"\n[steps.a]\nkind = "sft"\nmodel = "step:c/model"\n[steps.b]\n'
        'kind = "sft"\nmodel = "step:a/model"\n[steps.c]\nkind = "sft"\nmodel = "hf"\nneeds = ["b"]',
        "run.toml:5: steps need each other in a circle: a -> c -> b -> a",
        "fix: remove a need or a step: reference between two of them, such as a -> c",
    ),
    # Files and models
    "model directory missing": (
        'name = "r"\nmodel = "hf-mo"\ndata = "prompts.jsonl"',
        "no such directory. Did you mean 'hf-moe'?",
        "fix: name a Hugging Face model directory",
    ),
    "model is a file": (
        'name = "r"\nmodel = "prompts.jsonl"\ndata = "prompts.jsonl"',
        'prompts.jsonl": is a file, not a directory',
        "fix: name a Hugging Face model directory",
    ),
    "model directory is something else": (
        'name = "r"\nmodel = "."\ndata = "prompts.jsonl"',
        "has no config.json",
        "fix: name the directory of a Hugging Face model",
    ),
    "tokenizer missing": (
        HEAD.replace('model = "hf"', 'model = {path = "hf", tokenizer = "tok"}'),
        'tok": no such directory',
        "fix: name a directory with a tokenizer in model.tokenizer (one of tokenizer.json",
    ),
    "data file missing": (
        'name = "r"\nmodel = "hf"\ndata = "prompt.jsonl"',
        "prompt.jsonl\": no such file. Did you mean 'prompts.jsonl'?",
        "fix: correct the path; it is relative to the run file",
    ),
    "data file of another format": (
        'name = "r"\nmodel = "hf"\ndata = "prompts.csv"',
        'prompts.csv": not a .jsonl or .parquet file',
        "fix: convert the data to JSON lines (.jsonl) or Parquet (.parquet)",
    ),
    "unknown grader": (
        HEAD + '[[rewards]]\ngrader = "maths"',
        "run.toml:5: rewards[0].grader = \"maths\": no such grader. Did you mean 'math'?",
        "fix: use exact or math, package.module:function or path/file.py:function",
    ),
    "grader file missing": (
        HEAD + '[[rewards]]\ngrader = "graders.py:score"',
        'graders.py:score": no such file',
        "fix: correct the path; it is relative to the run file",
    ),
    "grader without a function": (
        HEAD + '[[rewards]]\ngrader = "grader.py:"',
        "no function after the colon",
        "fix: write package.module:function or path/file.py:function",
    ),
    "family that megatron does not know": (
        'name = "r"\nmodel = "hf-other"\ndata = "prompts.jsonl"',
        'run.toml:2: train.backend = "megatron" does not know model_type "phi3"',
        'fix: set train.backend = "fsdp"',
    ),
    "key/value heads that do not divide": (
        HEAD + "[train]\ntensor_parallel_size = 8\n[local]\nranks = 8",
        "run.toml:5: train.tensor_parallel_size = 8 does not divide the model's 4 key/value heads",
        "fix: set train.tensor_parallel_size to one of 1, 2, 4",
    ),
    "layers that do not divide": (
        HEAD + "[train]\npipeline_parallel_size = 4\n[local]\nranks = 4",
        "run.toml:5: train.pipeline_parallel_size = 4 does not divide the model's 6 layers",
        "fix: set train.pipeline_parallel_size to one of 1, 2, 3, 6",
    ),
    "experts that do not divide": (
        'name = "r"\nmodel = "hf-moe"\ndata = "prompts.jsonl"\n[train]\nexpert_parallel_size = 4\n[local]\nranks = 4',
        "run.toml:5: train.expert_parallel_size = 4 does not divide the model's 6 experts",
        "fix: set train.expert_parallel_size to one of 1, 2, 3, 6",
    ),
    "expert parallelism of a dense model": (
        HEAD + "[train]\nexpert_parallel_size = 2\n[local]\nranks = 2",
        "run.toml:5: train.expert_parallel_size = 2, but the model has no experts",
        "fix: set train.expert_parallel_size to 1",
    ),
    "layers of a model that a step builds": (
        STEPS + "train.pipeline_parallel_size = 4\nlocal.ranks = 4",
        "run.toml:8: train.pipeline_parallel_size = 4 does not divide the model's 2 layers",
        "fix: set train.pipeline_parallel_size to one of 1, 2",
    ),
    "routed experts of a dense model": (
        HEAD + "[engine]\nreturn_routed_experts = true",
        "run.toml:5: engine.return_routed_experts = true, but the model has no experts",
        "fix: set engine.return_routed_experts to false",
    ),
    "context longer than the model's": (
        HEAD + "[engine]\ncontext_length = 8192",
        "run.toml:5: engine.context_length = 8192 exceeds the model's 4096",
        "fix: set engine.context_length to at most 4096, or remove it",
    ),
    "response longer than the model's context": (
        HEAD + "[rollout]\nmax_response_tokens = 4096",
        "run.toml:5: rollout.max_response_tokens = 4096 with prompts of up to 1 tokens does not fit the "
        "model's context of 4096 tokens",
        "fix: set rollout.max_response_tokens to at most 4095",
    ),
    # Slurm
    "time limit in another form": (
        HEAD + '[slurm]\ntime = "4h"',
        'run.toml:5: slurm.time = "4h": must be minutes, [HH:]MM:SS or D-HH[:MM[:SS]], in quotes',
        'fix: for example time = "4:00:00"',
    ),
    "time limit without quotes": (
        HEAD + "[slurm]\ntime = 240",
        "run.toml:5: slurm.time = 240 is a whole number: a string is wanted",
        'fix: for example time = "4:00:00"',
    ),
    "memory in another form": (
        HEAD + '[slurm]\nmemory_per_node = "200 GB"',
        'run.toml:5: slurm.memory_per_node = "200 GB": must be megabytes, or a number with K, M, G or T, in quotes',
        'fix: for example memory_per_node = "200G"',
    ),
    "no number of nodes": (
        HEAD + "[slurm]\nnodes = 0",
        'run.toml:5: slurm.nodes = 0: must be a whole number >= 1 or a range "LOW-HIGH"',
        'fix: for example nodes = "2-4"',
    ),
    "range of nodes that is none": (
        HEAD + '[slurm]\nnodes = "two"',
        'run.toml:5: slurm.nodes = "two": must be a whole number >= 1 or a range "LOW-HIGH"',
        'fix: for example nodes = "2-4"',
    ),
    "range of nodes the wrong way round": (
        HEAD + '[slurm]\nnodes = "4-2"',
        'run.toml:5: slurm.nodes = "4-2": the range is empty',
        'fix: write "2-4"',
    ),
    "number of nodes that cannot hold the model": (
        HEAD + '[train]\ntensor_parallel_size = 4\n[local]\nranks = 2\n[slurm]\nnodes = "2-4"',
        "run.toml:9: on 3 nodes, slurm.nodes x local.ranks = 3 x 2 = 6 is not divisible by "
        "train.tensor_parallel_size x train.pipeline_parallel_size = 4 x 1 = 4",
        "fix: set local.ranks to 4, allow other numbers in slurm.nodes, or lower the parallel sizes",
    ),
    "type of GPU without GPUs": (
        HEAD + '[slurm]\ngpu_type = "h100"',
        'run.toml:5: slurm.gpu_type = "h100" without slurm.gpus_per_node: no GPU is asked for',
        "fix: set both, or neither",
    ),
    "type of GPU with a number": (
        HEAD + '[slurm]\ngpus_per_node = 8\ngpu_type = "h100:8"',
        "run.toml:6: slurm.gpu_type = \"h100:8\": a type has letters, digits, '_', '.' and '-' only",
        "fix: write the type alone, for example h100",
    ),
    "jobs that would end as they begin": (
        HEAD + '[slurm]\ntime = "5"',
        'run.toml:5: slurm.save_lead_minutes = 5 with slurm.time = "5": each job would save and end as soon '
        "as it begins",
        "fix: give the job more time, or a shorter lead",
    ),
    "signal too early for sbatch": (
        HEAD + "[slurm]\nsave_lead_minutes = 2000",
        "run.toml:5: slurm.save_lead_minutes = 2000: sbatch signals at most 1092 minutes before the end",
        "fix: set it to at most 1092",
    ),
    "chain of one job": (
        HEAD + '[slurm]\nrestart = "chain"\nchain_length = 1',
        'run.toml:6: slurm.restart = "chain" with slurm.chain_length = 1: there is no job to take over',
        "fix: set slurm.chain_length to 2 or more",
    ),
    "line break in a name of the cluster": (
        HEAD + '[slurm]\npartition = "a\\n#SBATCH --wrap=b"',
        'run.toml:5: slurm.partition = "a\\n#SBATCH --wrap=b": holds a line break or control character',
        "fix: write it on one line, or leave partition out",
    ),
    "option of sbatch that Miles sets": (
        HEAD + '[slurm.extra]\ngres = "gpu:8"',
        "run.toml:5: slurm.extra.gres: Miles sees to --gres itself",
        "fix: write slurm.gpus_per_node and slurm.gpu_type",
    ),
    "option that sbatch does not have": (
        HEAD + '[slurm.extra]\nmail_type = "END"',
        "run.toml:5: slurm.extra.mail_type: sbatch has no such option. Did you mean 'mail-type'?",
        "fix: write the long name of an option without its dashes (`sbatch --help`), for example mail-type",
    ),
    "option of sbatch without its value": (
        HEAD + "[slurm.extra]\ncomment = true",
        "run.toml:5: slurm.extra.comment = true: --comment takes a value",
        'fix: write comment = "..."',
    ),
    "option of sbatch of another type": (
        HEAD + "[slurm.extra]\nnice = 1.5",
        "run.toml:5: slurm.extra.nice = 1.5 is a number: a string, whole number or true or false is wanted",
        "fix: write a string, whole number or true or false, or leave it out",
    ),
    "template missing": (
        HEAD + '[slurm]\ntemplate = "mine.j2"',
        'mine.j2": no such file',
        "fix: correct the path; it is relative to the run file",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_one_problem_is_named_with_line_and_fix(case: str, write: Callable[..., Path]) -> None:
    text, message, fix = CASES[case]
    with pytest.raises(InvalidConfigError) as caught:
        load_run(write(text))
    told = str(caught.value)
    assert message in told
    assert fix in told
    assert len(caught.value.problems) == 1, told


def test_all_problems_of_a_file_are_told_at_once_in_its_order(write: Callable[..., Path]) -> None:
    path = write("""
nmae = "r"
model = "hf"
data = "nowhere.jsonl"

[train]
lr = "fast"
lr_warmup_steps = 200
updates_per_step = 7

[steps.warmup]
kind = "sft"
needs = ["nothing"]
[steps.train]
kind = "rl"
rollout.group_siz = 4
""")
    with pytest.raises(InvalidConfigError) as caught:
        load_run(path)
    assert str(caught.value).startswith("8 problems in run.toml\n")
    places = [str(problem.place) for problem in caught.value.problems]
    lines = [int(place.partition(":")[2]) for place in places if ":" in place]
    assert lines == [1, 3, 6, 7, 8, 12, 15]  # the missing name has no line


def test_a_bad_value_of_a_default_is_told_once_however_many_steps_take_it(write: Callable[..., Path]) -> None:
    path = write(HEAD + '[train]\nlr = -1\n[steps.a]\nkind = "sft"\n[steps.b]\nkind = "sft"')
    with pytest.raises(InvalidConfigError) as caught:
        load_run(path)
    assert [str(problem.place) for problem in caught.value.problems] == ["run.toml:5"]


def test_a_problem_of_an_extended_file_is_told_with_its_line_there(write: Callable[..., Path]) -> None:
    write("[train]\nlr = 0", "shared/base.toml")
    with pytest.raises(InvalidConfigError, match=r"shared/base\.toml:2: train\.lr = 0: must be > 0"):
        load_run(write('extends = "shared/base.toml"\n' + HEAD))


SYNTAX = {
    "missing value": (
        'name = "r"\nmodel =\n',
        "run.toml:2:8: not valid TOML: Invalid value\n    model =\n           ^",
    ),
    "open string": (
        'name = "r\n',
        "run.toml:1:10: not valid TOML: Illegal character '\\n'\n    name = \"r\n",
    ),
    "key twice": (
        "seed = 1\nseed = 2\n",
        "run.toml:2:9: not valid TOML: Cannot overwrite a value\n    seed = 2\n",
    ),
    "end of file": ("a = [1,\n2", "run.toml:2:2: not valid TOML: Unclosed array\n    2\n     ^"),
}


@pytest.mark.parametrize("case", SYNTAX)
def test_a_syntax_error_has_line_column_and_the_line_itself(case: str, write: Callable[..., Path]) -> None:
    text, message = SYNTAX[case]
    with pytest.raises(ConfigError) as caught:
        load_run(write(text))
    assert message in str(caught.value)


FILES = {
    "no such file": ("", "runn.toml: no such file. Did you mean 'run.toml'?"),
    "extended file missing": (
        'extends = "base.toml"',
        'run.toml:1: extends = "base.toml": no such file: ',
    ),
    "unknown preset": (
        'extends = "preset:dapoo"',
        "run.toml:1: extends = \"preset:dapoo\": no such preset. Did you mean 'dapo'?\n"
        "  fix: the presets are cpu, dapo, dr-grpo, grpo",
    ),
    "extends a number": ("extends = 3", "run.toml:1: extends wants file names or preset names"),
    "extends itself": (
        'extends = "run.toml"',
        "run.toml: files extend each other in a circle: run.toml -> run.toml",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_cannot_be_read_is_named(case: str, write: Callable[..., Path]) -> None:
    text, message = FILES[case]
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load_run("runn.toml" if case == "no such file" else path)
    assert message in str(caught.value)


def test_a_circle_of_files_is_shown(write: Callable[..., Path]) -> None:
    write('extends = "b.toml"', "a.toml")
    write('extends = "a.toml"', "b.toml")
    with pytest.raises(ConfigError, match=r"circle: a\.toml -> b\.toml -> a\.toml"):
        load_run("a.toml")


def test_a_file_that_is_not_utf8_is_refused(folder: Path) -> None:
    Path("run.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(ConfigError, match="byte 8 is not UTF-8"):
        load_run("run.toml")


def test_a_directory_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="hf: is a directory"):
        load_run("hf")


def test_a_config_that_cannot_be_read_is_named_with_the_reason(write: Callable[..., Path]) -> None:
    config = Path("hf/config.json")
    config.unlink()
    config.symlink_to("config.json")
    with pytest.raises(InvalidConfigError, match=r"config\.json cannot be read: Too many levels of symbolic"):
        load_run(write(HEAD))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", "config.json is not valid JSON"),
        ("config.json", "[]", "config.json is not a JSON object"),
        ("model.safetensors", None, "has no weights (*.safetensors)"),
        ("tokenizer.json", None, "has no tokenizer"),
    ],
)
def test_a_damaged_model_directory(write: Callable[..., Path], file: str, content: str | None, message: str) -> None:
    damaged = Path("hf") / file
    damaged.unlink() if content is None else damaged.write_text(content)
    with pytest.raises(InvalidConfigError) as caught:
        load_run(write(HEAD))
    assert message in str(caught.value)
    assert len(caught.value.problems) == 1
