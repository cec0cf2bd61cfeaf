"""What holds at a solution: active sets, the derivative, refinement and certificates."""
