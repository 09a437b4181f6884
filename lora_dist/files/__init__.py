"""What lies on disk: committed directories, safetensors streams, Hugging Face GPT-2's files; no process groups."""
