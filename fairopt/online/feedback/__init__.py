"""How a stream learns from what it served: one module for each rule."""
