"""The embedded backend: closed-form projection, compiled."""
