"""Step 1, image: where samples come from. An image folder or webdataset tars become input shards.

Every input shard becomes one shard of the store, named by it. Whatever cannot be a row is yielded
as a Skipped with a reason `kind: detail`; nothing is left out in silence but directories, hidden
files (a name that starts with a dot) and webdataset's own `__meta__` members.

Image folder: the sub-folders directly below it, sorted, are the classes 0, 1, 2, …; images at its
top have no class. Tars: consecutive members with the same name up to the first dot of the file
name are one sample, of an image (jpg, jpeg, png, webp, …), a class number (cls) and a caption
(txt, else "caption" of json). A sample with a member twice, with two images, or with a label that
cannot be read is skipped whole: which of its parts is right cannot be known. So is the sample at
which a tar turns out to be cut short or corrupt: some of its members may be lost.
"""

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path

from webdataset.shardlists import expand_urls

from tokenize_stage.sources.sample import IMAGE_SUFFIXES

TAR_NAME = re.compile(r"([^/\s=?&]+)\.(?:tar\.gz|tar|tgz)(?![\w.])")


@dataclass(frozen=True)
class InputShard:
    """What is read to make the shard `name` of the store: a tar, or a part of an image folder.

    source: the tar's path or URL, or the folder. files: relative path and class of every file
    (None: it is a tar). class_names: the folder's sub-folders in the order of their class ids.
    """

    name: str
    source: str
    files: tuple[tuple[str, int | None], ...] | None = None
    class_names: tuple[str, ...] = ()


def list_input_shards(path: str, images_per_shard: int = 10_000) -> list[InputShard]:
    """Expands a path to its input shards, in a fixed order.

    path: image folders, folders of tars, tars; `{0000..0099}` and `*` are expanded, several
    stand between `::`; URLs and `pipe:` commands are opened as webdataset opens them.
    Raises FileNotFoundError where nothing lies, ValueError where two inputs have the same name.
    """
    shards: list[InputShard] = []
    for place in _expand(path):
        if not os.path.isdir(place):
            shards.append(InputShard(_tar_name(place), place))
        elif tars := [name for name in sorted(os.listdir(place)) if TAR_NAME.fullmatch(name)]:
            shards += [InputShard(_tar_name(tar), os.path.join(place, tar)) for tar in tars]
        else:
            shards += _split_folder(place, images_per_shard)
    by_name: dict[str, InputShard] = {}
    for shard in shards:
        other = by_name.setdefault(shard.name, shard)
        if other is not shard:
            raise ValueError(
                f"{other.source} and {shard.source} would both become the shard {shard.name!r}; "
                "rename one, or encode them into two stores"
            )
    return shards


def _expand(path: str) -> list[str]:
    """`::`, braces and globs -> places that exist (URLs are not looked at)."""
    places: list[str] = []
    for place in [path] if os.path.exists(path) else expand_urls(path):
        is_url = re.match(r"\w+:", place) is not None
        found = [place] if is_url or os.path.exists(place) else sorted(glob.glob(place))
        if not found:
            raise FileNotFoundError(f"no tar or folder at {place} (shards_path_or_url={path})")
        places += found
    return places


def _tar_name(place: str) -> str:
    names = TAR_NAME.findall(place)
    if not names:
        raise ValueError(f"{place} is neither a folder nor a .tar, .tar.gz or .tgz")
    return names[-1]


def _split_folder(folder: str, images_per_shard: int) -> list[InputShard]:
    """Every n-th file goes to the same shard, so that each shard has images of all classes."""
    names = tuple(sorted(e.name for e in os.scandir(folder) if e.is_dir() and e.name[0] != "."))
    class_ids = {name: index for index, name in enumerate(names)}
    paths: list[str] = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        relative = Path(parent).relative_to(folder)
        paths += [(relative / name).as_posix() for name in files if name[0] != "."]
    if not any(_suffix(path) in IMAGE_SUFFIXES for path in paths):
        raise FileNotFoundError(f"{folder} holds neither tars nor {', '.join(IMAGE_SUFFIXES)}")
    found = [(path, class_ids.get(path.split("/")[0])) for path in sorted(paths)]
    count = -(-len(found) // images_per_shard)
    return [
        InputShard(f"images-{index:05d}", folder, tuple(found[index::count]), names)
        for index in range(count)
    ]


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1][1:].lower()
