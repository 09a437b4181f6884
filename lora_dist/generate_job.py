"""What `lora-dist generate` does, from configuration to texts; every process of the job runs it."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_dist.adapter_jobs import Stored, find_slots, open_base, open_on_base, put_adapters, tell
from lora_dist.answers import describe_generation, describe_questions, generate_texts
from lora_dist.checkpoint.row_file import RowFile
from lora_dist.data.contexts import Context, check_context, read_contexts
from lora_dist.data.rows import Fields
from lora_dist.files.hf_checkpoint import compute_base_fingerprint
from lora_dist.generation_config import GenerateConfig, GenerateOptions
from lora_dist.mcore.model import ShardedGpt
from lora_dist.questions import QuestionForm, Questions, build_questions, choose_form
from lora_dist.run_dir import find_adapter
from lora_dist.topology import run_on_first


def generate(config: GenerateConfig) -> None:
    """Read contexts, put the adapters to the base, generate, and write or print the texts."""
    options = config.generate
    with open_base(config) as gpt:
        form = run_on_first(gpt.topology, lambda: _choose_form(config))
        contexts = run_on_first(gpt.topology, lambda: _read(options, form))
        adapter_of_row = choose_adapters(contexts, config)
        adapters = [open_on_base(gpt, config, find_adapter(directory)) for directory in config.directories]
        put_adapters(gpt, adapters, merge=options.merge, mixed=bool(config.adapters))
        asked = build_questions(
            [context.text for context in contexts],
            config.model,
            form,
            adapter_of_row=[] if options.merge else adapter_of_row,
            slots=find_slots(adapters),
        )
        file = None if options.output is None else _open_file(gpt, config, adapters, asked, options.output)
        start = time.perf_counter()
        texts = generate_texts(gpt, asked, options, file)
        seconds = time.perf_counter() - start
        run_on_first(gpt.topology, lambda: _write(config, contexts, adapter_of_row, texts, file))
        if options.output is not None:
            tell(gpt, f"{len(texts)} texts in {seconds:.1f} s: {options.output}")


def _open_file(
    gpt: ShardedGpt, config: GenerateConfig, adapters: Sequence[Stored], asked: Questions, path: str
) -> RowFile:
    fingerprint = run_on_first(gpt.topology, lambda: compute_base_fingerprint(config.model, config.seed))
    identity = describe_questions(gpt, fingerprint, adapters, asked, merge=config.generate.merge)
    identity |= describe_generation(config.generate)
    return RowFile(path=Path(path), identity=identity, num_rows=len(asked.prompts))


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


def _choose_form(config: GenerateConfig) -> QuestionForm:
    options = config.generate
    return choose_form(
        config.model,
        [find_adapter(directory) for directory in config.directories],
        chat=options.chat,
        system=options.system,
        conversations=options.format == "chat",
        end_context=options.end_context,
    )


def _read(options: GenerateOptions, form: QuestionForm) -> list[Context]:
    if options.prompt is not None:
        prompt = check_context(options.prompt, "generate.prompt")
        return [Context(prompt.strip() if form.is_asked else prompt)]
    assert options.input is not None  # GenerateConfig has checked it
    return read_contexts(
        Path(options.input).read_bytes(),
        options.format,
        options.input,
        split=options.split,
        fields=Fields(context=tuple(options.context_fields)),
    )


def _write(
    config: GenerateConfig,
    contexts: Sequence[Context],
    adapter_of_row: Sequence[int | None],
    texts: Sequence[str],
    file: RowFile | None,
) -> None:
    lines = []
    for row, (context, text) in enumerate(zip(contexts, texts, strict=True)):
        line: dict[str, Any] = {"context": context.text, "text": text}
        if adapter_of_row:
            place = adapter_of_row[row]
            line["adapter"] = None if place is None else config.directories[place]
        lines.append(line)
    if file is not None:
        file.finish(lines)
    else:
        for line in lines:
            print(line["text"], flush=True)
