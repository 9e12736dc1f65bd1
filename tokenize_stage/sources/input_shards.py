"""Step 1, image: where samples come from. Folders, tars and tables become input shards.

Every input shard becomes one shard of the store, named by it. Whatever cannot be a row is yielded
by read_samples as a Skipped with a reason `kind: detail`; nothing is left out in silence but
directories, hidden files (a name that starts with a dot) and webdataset's own `__meta__` members.

    image_folder.py  class = sub-folder              tars.py    webdataset, ImageNet's class tars
    tables.py        Parquet, saved datasets, CSV    places.py  patterns and lists of all of them
"""

import os
from collections.abc import Sequence

from tokenize_stage.sources.class_index import ClassIndex, read_class_index
from tokenize_stage.sources.config import DatasetConfig
from tokenize_stage.sources.image_folder import folder_shards
from tokenize_stage.sources.places import expand_places
from tokenize_stage.sources.sample import InputShard, suffix_of
from tokenize_stage.sources.tables import TABLES, table_shards, tables_in
from tokenize_stage.sources.tars import TAR_NAME, tar_shards
from tokenize_stage.sources.watch import map_ahead

AT_ONCE = 16  # tables that are looked into


def list_input_shards(dataset: DatasetConfig) -> list[InputShard]:
    """Expands dataset.shards_path_or_url to its input shards, in a fixed order.

    Raises FileNotFoundError where nothing lies, ValueError for what can be no input, where two
    inputs have the same name, and for a class that dataset.class_index does not know.
    """
    classes = read_class_index(dataset.class_index) if dataset.class_index else ClassIndex()
    tars: list[str] = []
    tables: list[str] = []
    shards: list[InputShard] = []
    for place in expand_places(dataset.shards_path_or_url):
        if not place.startswith("pipe:") and suffix_of(place) in TABLES:
            tables.append(place)
        elif not os.path.isdir(place):
            tars.append(place)
        elif found := [name for name in sorted(os.listdir(place)) if TAR_NAME.fullmatch(name)]:
            tars += [os.path.join(place, name) for name in found]
        elif found := tables_in(place):
            tables += found
        else:
            shards += folder_shards(place, dataset.images_per_shard, classes)
    shards += tar_shards(tars, classes, dataset.columns.caption)
    per_shard, columns = dataset.images_per_shard, dataset.columns
    listed = map_ahead(
        lambda path: table_shards(path, per_shard, columns, classes), tables, AT_ONCE
    )
    for of_table in listed:
        shards += of_table
    _refuse_equal_names(shards)
    return shards


def _refuse_equal_names(shards: Sequence[InputShard]) -> None:
    by_name: dict[str, InputShard] = {}
    for shard in shards:
        other = by_name.setdefault(shard.name, shard)
        if other is not shard:
            raise ValueError(
                f"{other.source} and {shard.source} would both become the shard {shard.name!r}; "
                "rename one, or encode them into two stores"
            )
