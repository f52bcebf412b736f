"""The steps of a run file that trains a built model twice. Its last table is that of the step `grpo`."""

STEPS = """
[steps.prepare]
kind = "tiny-task"
[steps.warmup]
kind = "sft"
model = "step:prepare/model"
data = "step:prepare/demonstrations.jsonl"
[steps.grpo]
kind = "rl"
model = "step:warmup/model"
data = "step:prepare/train.jsonl"
"""
