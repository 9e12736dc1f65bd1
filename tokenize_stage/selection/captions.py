"""Captions as they are to be stored: runs of the `<person>` of CC12M become "people"."""

import re

PERSONS = re.compile(r"<person>(?:[\s,]*(?:(?:and)+[\s,]*)?<person>)+")


def merge_person_tokens(caption: str) -> str:
    """`<person>, <person> and <person>` -> ` people `, spaces and all; a single one stays.

    As the reference does (its training/data.py), in time linear in the length.
    """
    return PERSONS.sub(" people ", caption)
