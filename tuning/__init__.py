"""Sweeps: Ray Tune and Optuna over the settings of a distillation."""
