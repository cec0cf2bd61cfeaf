"""The commands of ``fairopt``, one module each.

A module has ``add``, which puts its arguments among those of ``fairopt``, and a function from
parsed arguments to an exit status. It imports what the command needs when the command runs.
"""
