"""Tools: checks of a checkpoint, programs for other chips, pictures, reports."""
