"""Prompts and demonstrations from real files through a real tokenizer, and every message for bad data."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from miles.config.schema import DataSection
from miles.data.prompts import load_demonstrations, load_prompts
from miles.data.template import end_token_ids, load_tokenizer
from miles.errors import DataError
from miles.models.tiny import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def jsonl(path: Path, *rows) -> DataSection:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return DataSection(path=str(path))


def test_prompts_get_template_label_metadata_and_id(tmp_path, tokenizer):
    data = jsonl(
        tmp_path / "train.jsonl",
        {"id": "a", "prompt": "1+1", "label": 2, "metadata": {"level": 1}},
        "",
        {
            "id": 7,
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
            "label": "x",
        },
    )
    first, second = load_prompts(data, tokenizer, max_prompt_tokens=100)
    assert (first.id, first.label, first.metadata) == ("a", 2, {"level": 1})
    assert first.text == "<|user|>1+1<|end|><|assistant|>"
    assert tokenizer.decode(first.tokens) == first.text and len(first.tokens) == 6
    assert (second.id, second.metadata) == ("7", {})
    assert second.text == "<|system|>s<|end|><|user|>u<|end|><|assistant|>"


def test_system_message_goes_before_plain_strings_only(tmp_path, tokenizer):
    data = jsonl(tmp_path / "d.jsonl", {"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]})
    plain, chat = load_prompts(data.model_copy(update={"system": "be brief"}), tokenizer, max_prompt_tokens=100)
    assert plain.text.startswith("<|system|>be brief<|end|>")
    assert chat.text == "<|user|>b<|end|><|assistant|>"


def test_template_args_reach_the_template(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if think %}[think]{% endif %}"
    data = jsonl(tmp_path / "d.jsonl", {"prompt": "a"}).model_copy(update={"template_args": {"think": True}})
    assert load_prompts(data, tokenizer, max_prompt_tokens=100)[0].text == "a[think]"


def test_without_chat_template_a_prompt_stays_as_it_is(tmp_path, tokenizer):
    data = jsonl(tmp_path / "d.jsonl", {"prompt": " a b"}).model_copy(update={"chat_template": False})
    prompt = load_prompts(data, tokenizer, max_prompt_tokens=100)[0]
    assert prompt.text == " a b" and tokenizer.decode(prompt.tokens) == " a b"


def test_parquet_reads_like_jsonl(tmp_path, tokenizer):
    rows = [
        {"question": [{"role": "user", "content": "hi", "name": None}], "answer": "1", "extra": {"n": 1}},
        {"question": [{"role": "user", "content": "yo", "name": "x"}], "answer": "2", "extra": {"n": 2}},
    ]
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    columns = {"prompt": "question", "label": "answer", "metadata": "extra"}
    from_parquet = load_prompts(DataSection(path=str(path), **columns), tokenizer, max_prompt_tokens=50)
    section = jsonl(tmp_path / "train.jsonl", *rows).model_copy(update=columns)
    from_jsonl = load_prompts(section, tokenizer, max_prompt_tokens=50)
    assert from_parquet == from_jsonl
    assert [(prompt.label, prompt.metadata) for prompt in from_parquet] == [("1", {"n": 1}), ("2", {"n": 2})]


def test_ids_of_rows_without_one_depend_on_content_not_on_position(tmp_path, tokenizer):
    a, b = {"prompt": "a", "label": "1"}, {"prompt": "b", "label": "2"}
    first = load_prompts(jsonl(tmp_path / "1.jsonl", a, b, a), tokenizer, max_prompt_tokens=50)
    second = load_prompts(jsonl(tmp_path / "2.jsonl", b, a), tokenizer, max_prompt_tokens=50)
    assert (second[1].id, second[0].id) == (first[0].id, first[1].id)
    assert len({prompt.id for prompt in first}) == 3


def test_too_long_prompts_are_dropped_on_request(tmp_path, tokenizer, caplog):
    data = jsonl(tmp_path / "d.jsonl", {"prompt": "x" * 50}, {"prompt": "ok"}, {"prompt": "y" * 60})
    kept = load_prompts(data.model_copy(update={"too_long": "drop"}), tokenizer, max_prompt_tokens=20)
    assert [prompt.text for prompt in kept] == ["<|user|>ok<|end|><|assistant|>"]
    assert "2 of 3 rows" in caplog.text


def test_demonstrations_train_on_the_response_and_its_end(tmp_path, tokenizer):
    data = jsonl(tmp_path / "d.jsonl", {"prompt": "sort 21", "response": "12"})
    end = [tokenizer.eos_token_id]
    row = load_demonstrations(data, tokenizer, max_tokens=50, end_tokens=end)[0]
    assert tokenizer.decode(row.tokens.tolist()) == "<|user|>sort 21<|end|><|assistant|>12<|end|>"
    trained = row.tokens[row.loss_mask.bool()].tolist()
    assert tokenizer.decode(trained) == "12<|end|>"
    assert row.weights.equal(row.loss_mask)
    prompt = load_prompts(data, tokenizer, max_prompt_tokens=50)[0]
    assert row.tokens.tolist()[: len(prompt.tokens)] == prompt.tokens


def test_demonstrations_end_at_the_end_token_whatever_the_template_adds(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    data = jsonl(tmp_path / "d.jsonl", {"prompt": "p", "response": "r"})
    end = [tokenizer.eos_token_id]
    row = load_demonstrations(data, tokenizer, max_tokens=50, end_tokens=end)[0]
    assert tokenizer.decode(row.tokens[row.loss_mask.bool()].tolist()) == "r<|end|>"
    plain = data.model_copy(update={"chat_template": False})
    row = load_demonstrations(plain, tokenizer, max_tokens=50, end_tokens=end)[0]
    assert tokenizer.decode(row.tokens.tolist()) == "pr<|end|>"
    assert row.loss_mask.tolist() == [0.0, 1.0, 1.0]


def test_a_template_that_rewrites_the_prompt_is_refused(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{{ messages[-1]['content'] }}"
    data = jsonl(tmp_path / "d.jsonl", {"prompt": "p", "response": "r"})
    with pytest.raises(DataError, match=r"d\.jsonl:1.*differently once a response follows"):
        load_demonstrations(data, tokenizer, max_tokens=50, end_tokens=[2])


GOOD = {"id": 1, "prompt": "a", "label": "b"}


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        ([], {}, ["d.jsonl", "no rows"]),
        ([GOOD, "{oops"], {}, ["d.jsonl:2", "not JSON", "column 2"]),
        ([GOOD, "[1, 2]"], {}, ["d.jsonl:2", "an array", "one JSON object per line"]),
        ([{"promt": "a"}], {}, ["d.jsonl:1", "'prompt'", "Did you mean 'promt'?", "data.prompt"]),
        ([GOOD], {"label": "labell"}, ["'labell'", "Did you mean 'label'?"]),
        ([GOOD, {"id": 2, "prompt": "c"}], {}, ["d.jsonl:2", "'label'", "1 of 2 rows"]),
        ([{"prompt": "  "}], {}, ["d.jsonl:1", "empty"]),
        ([{"prompt": []}], {}, ["d.jsonl:1", "empty"]),
        ([{"prompt": 3}], {}, ["d.jsonl:1", "is a number"]),
        ([{"prompt": [{"content": "a"}]}], {}, ["d.jsonl:1", "message 1", "no role"]),
        ([GOOD, GOOD], {}, ["d.jsonl:2", "'1'", "d.jsonl:1"]),
        ([{**GOOD, "id": 1.5}], {}, ["d.jsonl:1", "id is 1.5"]),
        ([{**GOOD, "metadata": "x"}], {}, ["d.jsonl:1", "'metadata'", "not an object"]),
        (
            [GOOD, {"id": 2, "prompt": "x" * 200, "label": ""}],
            {},
            ["d.jsonl:2", "203", "at most 100", "1 of 2"],
        ),
        ([GOOD], {"max_prompt_tokens": 3}, ["d.jsonl:1", "4 tokens", "at most 3"]),
        ([GOOD], {"max_prompt_tokens": 3, "too_long": "drop"}, ["at most 3", "1 of 1"]),
        ([GOOD], {"chat_template": False, "system": "s"}, ["data.system", "chat_template"]),
        ([{"prompt": [{"role": "user", "content": "a"}]}], {"chat_template": False}, ["is an array"]),
    ],
)
def test_bad_data_says_where_what_and_how_to_fix_it(tmp_path, tokenizer, rows, changes, words):
    section = jsonl(tmp_path / "d.jsonl", *rows)
    data = DataSection(path=section.path, **changes)
    with pytest.raises(DataError) as error:
        load_prompts(data, tokenizer, max_prompt_tokens=100)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert error.value.fix


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("trian.jsonl", None, ["does not exist", "Did you mean 'train.jsonl'?"]),
        ("data.csv", b"a,b\n", ["'.csv'", ".jsonl", ".parquet"]),
        ("bad.parquet", b"not parquet", ["cannot be read as Parquet"]),
        ("latin.jsonl", '{"prompt": "é"}'.encode("latin-1"), ["latin.jsonl:1", "not UTF-8"]),
        (".", None, ["is a directory"]),
    ],
)
def test_unreadable_files(tmp_path, tokenizer, name, content, words):
    jsonl(tmp_path / "train.jsonl", GOOD)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        load_prompts(DataSection(path=str(tmp_path / name)), tokenizer, max_prompt_tokens=100)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_model_without_chat_template(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"no chat template(.|\n)*data\.chat_template = false"):
        load_prompts(jsonl(tmp_path / "d.jsonl", GOOD), tokenizer, max_prompt_tokens=100)


def test_a_template_that_refuses_a_conversation_is_an_error_of_that_row(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
    with pytest.raises(DataError, match=r"d\.jsonl:1.*no system role here"):
        load_prompts(jsonl(tmp_path / "d.jsonl", GOOD), tokenizer, max_prompt_tokens=100)


def test_load_tokenizer_names_what_is_missing(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)


def test_end_tokens_are_those_of_tokenizer_and_generation_config(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert end_token_ids(tmp_path, loaded) == [tokenizer.eos_token_id]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 1]}')
    assert end_token_ids(tmp_path, loaded) == [1, tokenizer.eos_token_id, 5]
    loaded.eos_token = None
    (tmp_path / "generation_config.json").write_text("{}")
    with pytest.raises(DataError, match="end-of-sequence"):
        end_token_ids(tmp_path, loaded)
