"""Parts of bench.py, one file each, imported when requested.

A part's file imports no torch at its top and has
    Settings                    a dataclass of configurator.key fields; json and debug among them (see Output)
    check(config, part)         refuses bad settings before torch is imported; raises UserError
    run(config, part) -> dict   measures; returns a JSON value
    text(result) -> str         the result as readable text
"""
from dataclasses import dataclass

from configurator import key


@dataclass
class Output:
    """The settings that every part has."""
    json: str = key('', "the result as one JSON object: '-' (or --json alone) on stdout, else the name of a file")
    debug: bool = key(False, 'print a traceback for user errors too')
