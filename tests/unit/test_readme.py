"""README.md: its tables are those of the records, and what it names exists."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lora_dist.architecture import ARCHITECTURES
from lora_dist.cli.adapter_verbs import ADAPTER_VERBS
from lora_dist.cli.main import VERBS
from lora_dist.cli.schema import list_groups, list_keys
from lora_dist.config import RunConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "README.md").read_text(encoding="utf-8")
OWNERS = {**dict.fromkeys(VERBS, RunConfig), **{verb: module.CONFIG for verb, module in ADAPTER_VERBS.items()}}
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [
    line
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if re.match(r"lora-dist \w|sbatch .*slurm/", line)
]


def test_tables_are_made_from_the_records() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools" / "readme_tables.py", "--check"], timeout=60)
    assert done.returncode == 0, "run python tools/readme_tables.py"


def test_bitfit_runs_on_the_families_that_are_named() -> None:
    (named,) = re.findall(r"BitFit and `lora.bias=all` alone want one with biases: ([^(]*)\(", PAGE)
    experts_have_some = {family for family, kind in ARCHITECTURES.items() if kind.experts and kind.linear_biases}
    with_biases = {family for family, kind in ARCHITECTURES.items() if kind.has_biases}
    assert set(re.findall(r"`(\w+)`", named)) == with_biases - experts_have_some
    assert experts_have_some == {"gpt_oss"}


def test_every_path_named_exists() -> None:
    named = re.findall(r"`((?:lora_dist|tools|tests|launch|slurm|conf)/[\w./-]+)`", PAGE)
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_key_and_option_of_a_command_exists(command: str) -> None:
    program, verb, *words = shlex.split(command, comments=True)
    owner = OWNERS[verb] if program == "lora-dist" else RunConfig
    groups, known = list_groups(owner=owner), list_keys(owner)
    for word in words:
        if not re.match(r"[a-z_.]+=", word):
            assert word == "..." or program == "sbatch", word
            continue
        key, _, value = word.partition("=")
        assert value in groups.get(key, [value]), word
        assert key in groups or any(key == one.path or f"{one.path}." in key for one in known), word


def test_every_key_that_the_text_names_exists() -> None:
    known = {one.path for owner in OWNERS.values() for one in list_keys(owner)}
    parts = {key.partition(".")[0] for key in known if "." in key}
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL))
    named = {key for span in spans for key in re.findall(r"(?<![\w./-])((?:[a-z_]+\.)+[a-z_0-9]+)=", span)}
    assert len(named) > 40
    assert {key for key in named if key.partition(".")[0] in parts} <= known
    assert {key for key in named if key.partition(".")[0] not in parts} == set()


def test_links_within_the_page_lead_to_its_headings() -> None:
    """As GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL), re.MULTILINE)
    places = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= places
