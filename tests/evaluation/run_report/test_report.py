"""The report of runs shows what their folders hold, whatever is in them, in a file that refers to no other."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_pca.classes import ClassInfo
from dist_pca.config import TelemetryConfig, load_config, save_config
from dist_pca.errors import UserError
from dist_pca.evaluation.run_report import page as pages
from dist_pca.evaluation.run_report.page import (
    Block,
    Cell,
    Gallery,
    LegendEntry,
    Picture,
    Section,
    Table,
    Text,
    render,
)
from dist_pca.evaluation.run_report.record import read_run_folder
from dist_pca.evaluation.run_report.report import report_html, write_run_report
from dist_pca.train import write_report
from tests.evaluation.run_report.runs import SCORES, Page, line, write_folder
from tests.support.networks import run_config


def page_of(*runs: Path, baseline: int | None = None) -> Page:
    return Page(report_html([read_run_folder(run) for run in runs], baseline=baseline))


def test_it_holds_the_figures_of_the_runs_files(tmp_path: Path) -> None:
    page = page_of(write_folder(tmp_path))
    # 10 steps of 1 s, 10 of 2 s and 5 of 2.5 s.
    assert "tiny: finished, 25 of 25 steps in 42 s; 62.5 % mIoU on 12 images" in page.text
    assert page.row("road") == ["75.0"]
    assert page.row("sky") == ["50.0"]
    assert page.row("car") == ["-"]
    assert page.row("pixel accuracy") == ["80.0"]
    assert page.row("source") == ["source shards, 7 images"]
    assert page.row("ranks") == ["2 ranks on cpu"]
    assert page.row("backward") == ["1.133 (67 %)"]
    assert page.row("elsewhere") == ["0.567 (33 %)"]
    assert page.row("torch") == ["9.8.7"]
    assert "1.00 GiB" in page.text
    assert "backbone: test_resnet" in page.text
    described = [values["aria-label"] for tag, values in page.attributes if tag == "figure"]
    assert "Loss, what is minimised. Loss: 1 at step 10, 0.4 at step 25" in described
    # Neither a level without a value nor a metric that no line has.
    assert "Association, nats. features: 5 at step 10, 5 at step 25" in described
    assert not any("Self-training" in (text or "") for text in described)
    assert "Left out" not in page.text


def test_two_runs_stand_side_by_side_with_their_differences(tmp_path: Path) -> None:
    better = SCORES | {"iou": [0.85, 0.45, None], "mean_iou": 0.65}
    other = run_config().training.model_copy(update={"accumulation": 3})
    runs = write_folder(tmp_path, "before"), write_folder(tmp_path / "b", "after", scores=better)
    (runs[1] / "config.yaml").write_text(
        (runs[1] / "config.yaml").read_text().replace("accumulation: 1", f"accumulation: {other.accumulation}")
    )
    page = page_of(*runs, baseline=0)
    assert page.row("road") == ["75.0", "85.0", "+10.0"]
    assert page.row("sky") == ["50.0", "45.0", "-5.0"]
    assert page.row("car") == ["-", "-", "-"]
    assert page.row("training.accumulation") == ["1", "3"]
    assert "data.source" not in page.rows()
    assert page_of(*runs).row("road") == ["75.0", "85.0"]
    described = " ".join(values.get("aria-label") or "" for _, values in page.attributes)
    assert "before: 1 at step 10, 0.4 at step 25; after: 1 at step 10" in described


def test_every_term_of_a_run_on_the_source_alone_is_listed(tmp_path: Path) -> None:
    run = write_folder(tmp_path)
    keys = ["adapt=false", "dice.weight=0.5", "lovasz.weight=0", "source_contrast.weight=0.25"]
    config = load_config(run / "config.yaml", [f"objective.{key}" for key in keys])
    save_config(config, run / "config.yaml")
    assert "ce 1, dice 0.5, source_contrast 0.25" in page_of(run).text


def test_a_batch_that_is_given_per_rank_is_shown_over_all_ranks(tmp_path: Path) -> None:
    run = write_folder(tmp_path)
    keys = ["training.source_batch_per_rank=3", "training.target_batch_per_rank=3"]
    save_config(
        load_config(run / "config.yaml", [*keys, "training.source_batch=null", "training.target_batch=null"]),
        run / "config.yaml",
    )
    assert page_of(run).row("batch") == ["6 source and 6 target images of 16 x 16, fp32"]


def test_runs_of_the_same_name_are_told_apart_by_their_path(tmp_path: Path) -> None:
    runs = [write_folder(tmp_path / part, "run") for part in ("a", "b")]
    assert page_of(*runs).row("") == [str(run) for run in runs]


def test_scores_of_a_study_have_a_table_for_each_set_of_shards_and_count_at_the_newest_step(tmp_path: Path) -> None:
    old, new = (SCORES | {"mean_iou": value} for value in (0.1, 0.2))
    entries = [{"step": 20, "shards": "a", "scores": new}, {"step": 10, "shards": "a", "scores": old}]
    run = write_folder(tmp_path, scores=[*entries, {"step": 25, "shards": "b", "scores": SCORES}])
    page = page_of(run)
    assert "12 images of a" in page.text
    assert "12 images of b" in page.text
    assert page.row("mean IoU") == ["20.0"]


def test_a_confusion_matrix_is_shown_in_per_cent_of_its_rows(tmp_path: Path) -> None:
    page = page_of(write_folder(tmp_path, scores=SCORES | {"confusion": [[30, 10, 0], [1, 999, 0], [0, 0, 0]]}))
    matrix = [cells for heading, cells in page._rows if heading in ("road", "sky", "car") and len(cells) == 3]
    assert matrix == [["75", "25", ""], ["<1", "100", ""], ["", "", ""]]


def test_validation_during_training_has_curves_by_class_and_is_the_result_where_nothing_else_was_scored(
    tmp_path: Path,
) -> None:
    run = write_folder(tmp_path)
    (run / "scores.json").unlink()
    validated = {"validation_mean_iou": 0.4, "validation_iou": {"road": 0.6, "sky": 0.2, "car": None}}
    (run / "metrics.jsonl").write_text(json.dumps(line(25, **validated)) + "\n")
    page = page_of(run)
    assert "40.0 % mIoU on data.validation" in page.text
    described = [values["aria-label"] for tag, values in page.attributes if tag == "figure"]
    assert "road, IoU. road: 60.0 % at step 25, 60.0 % at step 25" in described
    assert not any((text or "").startswith("car") for text in described)
    assert "Scores: scores.json holds none" in page.text


def test_it_refers_to_nothing_outside_of_itself_and_every_link_leads_somewhere(tmp_path: Path) -> None:
    runs = [write_folder(tmp_path / part, part) for part in ("a", "b")]
    html = report_html([read_run_folder(run) for run in runs])
    page = Page(html)
    assert page.references
    for name, value in page.references:
        assert value.startswith("data:") if name == "src" else value[1:] in page.ids, (name, value)
    assert len(set(page.ids)) == len(page.ids)
    assert "://" not in html
    assert all(found.startswith("#") for found in re.findall(r"url\(([^)]*)\)", html))
    assert not {"script", "link", "iframe", "object", "font"} & set(page.tags)


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    classes = tuple(
        ClassInfo(name, (0, 0, 0)) for name in ("marking [/dashed]", "<b>bold</b>", 'say "$x^2$" & <script>alert(1)')
    )
    scores = SCORES | {"classes": [info.name for info in classes]}
    page = page_of(write_folder(tmp_path, "<i> & 'co'", classes=classes, scores=scores))
    assert not {"b", "i", "script"} & set(page.tags)
    for info in classes:
        assert page.row(info.name) == [next(cells for heading, cells in page._rows if heading == info.name)[0]]
    assert "Run <i> & 'co'" in page.text


@settings(max_examples=40, deadline=None)
@given(words=st.text(min_size=1).filter(lambda text: text.isprintable() and text.split() == [text]))
def test_no_word_changes_the_pages_elements(words: str) -> None:
    def page(text: str) -> Page:
        blocks: list[Block] = [
            Table(text, [text], [[text], [Cell(text, 0.5, (1, 2, 3), True)]], "bars"),
            Gallery(text, [Picture("data:,", text, text, (1, 1))], [LegendEntry(text, 0, "1 2")]),
            Text(text),
        ]
        return Page(render(text, [text], [Section("One", blocks, text)]))

    assert page(words).tags == page("word").tags
    assert page(words).words.count(words) == page("word").words.count("word") > 8


@pytest.mark.parametrize(
    ("file", "content", "note"),
    [
        ("metrics.jsonl", None, "metrics.jsonl: holds no line of metrics, so there are no curves"),
        ("metrics.jsonl", b'{"step": 6, "lo\n\xff\n[]\n{"loss": 1}\n', "metrics.jsonl: holds no line of metrics"),
        ("metrics.jsonl", b'{"step": 5, "loss": 1.5}\n{"step": 6, "lo\n\xff\n[]\n', None),
        ("scores.json", b'{"mean', "scores.json: cannot be read"),
        ("scores.json", b"[3]", "scores.json: holds no scores that can be read"),
        ("scores.json", b'{"classes": ["a"], "iou": ["x"]}', "scores.json: holds no scores that can be read"),
        ("environment.json", b"[]", "environment.json: cannot be read"),
        ("config.yaml", b"training: {steps: never}", "config.yaml: cannot be read"),
        ("config.yaml", b"\xff\xfe", "config.yaml: cannot be read"),
        ("classes.json", None, "classes.json: cannot be read"),
        ("data.json", b"{", "data.json: cannot be read"),
        (
            "scores.json",
            json.dumps(SCORES | {"classes": ["a"]}).encode(),
            "scores.json: holds no scores that can be read",
        ),
        ("scores.json", json.dumps(SCORES | {"confusion": [[1]]}).encode(), "holds no scores that can be read"),
        ("scores.json", json.dumps(SCORES | {"images": 1e999}).encode(), "holds no scores that can be read"),
        ("exit.json", b"{", None),
    ],
)
def test_a_file_that_is_missing_or_damaged_costs_its_own_content_and_is_named(
    tmp_path: Path, file: str, content: bytes | None, note: str | None
) -> None:
    run = write_folder(tmp_path)
    (run / file).unlink() if content is None else (run / file).write_bytes(content)
    page = page_of(run)
    assert "Run tiny" in page.text
    assert (note in page.text) if note else "Left out" not in page.text
    if file != "environment.json":
        assert page.row("torch") == ["9.8.7"]


@pytest.mark.parametrize("value", ["text", [1], {"a": 1}, float("nan"), float("inf"), 10**400, 1e308, True])
def test_a_metric_of_another_kind_is_no_point_of_a_curve(tmp_path: Path, value: Any) -> None:
    run = write_folder(tmp_path)
    odd = {"seconds_per_step": value, "seconds": value, "peak_memory_bytes": value, "validation_mean_iou": value}
    lines = [
        line(1),
        line(2, loss=value, kept_per_class_features=value, **odd),
        line(3),
        line(4, **{**odd, "loss": None}),
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    described = [values["aria-label"] or "" for tag, values in page_of(run).attributes if tag == "figure"]
    assert "Loss, what is minimised. Loss: 10 at step 1, 3.333 at step 3" in described


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a run folder.*name the folder that training wrote"):
        read_run_folder(tmp_path)


def test_passwords_and_signatures_are_not_shown(tmp_path: Path) -> None:
    secret = "hunter2"
    run = write_folder(tmp_path)
    config = load_config(
        run / "config.yaml",
        [
            f"data.source=https://me:{secret}@host/shards?signature={secret}",
            f"telemetry.tracker_options.tensorboard.key={secret}",
        ],
    )
    save_config(config, run / "config.yaml")
    (run / "data.json").unlink()
    (run / "scores.json").write_text(json.dumps([{"shards": f"https://host/v?signature={secret}", "scores": SCORES}]))
    words = [f"data.target=https://host/t?signature={secret}", f"telemetry.tracker_options.wandb.key={secret}"]
    (run / "environment.json").write_text(json.dumps({"command": ["train.py", *words]}))
    html = report_html([read_run_folder(run)])
    assert "https://host/shards" in html
    assert "https://host/t" in html
    assert "12 images of https://host/v<" in html
    assert secret not in html


def test_a_long_run_has_no_larger_page(tmp_path: Path) -> None:
    run = write_folder(tmp_path)
    sizes = []
    for steps in (500, 8_000):
        lines = [line(step, loss=7919 * step % 101) for step in range(1, steps + 1)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
        sizes.append(len(report_html([read_run_folder(run)])))
    assert sizes[1] < 1.5 * sizes[0]


def test_without_matplotlib_there_is_a_report_without_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = page_of(write_folder(tmp_path))
    assert page.tags["svg"] == 0
    assert page.row("road") == ["75.0"]
    assert "Curves: matplotlib is not installed; pip install 'dist-pca[plot]'" in page.text


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_and_lines_stand_out_from_the_page(scheme: int) -> None:
    style = (Path(pages.__file__).parent / "page.html").read_text()
    blocks = re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL)
    colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[scheme]))

    def luminance(color: str) -> float:
        parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        low, high = sorted(luminance(colors[name]) for name in (one, other))
        return (high + 0.05) / (low + 0.05)

    for text in ("text", "muted", "link"):
        assert min(contrast(text, "page"), contrast(text, "panel")) >= 4.5, text
    for drawn in (f"series-{number}" for number in range(6)):
        assert contrast(drawn, "page") >= 3, drawn
    assert contrast("bar", "page") >= 3


def test_training_writes_it_into_the_run_folder_and_names_it(tmp_path: Path) -> None:
    run = write_folder(tmp_path)
    config = load_config(run / "config.yaml")
    assert write_report(config) == f"; {run / 'report.html'} shows the run"
    assert (run / "report.html").read_text() == report_html([read_run_folder(run)])
    assert write_run_report(run) == run / "report.html"
    (run / "report.html").unlink()
    off = config.model_copy(update={"telemetry": TelemetryConfig(report=False)})
    assert write_report(off) == ""
    assert not (run / "report.html").exists()


def test_a_report_that_cannot_be_written_is_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_folder(tmp_path)
    (run / "report.html").mkdir()
    assert write_report(load_config(run / "config.yaml")) == ""
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("warning: no report of the run (IsADirectoryError: ")
