"""Tools: checks of checkpoints, compilation for other chips, figures and reports."""
