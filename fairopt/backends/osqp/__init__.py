"""The backend of OSQP, the operator-splitting solver."""
