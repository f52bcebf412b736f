"""The own-data example: its file loads, its data and its grader fit together."""

import asyncio
from pathlib import Path

from miles.config.load import load_run
from miles.config.schema import RlStep, SftStep
from miles.data.prompts import load_demonstrations, load_prompts
from miles.data.sample import Group, Sample
from miles.models.tiny import build_tokenizer
from miles.rewards.grader import build_grader

RUN_FILE = Path(__file__).parents[2] / "examples" / "own-data" / "run.toml"


def test_data_and_graders_work_as_the_run_file_says():
    steps = load_run(RUN_FILE).steps
    train, warmup = steps["train"], steps["warmup"]
    assert isinstance(train, RlStep) and isinstance(warmup, SftStep) and train.eval.data is not None
    tokenizer = build_tokenizer()
    prompts = load_prompts(train.data, tokenizer, max_prompt_tokens=64)
    heldout = load_prompts(train.eval.data, tokenizer, max_prompt_tokens=64)
    demonstrations = load_demonstrations(warmup.data, tokenizer, max_tokens=64, end_tokens=[tokenizer.eos_token_id])
    assert not {prompt.text for prompt in prompts} & {prompt.text for prompt in heldout}
    assert len(demonstrations) >= warmup.train.batch_size

    prompt = prompts[0]
    texts = [prompt.label, prompt.label[:2], prompt.label + "x", ""]
    samples = [Sample(prompt, index, seed=0, text=text) for index, text in enumerate(texts)]
    grader = build_grader(train.rewards)
    try:
        grader.check([*prompts, *heldout])
        asyncio.run(grader.grade([Group(prompt, samples)]))
    finally:
        grader.close()
    rewards = [round(sample.reward or 0.0, 6) for sample in samples]
    assert rewards == [1.0, round(1 / 3, 6), 0.45, 0.0]
    assert samples[2].reward_parts == {"characters": 0.9, "characters/surplus": 1.0, "exact": 0.0}
