"""Model families: Hugging Face <-> Megatron names and shapes, tiny models for tests and the quickstart."""
