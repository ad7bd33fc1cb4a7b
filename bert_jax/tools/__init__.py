"""Tools: checks of checkpoints, compilation for chips that the machine lacks, figures and reports."""
