"""Reading every byte of a store and saying what is wrong with it, one sentence a problem."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from storage.atomic import json_text, parse_json
from storage.fingerprint import file_sha256
from storage.index import SEALED, TOMBSTONES, index_problems, is_index_file
from storage.progress import Progress, no_progress
from storage.schema import read_meta
from storage.shard import MANIFEST, current_folders, shard_files, split_folder
from storage.writer import EXPECTED, expected_shards

REMEDY = "delete this shard folder and run muse-tokenize again, or restore it"


def verify_store(path: Path, progress: Progress = no_progress) -> list[str]:
    """Everything that is wrong with a store, as sentences that name the file; [] when whole.

    progress: wraps the loop over shard folders (given their number).
    """
    problems = [problem for name in _json_files(path) for problem in check_json(path / name)]
    if problems:
        return problems
    fingerprint = read_meta(path).fingerprint
    folders = sorted(entry for entry in (path / "shards").iterdir() if entry.name[0] != ".")
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda folder: verify_shard(folder, fingerprint), folders)
        problems += [problem for part in progress(found, len(folders)) for problem in part]
    current = current_folders([folder.name for folder in folders])
    for name in sorted(expected_shards(path) - set(current)):
        problems.append(f"{path}/shards/{name} is missing: run muse-tokenize again")
    known = {"store.json", "shards", EXPECTED, SEALED, TOMBSTONES, "stats.png", "work", "audit"}
    for entry in path.iterdir():
        if entry.name[0] != "." and entry.name not in known and not is_index_file(entry.name):
            problems.append(f"{entry} does not belong to a store: remove it")
    return problems + index_problems(path)


def verify_shard(folder: Path, fingerprint: str) -> list[str]:
    """Everything that is wrong with a shard directory, as sentences; [] when it is whole.

    fingerprint: of the store it lies in.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return [f"{path} is missing: {REMEDY}"]
    problems = check_json(path)
    if problems:
        return problems
    manifest = json.loads(path.read_bytes())
    if manifest["store"] != fingerprint:
        return [f"{folder} was made for another store: move it to where it belongs"]
    if manifest["name"] != split_folder(folder.name)[0]:
        return [f"{folder} holds shard {manifest['name']}: rename it back"]
    for name, wanted in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{file} is missing: {REMEDY}")
        elif file.stat().st_size != wanted["bytes"]:
            found = f"{file.stat().st_size} of {wanted['bytes']} bytes"
            problems.append(f"{file} is damaged: it has {found}: {REMEDY}")
        elif file_sha256(file) != wanted["sha256"]:
            problems.append(f"{file} is damaged: its sha256 is not the manifest's: {REMEDY}")
    extra = {file.relative_to(folder).as_posix() for file in shard_files(folder)}
    problems += [
        f"{folder / name} is not in the manifest: remove it"
        for name in sorted(extra - set(manifest["files"]))
    ]
    return problems


def check_json(path: Path) -> list[str]:
    """What is wrong with a file that write_json wrote, down to a change that alters no value."""
    content = path.read_bytes()
    try:
        same = json_text(parse_json(content, str(path))).encode() == content
    except ValueError as error:
        return [str(error)]
    return [] if same else [f"{path} is damaged: it is not as it was written; restore it"]


def _json_files(path: Path) -> list[str]:
    names = [name for name in ("store.json", EXPECTED, SEALED) if (path / name).is_file()]
    if "store.json" not in names:
        raise FileNotFoundError(f"{path} is not a token store (no store.json)")
    return names + sorted(str(f.relative_to(path)) for f in path.glob(f"{TOMBSTONES}/*.json"))
