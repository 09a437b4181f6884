"""RoBERTa and DeBERTa with a classification head: transformers' models, this project's adapters, ZeRO and loop."""
