"""What `lora-dist generate` does, from configuration to texts; every process of the job runs it."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_dist.adapter_jobs import load, open_base, open_on_base, put_bottlenecks, tell
from lora_dist.checkpoint.method_store import StoredMethod
from lora_dist.data.contexts import Context, decode_texts, encode_contexts, read_contexts
from lora_dist.data.tokenizer import load_model_tokenizer
from lora_dist.files.directories import write_lines
from lora_dist.generation_config import GenerateConfig, GenerateOptions
from lora_dist.mcore.generate import generate_rows
from lora_dist.mcore.live import LiveMerge, attach_adapters
from lora_dist.mcore.model import ShardedGpt
from lora_dist.run_dir import find_adapter
from lora_dist.topology import run_on_first


def generate(config: GenerateConfig) -> None:
    """Read contexts, put the adapters to the base, generate, and write or print the texts."""
    options = config.generate
    with open_base(config) as gpt:
        contexts = run_on_first(gpt.topology, lambda: _read(options))
        adapter_of_row = choose_adapters(contexts, config)
        _put_adapters(gpt, config)
        tokenizer = load_model_tokenizer(config.model)
        prompts, end_tokens = encode_contexts(
            [context.text for context in contexts], tokenizer, end_context=options.end_context
        )
        start = time.perf_counter()
        rows = _generate_distinct(gpt, prompts, options, end_tokens, [] if options.merge else adapter_of_row)
        seconds = time.perf_counter() - start
        texts = decode_texts(rows, tokenizer, end_context=options.end_context)
        run_on_first(gpt.topology, lambda: _write(config, contexts, adapter_of_row, texts))
        if options.output is not None:
            tell(gpt, f"{len(texts)} texts in {seconds:.1f} s: {options.output}")


def choose_adapters(contexts: Sequence[Context], config: GenerateConfig) -> list[int | None]:
    """Each row's adapter by its place in config.adapters, None for the base alone; the one where there is one.

    Empty where there is none. ValueError where a row names one that the configuration does not.
    """
    if not config.adapters:
        named = next((context.adapter for context in contexts if context.adapter is not None), None)
        if named is not None:
            raise ValueError(f"a row names adapter {named}, which is not given; set adapters=[{named}]")
        return [] if config.adapter is None else [0] * len(contexts)
    if config.generate.prompt is not None or all(context.adapter is None for context in contexts):
        raise ValueError("adapters is set, but no row names one; use adapter=DIR, or a jsonl input with 'adapter'")
    places = {directory: place for place, directory in enumerate(config.adapters)}
    for context in contexts:
        if context.adapter is not None and context.adapter not in places:
            raise ValueError(f"a row names adapter {context.adapter}, which is not one of {', '.join(places)}")
    return [None if context.adapter is None else places[context.adapter] for context in contexts]


def _read(options: GenerateOptions) -> list[Context]:
    if options.prompt is not None:
        return [Context(options.prompt.strip() if options.end_context else options.prompt)]
    assert options.input is not None  # GenerateConfig has checked it
    return read_contexts(Path(options.input).read_bytes(), options.format, options.input)


def _put_adapters(gpt: ShardedGpt, config: GenerateConfig) -> None:
    """Beside the weights, or into them."""
    stored = [open_on_base(gpt, config, find_adapter(directory)) for directory in config.directories]
    first = stored[0] if stored else None
    if config.adapter and isinstance(first, StoredMethod) and first.bottleneck and not config.generate.merge:
        put_bottlenecks(gpt, first)
        return
    adapters = [load(gpt, one) for one in stored]
    if config.generate.merge:
        LiveMerge(gpt, keep_base=False).merge(adapters[0])
    elif adapters:
        attach_adapters(gpt, adapters)


def _generate_distinct(
    gpt: ShardedGpt,
    prompts: Sequence[Sequence[int]],
    options: GenerateOptions,
    end_tokens: Sequence[int],
    adapter_of_row: Sequence[int | None],
) -> list[list[int]]:
    """Equal rows have equal texts unless they are drawn, so each is generated once: E2E repeats a context often."""
    keys: list[Any] = [
        (tuple(prompt), adapter_of_row[row] if adapter_of_row else None, row if options.temperature > 0 else None)
        for row, prompt in enumerate(prompts)
    ]
    first_of = {key: row for row, key in reversed(list(enumerate(keys)))}
    chosen = sorted(first_of.values())
    generated = generate_rows(
        gpt,
        [prompts[row] for row in chosen],
        options,
        end_tokens=end_tokens,
        adapter_of_row=[adapter_of_row[row] for row in chosen] if adapter_of_row else [],
    )
    by_row = dict(zip(chosen, generated, strict=True))
    return [by_row[first_of[key]] for key in keys]


def _write(
    config: GenerateConfig, contexts: Sequence[Context], adapter_of_row: Sequence[int | None], texts: Sequence[str]
) -> None:
    lines = []
    for row, (context, text) in enumerate(zip(contexts, texts, strict=True)):
        line: dict[str, Any] = {"context": context.text, "text": text}
        if adapter_of_row:
            place = adapter_of_row[row]
            line["adapter"] = None if place is None else config.directories[place]
        lines.append(line)
    if config.generate.output is not None:
        write_lines(Path(config.generate.output), lines)
    else:
        for line in lines:
            print(line["text"], flush=True)
