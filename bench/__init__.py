"""Measurements: one script per question, each writing its answer into bench/results/.

python -m bench                     all of them, each in a fresh process
python -m bench layer_speed peer    these
"""
