"""The `exact` grader."""

import pytest

from miles.rewards.exact import exact


@pytest.mark.parametrize(
    ("response", "label", "args", "score"),
    [
        ("012389", "012389", {}, 1.0),
        ("  a\t b\n", "a b", {}, 1.0),
        ("ab", "a b", {}, 0.0),
        ("7", 7, {}, 1.0),
        ("Paris", "paris", {}, 0.0),
        ("Paris", "paris", {"ignore_case": True}, 1.0),
        ("think #### 3 #### 4 ", "4", {"after": "####"}, 1.0),
        ("4", "4", {"after": "####"}, 0.0),
        ("", "", {}, 1.0),
    ],
)
def test_exact(response, label, args, score):
    assert exact("prompt", response, label, {}, **args) == score
