"""Tasks, one file each, under Hugging Face's names: the inputs of the model and the meaning of its outputs."""
