"""The table of a record of tools/adapter_cost.py, and of nothing else."""

from typing import Any


def format_adapter_cost(record: dict[str, Any], name: str) -> str:
    """A row for each number of adapters in a batch, and what a switch takes."""
    passes = list(record["batches"])
    unit = "CPU s" if record["clock"] == "cpu_seconds" else "s"
    lines = [
        f"| adapters in the batch | {' | '.join(f'{one}, {unit} | over one adapter (quartiles)' for one in passes)} |"
    ]
    lines.append(f"| --: |{' --: | --: |' * len(passes)}")
    for count in record["batches"][passes[0]]:
        cells = [cell for one in passes for cell in _format_cells(record["batches"][one].get(count))]
        lines.append(f"| {'none' if count == '0' else count} | {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", f"{_describe_case(record)} {_describe_switch(record['switch'])} {_describe_run(record, name)}"]
    )


def _describe_case(record: dict[str, Any]) -> str:
    case = record["case"]
    return (
        f"{record['model']['name']}, fp32, LoRA r={case['lora_rank']} on q_proj, v_proj, {case['rows']} rows of"
        f" {case['seq_len']} tokens, whose adapters take turns; {case['num_rounds']} rounds."
    )


def _describe_switch(switch: dict[str, Any]) -> str:
    took, forward = switch["switch_seconds"], switch["forward_seconds"]
    kept = switch["kept_bytes"] / switch["layer_weight_bytes"]
    return (
        f"A switch of tasks in the weights takes {1e3 * took['median']:.0f} ms ({1e3 * took['p25']:.0f} to"
        f" {1e3 * took['p75']:.0f}), a forward pass of 1 x {switch['forward_positions']}"
        f" {1e3 * forward['median']:.0f} ms;"
        f" {switch['kept_bytes'] / 1e6:.0f} MB of base rows kept, {kept:.1%} of the layers."
    )


def _describe_run(record: dict[str, Any], name: str) -> str:
    environment, git = record["environment"], record["environment"]["git"]
    commit = "no commit" if git is None else git["commit"][:10] + (" (changed)" if git["dirty"] else "")
    threads = f", {record['num_threads']} thread" if record["num_threads"] else ""
    return f"{environment['cpu']['model']}{threads}; torch {environment['versions']['torch']}; {commit}; `{name}`."


def _format_cells(measured: dict[str, Any] | None) -> tuple[str, str]:
    if measured is None:
        return "", ""
    ratio = measured["over_one"]
    return f"{measured['seconds']['median']:.2f}", f"{ratio['median']:.2f}x ({ratio['p25']:.2f}-{ratio['p75']:.2f})"
