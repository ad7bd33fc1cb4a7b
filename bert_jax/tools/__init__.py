"""Tools that check machines and checkpoints, compile programs for other chips, and export models.

Other tools create figures and reports.
"""
