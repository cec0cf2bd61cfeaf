"""Problems, rows and solutions as data, with their checks, conversions and storage."""
