"""Problems, rows and solutions as data: canonical forms, conversions, checks and storage."""
