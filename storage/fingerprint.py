"""Fingerprints: sha256 over canonical JSON and over files.

Two stores may be mixed, and a model may decode a store, only if the fingerprints agree.
(The fingerprint of a model, over its weights, is in storage/pretrained.py.)
"""

import hashlib
import json
from pathlib import Path
from typing import Any


def fingerprint(value: Any) -> str:
    """sha256 (hex) of a JSON-able value; key order and white space do not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
