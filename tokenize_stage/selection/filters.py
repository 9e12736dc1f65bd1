"""Which samples become rows: flags and lists of rights, scores, sizes, captions, duplicates.

    selection = Selection(config.filters)           # once: reads the deny lists
    of_shard = selection.for_shard("00042")         # once a shard: reads its duplicates
    reason = of_shard.check(sample, image_hash)     # before decoding; from any thread
    reason = of_shard.check_picture(sample, picture)

A reason reads `kind: detail` and names the option; None lets the sample pass. What metadata does
not say passes, unless filters.require_metadata asks for it (metadata.py has all spellings).

Rights hold at three moments. Before encoding: deny lists, `noai`, Spawning and duplicates reject
here, and each rejection stands in the shard's skipped.parquet. While a run goes on: a task reads
the lists when it starts, so a longer list holds for the shards that are still to come. After:
`muse-store drop STORE --column url|image_hash VALUES` hides rows at once and `compact` removes
them; the same values also hold for shards that are encoded later.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from tokenize_stage.pixels.decode import Picture
from tokenize_stage.selection import metadata as said
from tokenize_stage.selection.captions import merge_person_tokens
from tokenize_stage.selection.config import FiltersConfig
from tokenize_stage.selection.deny import (
    domain_numbers,
    hash_number,
    read_deny_list,
    url_number,
)
from tokenize_stage.selection.duplicates import HASH_DIGITS, Duplicate, Duplicates
from tokenize_stage.sources.sample import Sample


class Selection:
    """The filters of a run, its deny lists and its duplicates; never changed, shared by threads.

    fields: the columns of the store's table that ShardSelection.columns fills.
    """

    def __init__(self, filters: FiltersConfig):
        """Raises FileNotFoundError or ValueError for a list or file that cannot be used."""
        self.filters = filters
        self.denied_urls = read_deny_list("deny_urls", filters.deny_urls)
        self.denied_domains = read_deny_list("deny_domains", filters.deny_domains)
        self.denied_hashes = read_deny_list("deny_hashes", filters.deny_hashes)
        self.duplicates = Duplicates(filters.duplicates) if filters.duplicates else None
        self.fields = self._fields()

    def caption(self, caption: str | None) -> str | None:
        """The caption as it is to be stored and tokenized."""
        merge = self.filters.merge_person_tokens and caption
        return merge_person_tokens(caption or "") if merge else caption

    def _fields(self) -> pa.Schema:
        scores = ("aesthetic_score", "watermark_score", "nsfw_score")
        fields = [("url", pa.string()), *((name, pa.float32()) for name in scores)]
        if self.filters.phash:
            fields.append(("phash", pa.string()))
        if self.duplicates and self.filters.on_duplicate == "mark":
            fields.append(("duplicate_of", pa.string()))
        return pa.schema(fields)

    def refuse_unscanned(self, names: Iterable[str]) -> None:
        """Raises ValueError for shards whose duplicates are not known, where they are to be."""
        if self.duplicates:
            self.duplicates.refuse_unscanned(names)

    def for_shard(self, name: str) -> "ShardSelection":
        """The filters with the duplicates of one shard."""
        return ShardSelection(self, self.duplicates.of_shard(name) if self.duplicates else {})


@dataclass(frozen=True)
class ShardSelection:
    """A Selection with the duplicates of one shard."""

    selection: Selection
    duplicates: Mapping[tuple[str, str], Duplicate]

    def check(self, sample: Sample, image_hash: str) -> str | None:
        """The reason to reject a sample that is not decoded yet, or None.

        image_hash: sha256 of sample.data, 64 hex digits.
        """
        return next(self._reasons(sample, image_hash), None)

    def check_picture(self, sample: Sample, picture: Picture) -> str | None:
        """The reason to reject a decoded sample, or None: sizes that metadata lacks, its pHash."""
        filters = self.selection.filters
        if None in said.original_size(sample.metadata):
            size = picture.original_width, picture.original_height
            if reason := next(_size_reasons(filters, *size), None):
                return reason
        phash = picture.phash if filters.phash else None
        return _denied_hash(self.selection, phash) if phash else None

    def columns(self, sample: Sample, image_hash: str, picture: Picture) -> dict[str, Any]:
        """One row of Selection.fields; of several scores the worst, the first aesthetic one."""
        about = sample.metadata
        row = {
            "url": said.url_of(about),
            "aesthetic_score": next(iter(said.aesthetic_scores(about)), None),
            "watermark_score": max(said.watermark_scores(about), default=None),
            "nsfw_score": max(said.nsfw_scores(about), default=None),
            "phash": picture.phash,
        }
        if of := self._duplicate_of(sample, image_hash):
            row["duplicate_of"] = f"{of.of_shard}/{of.of_key}"
        return {name: row.get(name) for name in self.selection.fields.names}

    def _reasons(self, sample: Sample, image_hash: str) -> Iterator[str]:
        filters, about = self.selection.filters, sample.metadata
        yield from _rights_reasons(filters, about)
        yield from self._denied(about, image_hash)
        yield from _missing(filters, about)
        yield from _score_reasons(filters, about)
        width, height = said.original_size(about)
        if width and height:
            yield from _size_reasons(filters, width, height)
        yield from _caption_reasons(filters, sample.caption)
        of = self._duplicate_of(sample, image_hash)
        if of and filters.on_duplicate == "drop":
            yield f"duplicate {of.kind}: of {of.of_key} in shard {of.of_shard}"

    def _denied(self, about: said.Metadata, image_hash: str) -> Iterator[str]:
        selection, url = self.selection, said.url_of(about)
        if url and len(selection.denied_urls) and url_number(url) in selection.denied_urls:
            yield f"denied url: {url[:200]}, filters.deny_urls"
        if url and len(selection.denied_domains):
            if any(number in selection.denied_domains for number in domain_numbers(url)):
                yield f"denied domain: {url[:200]}, filters.deny_domains"
        if len(selection.denied_hashes):
            phash = said.phash_of(about)
            for digest in (image_hash, *said.digests(about), *([phash] if phash else [])):
                if reason := _denied_hash(selection, digest):
                    yield reason

    def _duplicate_of(self, sample: Sample, image_hash: str) -> Duplicate | None:
        return self.duplicates.get((sample.key, image_hash[:HASH_DIGITS]))


def _missing(filters: FiltersConfig, about: said.Metadata) -> Iterator[str]:
    """Names what filters.require_metadata asks for and metadata lacks."""
    for name in filters.require_metadata:
        if name == "size":
            is_known = None not in said.original_size(about)
        elif name == "url":
            is_known = said.url_of(about) is not None
        elif name in said.FLAGS:
            is_known = said.FLAGS[name](about) is not None
        else:
            is_known = bool(said.SCORES[name](about))
        if not is_known:
            yield f"filtered metadata: no {name}, filters.require_metadata"


def _rights_reasons(filters: FiltersConfig, about: said.Metadata) -> Iterator[str]:
    if filters.respect_noai and said.is_noai(about):
        yield "filtered noai: published with noai or noimageai, filters.respect_noai"
    if filters.drop_spawning and said.is_spawning(about):
        yield "filtered spawning: opted out, filters.drop_spawning"
    if filters.drop_getty and said.is_getty(about):
        yield "filtered getty: marked as Getty's, filters.drop_getty"


def _score_reasons(filters: FiltersConfig, about: said.Metadata) -> Iterator[str]:
    least = filters.min_aesthetic_score
    if least is not None and (low := [x for x in said.aesthetic_scores(about) if x < least]):
        yield f"filtered aesthetic: {low[0]:g}, filters.min_aesthetic_score={least:g}"
    for name, most in (("watermark", filters.max_watermark), ("nsfw", filters.max_nsfw)):
        if most is not None and (high := [x for x in said.SCORES[name](about) if x > most]):
            yield f"filtered {name}: {high[0]:g}, filters.max_{name}={most:g}"


def _size_reasons(filters: FiltersConfig, width: int, height: int) -> Iterator[str]:
    if min(width, height) < filters.min_size:
        yield f"filtered size: {width}x{height}, filters.min_size={filters.min_size}"
    aspect, most = max(width, height) / min(width, height), filters.max_aspect
    if most is not None and aspect > most:
        yield f"filtered aspect: {width}x{height}, filters.max_aspect={most:g}"


def _caption_reasons(filters: FiltersConfig, caption: str | None) -> Iterator[str]:
    words, chars = len((caption or "").split()), len(caption or "")
    if words < filters.min_caption_words:
        least = filters.min_caption_words
        yield f"filtered caption: {words} words, filters.min_caption_words={least}"
    if filters.max_caption_chars is not None and chars > filters.max_caption_chars:
        most = filters.max_caption_chars
        yield f"filtered caption: {chars} characters, filters.max_caption_chars={most}"


def _denied_hash(selection: Selection, digest: str) -> str | None:
    is_denied = hash_number(digest) in selection.denied_hashes
    return f"denied hash: {digest}, filters.deny_hashes" if is_denied else None
