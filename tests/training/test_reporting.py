"""What a run says while it trains, and when it cannot go on."""

from __future__ import annotations

import json
import math
import re
import resource
from pathlib import Path

import pytest
import yaml

from dsllama.checkpoint.catalog import list_checkpoints
from dsllama.errors import UserError
from dsllama.files import write_own
from dsllama.training.reporting import COLUMNS, Report, Row, events_folder, log_problem, read_log
from dsllama.training.run import note_start
from tests.campaign import UPDATES, Campaign
from tests.conftest import TinyData, starts_processes

pytestmark = starts_processes


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(
    campaign: Campaign,
) -> None:
    ended, trained = campaign.ended("diverging"), campaign.runs["diverging", 1]
    assert ended.code == 1
    assert re.search(
        r"training stopped: (the loss is (nan|inf) at update|updates \d+ to \d+ .* the gradients are not finite)",
        ended.complained,
    )
    assert "The last good checkpoint is" in ended.complained and "Traceback" not in ended.complained
    newest = json.loads((list_checkpoints(trained.folder / "checkpoints")[-1] / "manifest.json").read_text())
    assert math.isfinite(newest["loss"])


def test_console_csv_and_tensorboard_say_the_same(campaign: Campaign) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained, said = campaign.run("reporting"), campaign.ended("reporting").said
    rows = trained.rows()
    events = EventAccumulator(str(trained.folder / "tensorboard" / "log-1"))
    events.Reload()
    for name in ("loss", "perplexity", "learning_rate", "grad_norm", "tokens_per_second", "skipped_updates"):
        told = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert [step for step, _ in told] == [int(row["tokens_total"]) for row in rows]
        assert [value for _, value in told] == pytest.approx([float(row[name]) for row in rows], rel=1e-6)
    console = re.findall(r"^ *(\d+)/20 .* loss ([\d.]+) \|", said, re.MULTILINE)
    assert [(int(s), float(loss)) for s, loss in console] == [
        (int(row["update"]), pytest.approx(float(row["loss"]), abs=6e-5)) for row in rows
    ]
    assert [int(row["update"]) for row in rows if row["validation_loss"]] == [5, 10, 15, 20]
    # The textbook's interval: eval_interval, then 1.5 times as far each time.
    samples = (trained.folder / "log.samples.txt").read_text()
    assert re.findall(r"=== update (\d+),", samples)[::2] == ["5", "8", "12", "18"] and samples.count("the dog") == 8
    texts = [text.strip() for text in re.split(r"=== update .*\n", samples) if text.strip()]
    assert all(first != second for first, second in zip(texts[::2], texts[1::2], strict=True))
    saved = yaml.safe_load((trained.folder / "checkpoints" / "starts" / "0001" / "config.yaml").read_text())
    assert saved["seed"] == 3 and saved["validation_tokens"] == 1000
    ds_json = json.loads((trained.folder / "checkpoints" / "starts" / "0001" / "deepspeed.json").read_text())
    assert ds_json["train_batch_size"] == 8 and '"auto"' not in json.dumps(ds_json)


def test_each_start_is_noted_and_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("# mine")
    assert [note_start(tmp_path, {"config.yaml": text}).name for text in "ab"] == ["0001", "0002"]
    assert (tmp_path / "config.yaml").read_text() == "# mine"
    assert [file.read_text() for file in sorted(tmp_path.glob("starts/*/config.yaml"))] == ["a", "b"]


def test_events_of_runs_are_kept_apart_and_a_resumed_run_goes_on_in_its_own(tmp_path: Path) -> None:
    def events(log: str, resumed: bool) -> str:
        folder = events_folder(tmp_path, Path(log), resumed)
        folder.mkdir(exist_ok=True)
        return folder.name

    starts = [("a.csv", False), ("b.csv", False), ("a.csv", False), ("a.csv", True), ("b.csv", True), ("c.csv", True)]
    assert [events(*start) for start in starts] == ["a-1", "b-1", "a-2", "a-2", "b-1", "c-1"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_said_and_the_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def row(update: int) -> Row:
        return Row(update, 0.5, 1.0, 2.7, 1e-3, 0.1, update * 256, update * 256, 100.0, 1.0)

    report = Report(tmp_path / "log.csv", tmp_path / "tensorboard", 0, 0)
    report.row(row(1), 9, 1.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "log.csv").stat().st_size, limits[1]))
    try:
        report.row(row(2), 9, 1.0)
        report.row(row(3), 9, 1.0)
        report.sample(3, 768, ["text" * 200])
        report.plot()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    report.row(row(4), 9, 1.0)
    report.close()
    said = capsys.readouterr().out
    assert (
        said.count(f"WARNING: the log {tmp_path / 'log.csv'} cannot be written (File too large); the run goes on") == 1
    )
    assert "log.samples.txt cannot be written" in said and "the plot cannot be written" in said
    assert [each["update"] for each in read_log(tmp_path / "log.csv")] == ["1", "2", "3", "4"]
    events = EventAccumulator(str(tmp_path / "tensorboard" / "log-1"))
    events.Reload()
    assert {1, 4} <= {event.step // 256 for event in events.Scalars("train/loss")}


def test_the_smoothed_line_is_the_mean_of_neighbours() -> None:
    from dsllama.training.reporting import smoothed

    assert smoothed([3.0]) == [3.0] and smoothed([]) == []
    assert smoothed([1.0, 2.0, 6.0, 3.0]) == [1.5, 3.0, pytest.approx(11 / 3), 4.5]
    assert smoothed([5.0] * 1000) == pytest.approx([5.0] * 1000)


def test_rows_that_are_none_are_moved_aside_with_those_that_a_resumed_run_makes_anew(tmp_path: Path) -> None:
    def row(step: str) -> str:
        return ",".join({"update": step, "tokens_total": "256"}.get(name, "1.5") for name in COLUMNS)

    log = tmp_path / "log.csv"
    log.write_text("\n".join([",".join(COLUMNS), row("1"), row("two"), row("3"), row("4"), "5,0.2"]))
    Report(log, tmp_path / "tensorboard", resumed_from=3, resumed_tokens=768).close()
    assert [kept["update"] for kept in read_log(log)] == ["1", "3"]
    aside = log.with_name("log.csv.superseded").read_text().splitlines()
    assert [line.split(",")[0] for line in aside] == ["update", "two", "4"]


def test_a_log_of_an_earlier_version_with_fewer_columns_is_gone_on_with(tmp_path: Path) -> None:
    log, earlier = tmp_path / "log.csv", COLUMNS[: COLUMNS.index("skipped_updates") + 1]
    rows = [[str(update), *["0.5"] * 5, "256", "256", *["0.5"] * 2, "", "", "", "0"] for update in (1, 2, 3)]
    log.write_text("".join(",".join(row) + "\n" for row in [earlier, *rows]))
    assert log_problem(log) is None
    Report(log, tmp_path / "tensorboard", resumed_from=2, resumed_tokens=512).close()
    assert log.read_text().splitlines()[0] == ",".join(COLUMNS)
    assert [row["update"] for row in read_log(log)] == ["1", "2"]
    log.write_text("update,colour\n")
    assert log_problem(log) is not None


def test_a_run_keeps_the_tokenizer_that_it_began_with(campaign: Campaign, tiny_data: TinyData) -> None:
    # Its file was removed while the run was training.
    saved = campaign.run("without_tokenizer").checkpoint(UPDATES) / "tokenizer.json"
    assert saved.read_text(encoding="utf-8") == tiny_data.tokenizer.content


def test_a_file_of_ours_is_written_again_until_somebody_edits_it(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    write_own(file, "seed: 1\n")
    write_own(file, "seed: 2\n")
    assert yaml.safe_load(file.read_text()) == {"seed": 2}
    file.write_text(file.read_text() + "# my comment\n")
    with pytest.raises(UserError, match="is not as dsllama wrote it"):
        write_own(file, "seed: 3\n")
    assert file.read_text().endswith("# my comment\n")
