"""Parity recomputed from predictions, as an auditor would."""
