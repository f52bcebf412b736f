"""Names of graders: what resolves, and what the message says where nothing does."""

import sys

import numpy as np
import pytest

from miles.errors import DataError
from miles.rewards.exact import exact
from miles.rewards.functions import load_function, scores_of


def test_builtin_module_and_file(tmp_path, monkeypatch):
    assert load_function("exact", {"after": "="}) is exact
    (tmp_path / "graders_here.py").write_text("def fn(prompt, response, label, metadata): return 3\n")
    assert load_function(f"{tmp_path}/graders_here.py:fn", {})(1, 2, 3, 4) == 3
    monkeypatch.syspath_prepend(tmp_path)
    assert load_function("graders_here:fn", {})(1, 2, 3, 4) == 3
    assert "graders_here" in sys.modules


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("exakt", {}, ["'exakt'", "Did you mean 'exact'?", "package.module:function"]),
        ("nowhere.at_all:fn", {}, ["importing nowhere.at_all failed", "ModuleNotFoundError"]),
        ("{dir}/grader.py:scor", {}, ["no function 'scor'", "Did you mean 'score'?"]),
        ("{dir}/graders.py:score", {}, ["graders.py does not exist", "Did you mean 'grader.py'?"]),
        ("{dir}/broken.py:score", {}, ["broken.py failed", "SyntaxError"]),
        ("{dir}/grader.py:constant", {}, ["no function 'constant'"]),
        ("{dir}/grader.py:score", {"bonsu": 1}, ["'bonsu'", "Did you mean 'bonus'?"]),
        ("{dir}/grader.py:needy", {}, ["missing a required argument: 'factor'"]),
        (
            "{dir}/grader.py:short",
            {},
            ["too many positional arguments", "fn(prompt, response, label, metadata"],
        ),
    ],
)
def test_wrong_names_and_arguments(tmp_path, name, args, words):
    (tmp_path / "grader.py").write_text(
        "constant = 3\n"
        "def score(prompt, response, label, metadata, *, bonus=0): return 1\n"
        "def needy(prompt, response, label, metadata, *, factor): return 1\n"
        "def short(prompt, response): return 1\n"
    )
    (tmp_path / "broken.py").write_text("def score(:\n")
    with pytest.raises(DataError) as error:
        load_function(name.format(dir=tmp_path), args)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("result", [1, 1.0, True, np.float32(1), np.bool_(True), np.int64(1)])
def test_numbers_of_all_kinds_are_rewards(result):
    assert scores_of(result) == {"reward": 1.0}
