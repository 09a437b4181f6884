"""What the LoRA paper reports for the tasks it has, as printed there: arXiv:2106.09685v2, tables 2, 3, 4, 13 and 14."""

from collections.abc import Mapping

Row = tuple[str, Mapping[str, str]]


def _row(label: str, metrics: tuple[str, ...], figures: str) -> Row:
    return f"paper: {label}", dict(zip(metrics, figures.split(), strict=True))


_E2E = ("BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr")
_WEBNLG = ("BLEU unseen", "BLEU seen", "BLEU")
_ROUGE = ("ROUGE-1", "ROUGE-2", "ROUGE-L")

_GLUE = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")
_TABLE_2 = {
    "RoBERTa base, full fine-tuning": "87.6 94.8 90.2 63.6 92.8 91.9 78.7 91.2",
    "RoBERTa base, LoRA 0.3M": "87.5±.3 95.1±.2 89.7±.7 63.4±1.2 93.3±.3 90.8±.1 86.6±.7 91.5±.2",
    "RoBERTa large, full fine-tuning": "90.2 96.4 90.9 68.0 94.7 92.2 86.6 92.4",
    "RoBERTa large, LoRA 0.8M": "90.6±.2 96.2±.5 90.9±1.2 68.2±1.9 94.9±.3 91.6±.1 87.4±2.5 92.6±.2",
    "DeBERTa XXL, full fine-tuning": "91.8 97.2 92.0 72.0 96.0 92.7 93.9 92.9",
    "DeBERTa XXL, LoRA 4.7M": "91.9±.2 96.9±.2 92.6±.6 72.4±1.1 96.0±.1 92.9±.1 94.9±.4 93.0±.2",
}


def _list_glue(task: str) -> list[Row]:
    """Of the validation set; MNLI over both of its halves."""
    metric = {"cola": "Matthews", "stsb": "Pearson"}.get(task, "accuracy")
    place = _GLUE.index(task)
    return [_row(label, (metric,), figures.split()[place]) for label, figures in _TABLE_2.items()]


ROWS: dict[str, list[Row]] = {
    "e2e": [
        _row("GPT-2 M, LoRA 0.35M, tokenised", _E2E, "70.4±.1 8.85±.02 46.8±.2 71.8±.1 2.53±.02"),
        _row("GPT-2 M, full fine-tuning, tokenised", _E2E, "68.2 8.62 46.2 71.0 2.47"),
        _row("GPT-2 L, LoRA 0.77M, tokenised", _E2E, "70.4±.1 8.89±.02 46.8±.2 72.0±.2 2.47±.02"),
        _row("GPT-2 L, full fine-tuning, tokenised", _E2E, "68.5 8.78 46.0 69.9 2.45"),
    ],
    "webnlg": [
        _row("GPT-2 M, LoRA", _WEBNLG, "46.7 62.1 55.3"),
        _row("GPT-2 L, LoRA", _WEBNLG, "48.4 64.0 57.0"),
    ],
    "dart": [_row("GPT-2 M, LoRA", ("BLEU",), "47.1±.2"), _row("GPT-2 L, LoRA", ("BLEU",), "47.5±.1")],
    "wikisql": [
        _row("GPT-3, full fine-tuning, validation", ("logical form",), "73.8±.5"),
        _row("GPT-3, LoRA 4.7M, validation", ("logical form",), "73.4±.5"),
        _row("GPT-3, LoRA 37.7M, validation", ("logical form",), "74.0±.5"),
    ],
    "samsum": [
        _row("GPT-3, full fine-tuning", _ROUGE, "52.0±.2 28.0±.2 44.5±.1"),
        _row("GPT-3, LoRA 4.7M", _ROUGE, "53.8±.2 29.8±.2 45.9±.1"),
        _row("GPT-3, LoRA 37.7M", _ROUGE, "53.4±.2 29.2±.2 45.1±.1"),
    ],
    **{f"glue_{task}": _list_glue(task) for task in _GLUE},
    "glue_mnli": [
        *_list_glue("mnli"),
        _row("GPT-3, full fine-tuning, matched", ("accuracy",), "89.5±.1"),
        _row("GPT-3, LoRA 4.7M, matched", ("accuracy",), "91.7±.1"),
        _row("GPT-3, LoRA 37.7M, matched", ("accuracy",), "91.6±.1"),
    ],
}
"""By task; the spread of GPT-3's rows is the one the paper's table 4 gives for all its rows of a task."""
