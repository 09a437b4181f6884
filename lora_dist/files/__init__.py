"""What lies on disk: committed directories, safetensors streams, Hugging Face's files; no process groups."""
