"""The command line in this process, with the work itself replaced: verbs, checks before the work, exit codes."""

import re
import sys
import types
from pathlib import Path

import pytest

from lora_dist.cli.compose import compose_config
from lora_dist.cli.inputs import list_methods
from lora_dist.cli.main import main, name_run_dir
from lora_dist.config import RunConfig

TINY = ["experiment=debug/tiny_lora", "topology=single"]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, RunConfig]]:
    """What the verbs were called with; lora_dist.run does nothing else, and the working directory is empty."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what main() sets is undone
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    calls: list[tuple[str, RunConfig]] = []
    module = types.ModuleType("lora_dist.run")
    module.train = lambda config, settle: calls.append(("train", config))  # type: ignore[attr-defined]
    module.compare = lambda config, settle: calls.append(("compare", config))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lora_dist.run", module)
    return calls


@pytest.mark.parametrize("verb", ["train", "compare"])
def test_verbs_run_with_a_named_directory(verb: str, runs: list[tuple[str, RunConfig]]) -> None:
    assert main([verb, *TINY, "lora.rank=3"]) == 0
    ((called, config),) = runs
    assert (called, config.lora.rank) == (verb, 3)
    assert re.fullmatch(rf"runs/{verb}-debug-tiny_lora-\d{{8}}-\d{{6}}", config.run_dir)


def test_help_lists_verbs_groups_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert main(["--help"]) == 0
    assert re.search(r"^  train +Train one method", capsys.readouterr().out, flags=re.MULTILINE)
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    methods = "adapter_h, adapter_l, bitfit, dora, full, lora, lora_prefix_embed, lora_prefix_layer, pissa,"
    assert re.search(rf"^  method= +{methods}\n +prefix_embed, prefix_layer$", text, flags=re.MULTILINE)
    assert "Inner dimension of the two factors" in text


def test_the_local_rank_of_deepspeeds_launcher_is_passed_over(
    runs: list[tuple[str, RunConfig]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--local_rank=0", "train", *TINY, "--cfg", "job", "lora.rank=7"]) == 0
    assert "  rank: 7\n" in capsys.readouterr().out


def test_cfg_prints_and_runs_nothing(runs: list[tuple[str, RunConfig]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--cfg", "job", "lora.rank=7"]) == 0
    assert "  rank: 7\n" in capsys.readouterr().out
    assert runs == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown verb trian; did you mean train?"),
        (["nothing"], "unknown verb nothing; verbs are train, compare"),
        (["train", "--cfg", "all"], "--cfg all: write --cfg job"),
        (["train", "--multirun"], "unknown option --multirun"),
        (["train", "lora.rnk=8"], "unknown key lora.rnk"),
        (["train", *TINY, "loop.micro_batch_size=4", "loop.global_batch_size=6"], "6 is not a multiple of"),
        (["train", *TINY, "lora.target_modules=[nope]"], "nope"),
        (
            ["train", "model=hf", "model.checkpoint=no", "data=fake"],
            "error: model.checkpoint=no is not a directory; give",
        ),
        (["train", *TINY, "model.checkpoint=/nowhere"], "model.checkpoint=/nowhere is not a directory"),
        (["train", *TINY, "data=jsonl", "data.seq_len=64", "data.train=x"], "give model.tokenizer=DIR"),
        (
            ["train", *TINY, "data=jsonl", "data.seq_len=64", "data.train=no", "model.tokenizer=."],
            "data.train=no is no",
        ),
        (["train", *TINY, "run_dir=/dev/null/x"], "run_dir=/dev/null/x cannot be made"),
        (["train", *TINY, "resume=auto"], "resume=auto with run_dir=auto would start a new run"),
        (["train", *TINY, "run_dir=new", "resume=must"], "resume=must, but run_dir=new holds no checkpoint"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    words: list[str], message: str, runs: list[tuple[str, RunConfig]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert runs == []
    assert not list(Path().iterdir())


LATENT = ["model=deepseek_v3", "debug=shrink", "data=fake", "hardware=h200", "prefix.num_prefix=4"]
"""Attention without q_proj and v_proj, LoRA's default targets."""


@pytest.mark.parametrize(
    "words",
    [
        *(["train", f"method={name}"] for name in ("full", "adapter_h", "adapter_l", "prefix_embed", "prefix_layer")),
        *(["train", "lora.target_modules=[q_b_proj,kv_b_proj]"], ["train", "method=full", "compare.methods=[lora]"]),
        *(["compare", "compare.methods=[full]"], ["compare", "method=adapter_l", "compare.methods=[adapter_l,full]"]),
    ],
    ids=" ".join,
)
def test_targets_of_lora_are_for_lora_alone(words: list[str], runs: list[tuple[str, RunConfig]]) -> None:
    assert main([*words, *LATENT]) == 0
    assert len(runs) == 1


@pytest.mark.parametrize(
    "words",
    [
        *(["train"], ["train", "method=lora_prefix_layer"], ["preflight"], ["compare", "compare.methods=[full,lora]"]),
        ["bench", "bench.contenders=[full,peft]"],
    ],
    ids=" ".join,
)
def test_where_lora_trains_its_targets_have_to_be_there(
    words: list[str], runs: list[tuple[str, RunConfig]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, *LATENT]) == 2
    assert "lora.target_modules: 'q_proj' matches nothing; " in (errors := capsys.readouterr().err)
    assert "'layers.0.q_a_proj'); for q and v take [q_b_proj,kv_b_proj], or [all] for every linear" in errors
    assert "in compare and plan with compare.methods=" in errors
    assert main([*words, *LATENT, "model.query_latent_size=null"]) == 2
    assert "'v_proj' matches nothing; " in (errors := capsys.readouterr().err)
    assert "; for q and v take [q_proj,kv_b_proj], or [all]" in errors
    assert runs == []


def test_what_the_other_verbs_train() -> None:
    """Before preflight may come either train or compare."""
    config = compose_config([*LATENT, "compare.methods=[full]", "bench.contenders=[full_recompute,hf_full]"])
    assert (list_methods("preflight", config), list_methods("bench", config)) == ([], ["full", "full"])


def test_fewer_processes_than_the_topology_are_refused_with_the_numbers(
    runs: list[tuple[str, RunConfig]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "experiment=debug/tiny_lora", "topology.dp_size=2", "run_dir=x"]) == 2
    assert "tp 2 x pp 1 x dp 2 = 4 processes, but the launcher started 3" in capsys.readouterr().err
    assert runs == []


def test_a_bug_keeps_its_traceback(runs: list[tuple[str, RunConfig]], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: RunConfig, settle: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(sys.modules["lora_dist.run"], "train", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train", *TINY])


def test_run_dir_of_a_launched_job_has_the_jobs_name_or_is_refused(runs: list[tuple[str, RunConfig]]) -> None:
    assert main(["train", *TINY]) == 0
    config = runs[0][1]
    given = {"WORLD_SIZE": "2", "RANK": "0"}
    assert name_run_dir("train", config, [], {**given, "SLURM_JOB_ID": "42"}) == "runs/train-tiny-42"
    with pytest.raises(ValueError, match="share no job id; give run_dir=DIR"):
        name_run_dir("train", config, [], given)
