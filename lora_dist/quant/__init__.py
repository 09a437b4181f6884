"""The frozen base in 4 or 8 bits a weight (QLoRA, arXiv:2305.14314): what is stored and how it is read."""
