"""The page, written for real run directories in every state and read back with an HTML parser."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from miles.errors import ConfigError, RunError
from miles.reports.html import format_number, write_report
from miles.runs.metrics import MetricsWriter
from miles.runs.paths import RunPaths
from miles.runs.samples import SampleRecord, write_samples
from tests.reports.example_run import create_example, finished_example, write_training, write_warmup


class Page(HTMLParser):
    """Text and the tags of a page; fails on a tag that is closed without having been opened."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.source = file.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.figures: dict[str, dict[str, Any]] = {}
        self._open: list[str] = []
        self._figure = ""
        self.feed(self.source)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "figure":
            self._figure = dict(attrs).get("data-chart") or ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["script"] and self._figure:
            self.figures[self._figure] = json.loads(data)
            self._figure = ""
        elif self._open and self._open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunPaths, Page]:
    paths = finished_example(tmp_path_factory.mktemp("finished"))
    return paths, Page(write_report(paths.root))


def test_a_finished_run_shows_every_figure_and_has_it_as_png(finished: tuple[RunPaths, Page]) -> None:
    paths, page = finished
    assert {"grpo/reward", "grpo/length", "grpo/truncated", "grpo/mismatch", "grpo/mismatch-kl"} <= set(page.figures)
    assert {"grpo/entropy", "grpo/grad-norm", "grpo/loss", "grpo/lr", "grpo/time"} <= set(page.figures)
    assert {"warmup/loss", "warmup/lr", "warmup/time"} <= set(page.figures)
    pictures = {file.stem for file in (paths.root / "report").glob("*.png")}
    assert pictures == {key.replace("/", "-", 1) for key in page.figures} | {"attempts"}
    for file in (paths.root / "report").glob("*.png"):
        assert file.read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_says_what_it_was_and_what_it_reached(finished: tuple[RunPaths, Page]) -> None:
    text = finished[1].text
    assert "grpo rl, 60 of 60 steps" in text
    assert "reward 0.31" in text and "final: results" in text and "0.93" in text
    assert "qwen3-moe, 2 layers of width 128, 4 experts" in text
    assert "Seed 7" in text and "Attempts 5, 1 of them repeated a step" in text
    assert "torch 2" in text
    assert "Step 1" in text and "Step 60" in text
    assert "[steps.grpo.train]" in text
    assert "as far as it went" not in text


def test_the_page_asks_nothing_of_a_network(finished: tuple[RunPaths, Page]) -> None:
    page = finished[1]
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert "@import" not in page.source
    assert all(target.startswith("#") for target in re.findall(r"url\((.)", page.source))


def test_pictures_take_all_their_colours_from_the_page(finished: tuple[RunPaths, Page]) -> None:
    pictures = "".join(re.findall(r"<svg.*?</svg>", finished[1].source, flags=re.DOTALL))
    assert re.findall(r"#[0-9a-fA-F]{6}", pictures) == []
    assert "var(--series-1)" in pictures and "var(--ink)" in pictures


def test_ids_of_inlined_pictures_do_not_collide(finished: tuple[RunPaths, Page]) -> None:
    clips = [str(attributes["id"]) for tag, attributes in finished[1].tags if tag == "clippath"]
    assert len(clips) == len(set(clips)) > 0


def test_hover_data_names_not_a_number_as_null(finished: tuple[RunPaths, Page]) -> None:
    (series,) = finished[1].figures["grpo/grad-norm"]["series"]
    assert series["values"][series["steps"].index(30)] is None


def test_a_run_without_metrics_says_so(tmp_path: Path) -> None:
    page = Page(write_report(create_example(tmp_path).root))
    assert page.figures == {}
    assert "grpo has finished 0 of 60 steps" in page.text
    assert "No metrics were written yet" in page.text


def test_a_run_that_has_only_its_supervised_stage(tmp_path: Path) -> None:
    paths = create_example(tmp_path)
    write_warmup(paths)
    page = Page(write_report(paths.root))
    assert {key.partition("/")[0] for key in page.figures} == {"warmup"}
    assert "grpo has finished 0 of 60 steps" in page.text
    assert "warmup has finished" not in page.text


def test_a_run_of_one_step_draws_that_step(tmp_path: Path) -> None:
    paths = create_example(tmp_path)
    write_training(paths, steps=1)
    page = Page(write_report(paths.root))
    assert page.figures["grpo/time"]["series"]
    assert "Step 1" in page.text


def test_a_metric_that_never_was_a_number_is_drawn_as_such(tmp_path: Path) -> None:
    paths = create_example(tmp_path)
    for step in (1, 2):
        MetricsWriter(paths).write("grpo", step, {"loss": math.nan, "grad_norm": math.inf, "eval/reward": math.nan})
    page = Page(write_report(paths.root))
    assert page.source.count("no finite value") >= 2
    assert "reward n/a" in page.text


def test_transcripts_are_text_and_never_markup(tmp_path: Path) -> None:
    paths = create_example(tmp_path)
    hostile = "</pre><script>alert(1)</script><b>&amp;"
    write_samples(
        paths, "grpo", 1, [SampleRecord(hostile, hostile, {"answer": hostile}, None, {hostile: 1.0, "b": 2.0})]
    )
    page = Page(write_report(paths.root))
    assert "alert(1)</script>" not in page.source
    assert page.texts.count(hostile) == 2
    assert "reward n/a" in page.text


def test_a_hostile_metric_name_stays_inside_its_data(tmp_path: Path) -> None:
    paths = create_example(tmp_path)
    MetricsWriter(paths).write("grpo", 1, {"reward/<!--<script><b>": 1.0, "reward/other": 0.0})
    page = Page(write_report(paths.root))
    assert {series["label"] for series in page.figures["grpo/graders"]["series"]} == {"<!--<script><b>", "other"}


def test_a_long_response_is_cut_and_says_where_the_rest_is(tmp_path: Path) -> None:
    paths = create_example(tmp_path)
    write_samples(paths, "grpo", 1, [SampleRecord("p", "x" * 20_123, "1", 0.0)])
    assert "[123 more characters are in the files under samples/]" in Page(write_report(paths.root)).text


def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    paths = create_example(tmp_path)
    MetricsWriter(paths).write("grpo", 1, {"loss": 1.0})
    first = write_report(paths.root)
    paths.metrics.unlink()
    assert write_report(paths.root) == first
    assert [file.name for file in first.parent.iterdir()] == ["report.html"]


def test_a_directory_that_is_no_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run directory"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    with pytest.raises(ConfigError, match="matplotlib") as error:
        write_report(tmp_path)
    assert "miles-hpc[report]" in str(error.value)


@pytest.mark.parametrize(
    ("value", "text"), [(0.123456, "0.1235"), (1e-7, "1e-07"), (None, "n/a"), (math.inf, "n/a"), (60.0, "60")]
)
def test_numbers_have_four_digits(value: float | None, text: str) -> None:
    assert format_number(value) == text
