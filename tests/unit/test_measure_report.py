"""The comparison report: rendered from two made-up summaries, and the summary's way through JSON."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hf_toy import build_run_config
from toy import MODEL

from lora_dist.config import TrackConfig
from lora_dist.measure.collectives import Collective
from lora_dist.measure.ledger import StaticLedger, StepLedger
from lora_dist.measure.memory import PeakMemory
from lora_dist.measure.meter import Spread, ThroughputSummary
from lora_dist.measure.metrics_file import METRICS_FILE, MetricsFile
from lora_dist.measure.report import Comparison, render_table, write_comparison, write_report
from lora_dist.measure.report_table import format_bytes
from lora_dist.measure.summary import Setup, Summary, measure_files, read_summary

MIB = 2**20
ENVIRONMENT = {
    "versions": {"torch": "2.10.0", "wandb": None},
    "git": {"commit": "abc123", "dirty": True},
    "cpu": {"model": "Fast CPU", "num_usable_cores": 2, "memory_gib": 8.0},
    "gpus": None,
}


def build_summary(method: str, scale: float) -> Summary:
    """Numbers of a plausible size; `scale` 1 for LoRA."""

    def spread(value: float) -> Spread:
        return Spread(median=value, p25=value * 0.96, p75=value * 1.03)

    return Summary(
        method=method,
        model="toy",
        setup=Setup(
            world_size=2,
            tp_size=2,
            pp_size=1,
            dp_size=1,
            sequence_parallel=True,
            zero_stage=1,
            device="cpu",
            dtype="fp32",
            recompute="none",
            seq_len=128,
            micro_batch_size=8,
            num_microbatches=2,
            lr=2e-4,
            adapters="lora_rank 4 on q_proj, v_proj" if method == "lora" else None,
        ),
        num_base_parameters=3_145_728,
        num_trainable_parameters=16_384 if method == "lora" else 3_145_728,
        optimizer_state_bytes=12 * (16_384 if method == "lora" else 3_145_728),
        optimizer_state_bytes_per_process=12 * (12_288 if method == "lora" else 1_600_000),
        optimizer_padding_bytes_per_process=0,
        static_ledger=StaticLedger(
            trainable_weight_bytes=49_152 if method == "lora" else 6 * MIB,
            frozen_weight_bytes=6 * MIB if method == "lora" else 0,
            optimizer_state_bytes=147_456 if method == "lora" else 18 * MIB,
        ),
        step_ledger=StepLedger(
            gradient_bytes=49_152 if method == "lora" else 6 * MIB, activation_bytes=int(9 * MIB * scale)
        ),
        peak_memory=PeakMemory(
            method="rss", peak_bytes=int(420 * MIB * scale), reserved_bytes=None, at_reset_bytes=380 * MIB
        ),
        checkpoint_bytes=70_000 if method == "lora" else 12_600_000,
        throughput=ThroughputSummary(
            num_timed_steps=20,
            num_warmup_steps=3,
            step_time_ms=spread(250 * scale),
            tokens_per_sec_per_gpu=spread(3600 / scale),
            loss_tokens_per_sec_per_gpu=spread(1700 / scale),
            cpu_seconds_per_step=spread(0.24 * scale),
            tokens_per_step=1800,
        ),
        cpu_seconds_per_step=0.48 * scale,
        flops_per_step=int(2.1e10 * scale),
        tp_collectives_per_layer=8.0,
        collectives=[Collective(op="all_reduce", group="tp", in_layer=True, payload_bytes=4096, count=8)],
        valid_loss_before=4.1,
        valid_loss_after=2.31 if method == "lora" else 2.28,
        num_steps=40,
        data={"num_train_examples": 500, "skipped_rows": {"no separator": 1}},
    )


def build_metrics(final: float) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"step": 0, "valid_loss": 4.1}]
    lines += [{"step": step, "loss": final + 2.0 / (1 + step / 4)} for step in range(1, 41)]
    lines[20]["valid_loss"] = final + 0.4
    lines[-1]["valid_loss"] = final
    return lines


LORA, FULL = build_summary("lora", 1.0), build_summary("full", 1.45)


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    return write_report(tmp_path, [LORA, FULL], [build_metrics(2.31), build_metrics(2.28)], ENVIRONMENT)


def test_summary_goes_through_json_unchanged(tmp_path: Path) -> None:
    LORA.write(tmp_path / "summary.json")
    assert Summary.read(tmp_path / "summary.json") == LORA
    untimed = replace(LORA, throughput=None, cpu_seconds_per_step=None, valid_loss_before=None)
    untimed.write(tmp_path / "untimed.json")
    assert Summary.read(tmp_path / "untimed.json") == untimed


@pytest.mark.parametrize("text", ["{", "[]", '{"colour": 1}'])
def test_a_damaged_summary_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"; remove {path}, and a finished run writes it anew"):
        Summary.read(path)


def test_a_summary_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="fields of Summary differ from this version's in colour, data"):
        read_summary({"colour": 1, **{name: 0 for name in Summary.__slots__ if name != "data"}})


def test_terminal_table_fits_and_names_what_it_measured(comparison: Comparison) -> None:
    text = render_table(comparison)
    assert max(map(len, text.splitlines())) <= 100
    assert text.isascii()
    lines = {line[:36].strip(): line[36:].split() for line in text.splitlines()}
    assert lines["trainable parameters"] == ["16,384", "3,145,728", "1/192"]
    assert lines["peak RSS, one process"][:2] == ["420.0", "MiB"]
    assert lines["checkpoint files"][-1] == "1/180"
    assert lines["tokens/s per process"] == ["3,600", "[3,456-3,708]", "2,483", "[2,383-2,557]", "1.45x"]
    assert lines["validation loss after"] == ["2.3100", "2.2800"]
    assert lines["TP collectives a layer, microbatch"] == ["8.00", "8.00"]
    assert "CUDA" not in text


@pytest.mark.parametrize("all_of_them", [False, True])
def test_what_no_step_measured_is_shown_as_missing(all_of_them: bool, tmp_path: Path) -> None:
    nothing = {
        **dict.fromkeys(("step_ledger", "peak_memory", "throughput", "cpu_seconds_per_step", "flops_per_step")),
        **dict.fromkeys(("tp_collectives_per_layer", "collectives")),
    }
    runs = [replace(LORA, **nothing), replace(FULL, **nothing) if all_of_them else FULL]
    comparison = write_report(tmp_path, runs, [build_metrics(2.0)] * 2, ENVIRONMENT)
    cells = {line[0].strip(): (line[1], line[-2]) for line in comparison.cells}
    rows = ["peak RSS, one process", "ledger: gradients", "ledger: saved activations", "ledger: sum", "FLOPs a step"]
    assert [cells[row] for row in [*rows, "tokens/s per process", "step time, ms"]] == [("-", "-")] * 7
    assert cells["TP collectives a layer, microbatch"][0] == cells["of it before the run began"][0] == "-"
    assert cells["ledger: frozen weights"][0] == "6.0 MiB"
    plots = ["loss.png"] if all_of_them else ["loss.png", "memory.png", "throughput.png"]
    assert [plot.name for plot in comparison.plots] == plots
    report = json.loads((tmp_path / "report.json").read_text())
    assert [read_summary(one) for one in report["methods"].values()] == runs
    assert report["methods"]["lora"]["step_ledger"] is None


def test_many_methods_still_fit(tmp_path: Path) -> None:
    summaries = [replace(LORA, method=name) for name in ("lora", "bitfit", "prefix", "adapter_h", "adapter_l")]
    comparison = write_report(tmp_path, [*summaries, FULL], [build_metrics(2.0)] * 6, ENVIRONMENT)
    text = render_table(comparison)
    assert max(map(len, text.splitlines())) <= 100
    assert all(name in text for name in ("prefix", "adapter_l", "full"))


def test_cuda_memory_is_called_so(tmp_path: Path) -> None:
    peak = PeakMemory(method="cuda", peak_bytes=3 * 2**30, reserved_bytes=4 * 2**30, at_reset_bytes=0)
    runs = [replace(s, peak_memory=peak, setup=replace(s.setup, device="cuda")) for s in (LORA, FULL)]
    text = render_table(write_report(tmp_path, runs, [build_metrics(2.0)] * 2, ENVIRONMENT))
    assert "CUDA allocated, one process" in text
    assert "CUDA reserved, one process" in text
    assert "tokens/s per GPU" in text
    assert "RSS" not in text


def test_markdown_has_the_papers_figures_and_the_plots(comparison: Comparison, tmp_path: Path) -> None:
    text = (tmp_path / "report.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table[0] == "|  | lora | full | lora : full | paper |"
    assert {line.count("|") for line in table} == {6}
    for figure in ("10,000x fewer", "1.2 TB -> 350 GB", "350 GB -> 35 MB", "32.5 -> 43.1 per V100"):
        assert any(figure in line for line in table)
    for note in ("torch 2.10.0", "abc123 with local changes", "Fast CPU, 2 cores"):
        assert note in text
    assert [plot.name for plot in comparison.plots] == ["loss.png", "memory.png", "throughput.png"]
    for plot in comparison.plots:
        assert plot.read_bytes().startswith(b"\x89PNG")
        assert f"]({plot.name})" in text


def test_json_holds_every_summary_whole(comparison: Comparison, tmp_path: Path) -> None:
    report = json.loads((tmp_path / "report.json").read_text())
    assert [read_summary(one) for one in report["methods"].values()] == [LORA, FULL]
    assert report["table"] == {"columns": comparison.columns, "rows": comparison.cells}


def test_one_run_alone_has_no_ratio(tmp_path: Path) -> None:
    untimed = replace(LORA, throughput=None, cpu_seconds_per_step=None, valid_loss_before=None, valid_loss_after=None)
    comparison = write_report(tmp_path, [untimed], [build_metrics(2.0)], ENVIRONMENT)
    assert comparison.columns == ["", "lora", "paper"]
    assert [plot.name for plot in comparison.plots] == ["loss.png", "memory.png"]
    assert any(line.split()[-1] == "-" for line in render_table(comparison).splitlines() if "validation" in line)


def test_runs_that_differ_are_not_compared(tmp_path: Path) -> None:
    other = replace(FULL, setup=replace(FULL.setup, tp_size=4, dtype="bf16"))
    with pytest.raises(ValueError, match="differ in tp_size 2 / 4, dtype fp32 / bf16"):
        write_report(tmp_path, [LORA, other], [[], []], ENVIRONMENT)


def test_bytes_in_words() -> None:
    assert [format_bytes(n) for n in (512, 1536, 35 * MIB, 1.2 * 2**40)] == ["512 B", "1.5 KiB", "35.0 MiB", "1.2 TiB"]


def test_files_are_measured(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_bytes(bytes(100))
    (tmp_path / "config").write_bytes(bytes(7))
    assert measure_files([tmp_path / "adapter", tmp_path / "config"]) == 107


def test_comparison_of_run_directories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for summary in (LORA, FULL):
        (tmp_path / summary.method).mkdir()
        with MetricsFile(tmp_path / summary.method / METRICS_FILE, num_steps_done=0) as file:
            for line in build_metrics(summary.valid_loss_after or 0.0):
                file.write(line)
    config = build_run_config(MODEL, run_dir=str(tmp_path), track=TrackConfig(backend="none"))
    comparison = write_comparison(config, [LORA, FULL])
    assert capsys.readouterr().out.strip().endswith(str(tmp_path / "report.md"))
    assert {"report.md", "report.json", *(plot.name for plot in comparison.plots)} <= {
        p.name for p in tmp_path.iterdir()
    }
