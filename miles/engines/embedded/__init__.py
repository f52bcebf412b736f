"""A small server that speaks SGLang's HTTP API for any Hugging Face causal language model, on a CPU."""
