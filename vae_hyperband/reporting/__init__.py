"""Figures, tables and pages of runs and searches."""
