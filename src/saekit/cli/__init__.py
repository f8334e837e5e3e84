"""The command ``saekit``: parse, call the library, print. The only room that prints."""

from .app import main as main
