"""The version of saekit."""

__version__ = "0.1.0"
