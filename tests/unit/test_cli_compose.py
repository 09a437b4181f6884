"""Every file of conf/ composes into a RunConfig, overrides win, and the door refuses with one line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from family_models import FAMILIES
from family_toy import write_family_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from lora_dist.base_shapes import count_parameters
from lora_dist.classify_config import ClassifyConfig
from lora_dist.cli.compose import compose_as, compose_config
from lora_dist.cli.schema import ASSETS_DIR, CONF_DIR, list_groups, list_keys
from lora_dist.config import RunConfig
from lora_dist.evaluate_config import EvaluateConfig
from lora_dist.files.hf_families import HF_FAMILIES
from lora_dist.run_dir import format_config

OPTIONS = [(group, option) for group, options in list_groups().items() for option in options]
ENCODERS = list_groups(owner=ClassifyConfig)["encoder"]


@pytest.fixture
def hf_directory(tmp_path: Path) -> Path:
    sizes = {"n_layer": 3, "n_embd": 24, "n_head": 2, "vocab_size": 99, "n_positions": 200, "layer_norm_epsilon": 1e-6}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    return tmp_path


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_file_composes(group: str, option: str, hf_directory: Path) -> None:
    reads_no_file = "fake" in (CONF_DIR / group / f"{option}.yaml").read_text()
    given = [f"model.checkpoint={hf_directory}", *([] if reads_no_file else ["data.train=/train.txt"])]
    fits = {
        "topology": ["model=gpt3_175b"],
        "data": ["model=gpt2_small"],
        "model": ["data.seq_len=128"],
        "method": ["model=gpt2_small", "data.seq_len=512"],  # the paper's 264 positions are more than the demo has
    }
    assert isinstance(compose_config([f"{group}={option}", *fits.get(group, []), *given]), RunConfig)


def test_options_are_listed_for_every_group() -> None:
    assert set(list_groups()) == {
        *("model", "method", "topology", "zero", "data", "optim", "track", "hardware", "experiment", "debug")
    }
    others = list_groups(owner=EvaluateConfig)  # they compose in test_tasks_evaluate.py
    num_others = len(others["task"]) + len(others["generate"]) + len(ENCODERS)
    assert len(list(CONF_DIR.rglob("*.yaml"))) == len(OPTIONS) + num_others + 1


@pytest.mark.parametrize("option", ENCODERS)
def test_every_setting_of_an_encoder_composes(option: str) -> None:
    given = ["encoder.checkpoint=/roberta", "task=glue_mnli", "task.references=/dev.tsv", "train=/train.tsv"]
    config = compose_as(ClassifyConfig, [f"encoder={option}", *given, "run_dir=/run"])
    assert config.lora.target_modules == ["q_proj", "v_proj"]
    assert (config.loop.num_epochs is None) == (option == "hf")


@pytest.mark.parametrize("option", [option for _, option in OPTIONS])
def test_no_option_name_is_a_yaml_constant(option: str) -> None:
    assert yaml.safe_load(option) == option


def test_experiment_beats_group_and_command_line_beats_experiment() -> None:
    config = compose_config(["experiment=e2e_demo", "method=full", "lora.rank=8", "compare.lr.full=0.5"])
    assert (config.topology.tp_size, config.method, config.lora.rank) == (2, "full", 8)
    assert config.compare.lr["full"] == 0.5
    assert "lora" in config.compare.lr
    assert config.model.checkpoint == str(ASSETS_DIR / "demo_base")


def test_defaults_need_no_experiment() -> None:
    config = compose_config([])
    assert (config.method, config.lora.rank, config.lora.target_modules) == ("lora", 4, ["q_proj", "v_proj"])
    assert (config.run_dir, config.resume) == ("auto", "none")


def test_variants_of_lora_are_methods_to_pick() -> None:
    for option, wanted in (("lora", (False, "gaussian")), ("dora", (True, "gaussian")), ("pissa", (False, "pissa"))):
        config = compose_config([f"method={option}"])
        assert (config.method, (config.lora.use_dora, config.lora.init)) == ("lora", wanted)


def test_dictionaries_take_new_entries() -> None:
    config = compose_config(["lora.rank_pattern.q_proj=8", "lora.alpha_pattern={v_proj:2}"])
    assert (config.lora.rank_pattern, config.lora.alpha_pattern) == ({"q_proj": 8}, {"v_proj": 2.0})


def test_gpt3_sizes_give_the_parameter_counts_of_their_names() -> None:
    billions = {"gpt3_1_3b": 1.3, "gpt3_2_7b": 2.7, "gpt3_6_7b": 6.7, "gpt3_13b": 12.9, "gpt3_175b": 174.6}
    for model, expected in billions.items():
        assert count_parameters(compose_config([f"model={model}"]).model) / 1e9 == pytest.approx(expected, rel=0.02)


def test_hf_model_takes_its_sizes_from_the_checkpoint(hf_directory: Path) -> None:
    model = compose_config(["model=hf", f"model.checkpoint={hf_directory}", "data.seq_len=128"]).model
    assert (model.num_layers, model.hidden_size, model.ffn_hidden_size, model.vocab_size) == (3, 24, 96, 99)
    assert model.layernorm_epsilon == 1e-6
    assert (model.family, model.head_dim, model.rope_scaling) == ("gpt2", 12, {})


def test_hf_model_takes_a_llamas_shape_from_the_checkpoint(tmp_path: Path) -> None:
    written = compose_config(["model=llama3_2_1b"]).model
    (tmp_path / "config.json").write_text(json.dumps(HF_FAMILIES["llama"].describe(written)))
    read = compose_config(["model=hf", f"model.checkpoint={tmp_path}"]).model
    given = {"name": written.name, "checkpoint": None}
    assert replace(read, **given) == replace(written, **given, num_kv_heads=8, head_size=64)


@pytest.mark.parametrize("name", FAMILIES)
def test_hf_model_takes_all_of_a_familys_shape_from_the_checkpoint(name: str, tmp_path: Path) -> None:
    written = write_family_checkpoint(name, tmp_path)
    read = compose_config(["model=hf", f"model.checkpoint={tmp_path}", "data.seq_len=32"]).model
    assert read == replace(written, name="hf")


HF_NAMES = [
    "llama3_8b",
    "llama3_2_1b",
    "llama3_1_70b",
    "llama3_1_405b",
    "mistral_7b",
    "mixtral_8x7b",
    "qwen2_5_7b",
    "qwen2_5_72b",
    "qwen3_8b",
    "qwen3_32b",
    "qwen3_30b_a3b",
    "qwen3_235b_a22b",
    "qwen3_next_80b_a3b",
    "qwen3_5_9b",
    "qwen3_5_35b_a3b",
    "glm4_5",
    "glm4_5_air",
    "minimax_m2",
    "granite3_3_8b",
    "seed_oss_36b",
    "ministral3_8b",
    "smollm3_3b",
    "olmo2_7b",
    "olmo3_7b",
    "gpt_oss_20b",
    "gpt_oss_120b",
    "phi4",
    "gemma3_1b",
    "opt_125m",
    "opt_175b",
    "pythia_410m",
    "gpt_neox_20b",
]


@pytest.mark.parametrize("option", HF_NAMES)
def test_transformers_counts_the_same_parameters(option: str) -> None:
    model = compose_config([f"model={option}"]).model
    config = AutoConfig.for_model(**HF_FAMILIES[model.family].describe(model))
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    assert count_parameters(model) == sum(parameter.numel() for parameter in theirs.parameters())


def test_written_configuration_is_plain_yaml_of_the_whole_run() -> None:
    config = compose_config(["experiment=e2e_demo"])
    text = format_config(config)
    assert "${" not in text
    written = yaml.safe_load(text)
    for key in list_keys():
        value, node = config, written
        for part in key.path.split("."):
            value, node = getattr(value, part), node[part]
        assert node == value, key.path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rnk=8", "unknown key lora.rnk; did you mean lora.rank?"),
        ("rank=8", "unknown key rank; did you mean lora.rank?"),
        ("modle=x", "unknown key modle; did you mean model?"),
        ("zzz=1", "unknown key zzz; the verb's --help lists its keys"),
        ("+lora.foo=1", "+lora.foo=1: no key can be added or removed"),
        ("~lora", "~lora: no key can be added or removed"),
        ("hydra.run.dir=x", "Hydra's own settings are fixed"),
        ("lora.rank", "'lora.rank' is not of the form key=value"),
        ("model=gpt2_smal", "no file conf/model/gpt2_smal.yaml; did you mean gpt2_small?"),
        ("lora.rank=abc", "lora.rank=abc is not of type int"),
        ("lora.rank=2.5", "lora.rank=2.5 is not of type int"),
        ("lora.rank=0", "lora.rank=0 must be at least 1"),
        ("optim.lr=inf", "optim.lr=inf must be positive and finite"),
        ("optim.eps=0", "optim.eps=0.0 must be positive and finite"),
        ("optim.lora_plus_ratio=inf", "optim.lora_plus_ratio=inf must be positive and finite"),
        ("optim.weight_decay=nan", "optim.weight_decay=nan must be finite and not negative"),
        ("lora.alpha=inf", "lora.alpha=inf must be positive and finite"),
        ("lora.alpha_pattern={q_proj: -1}", "lora.alpha_pattern.q_proj=-1.0 must be positive and finite"),
        ("compare.lr.full=nan", "compare.lr.full=nan must be positive and finite"),
        ("run_dir=", "run_dir is empty; give a directory, or run_dir=auto"),
        ("loop.global_batch_size=-8", "loop.global_batch_size=-8 must be at least 1"),
        ("track.init_timeout_s=nan", "track.init_timeout_s=nan must be positive and finite"),
        ("hardware.launch_us=-5", "hardware.launch_us=-5.0 must not be negative"),
        ("optim.beta1=1.0", "optim.beta1=1.0 must lie in [0, 1)"),
        ("optim.beta2=-0.1", "optim.beta2=-0.1 must lie in [0, 1)"),
        ("optim.weight_decay=-1", "optim.weight_decay=-1.0 must be finite and not negative"),
        ("optim.num_warmup_steps=-3", "optim.num_warmup_steps=-3 must not be negative"),
        ("topology.timeout_s=-1", "topology.timeout_s=-1.0 must be positive and finite"),
        ("loop.seed=99999999999999999999", "99 must be at least 0 and below 2^63"),
        ("compare.methods=[]", "compare.methods=[] must name one method or more, each once"),
        ("compare.methods=[lora,lora]", "compare.methods=['lora', 'lora'] must name one method or more, each once"),
        ("compare.lr={loraa: 0.1}", "compare.lr='loraa' is not one of lora, full"),
        ("loop.seed=-1", "loop.seed=-1 must be at least 0 and below 2^63"),
        ("lora.bias=maybe", "lora.bias='maybe' is not one of none, lora_only, all"),
        ("lora.target_modules=q_proj", "not a list; write [a,b]"),
        ("lora.target_modules=[q", "cannot be read"),
        ("lora=null", "null is no value for it"),
        ("topology.sequence_parallel=maybe", "neither true nor false"),
        ("topology.tp_size=3", "tp 3 does not divide num_heads 8"),
        ("topology.pp_size=5", "pp 5 exceeds num_layers 4; give each stage a layer"),
        ("data.seq_len=512", "data.seq_len=512 exceeds model.max_position_embeddings=256"),
        ("experiment=gpt2_medium_e2e", "model.checkpoint: not set; give model.checkpoint=DIR"),
        ("data=jsonl", "data.train: not set; give data.train=FILE"),
        ("model=hf", "model.checkpoint: not set; give model.checkpoint=DIR"),
    ],
)
def test_refusals_name_the_key_and_the_remedy(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refusal:
        compose_config([override])
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hiden_size: 3", "conf/model/mine.yaml: unknown key model.hiden_size; did you mean model.hidden_size?"),
        ("num_layers: many", "conf/model/mine.yaml: model.num_layers=many is not of type int"),
        ("name: [x", "conf/model/mine.yaml"),
    ],
)
def test_a_wrong_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    conf = tmp_path / "conf"
    for file in CONF_DIR.rglob("*.yaml"):
        copy = conf / file.relative_to(CONF_DIR)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text())
    (conf / "model" / "mine.yaml").write_text(text + "\n")
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refusal:
        compose_config(["model=mine"], conf_dir=conf)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("config_json", "message"), [("{", "config.json"), ('{"model_type": "mamba"}', "model_type='mamba'")]
)
def test_a_bad_hf_configuration_is_refused(config_json: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config_json)
    with pytest.raises(ValueError, match=message):
        compose_config(["model=hf", f"model.checkpoint={tmp_path}"])
