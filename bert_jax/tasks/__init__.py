"""Tasks, one file each, by Hugging Face's names: what goes into the model, and what its numbers mean."""
