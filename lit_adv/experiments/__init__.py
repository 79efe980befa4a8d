"""Experiments: one file per question, each run as a module."""
