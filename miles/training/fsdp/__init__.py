"""The FSDP2 trainer backend on the Hugging Face implementation."""
