"""Parts of bench.py, one file each, imported when they are asked for.

A part's file imports no torch at its top and has
    Settings                    a dataclass of configurator.key fields; json and debug among them (see Output)
    check(config, part)         what can be refused before torch is imported; raises UserError
    run(config, part) -> dict   measures; a value that JSON can hold
    text(result) -> str         the same for people
"""
from dataclasses import dataclass

from configurator import key


@dataclass
class Output:
    """The settings that every part has."""
    json: str = key('', "the result as one JSON object: '-' (or --json alone) on stdout, else the name of a file")
    debug: bool = key(False, 'tracebacks for mistakes too')
