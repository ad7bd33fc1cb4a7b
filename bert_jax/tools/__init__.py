"""Tools: checks of machines and checkpoints, ahead-of-time compilation for other chips, export, figures and reports."""
