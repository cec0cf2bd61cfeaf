"""From scores, groups and constraints to a program: the only place that turns tensors into rows."""
