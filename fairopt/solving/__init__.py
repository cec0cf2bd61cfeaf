"""From a program to a judged solution: choose a backend, judge its answer, explain a failure."""
