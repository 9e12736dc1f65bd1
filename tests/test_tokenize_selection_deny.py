"""Deny lists: what counts as the same URL, domain or hash; files that are read or refused."""

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenize_stage.selection.deny import (
    DenyList,
    domain_numbers,
    hash_number,
    read_deny_list,
    url_number,
)

NUMBERS = st.integers(0, 2**64 - 1)


@given(st.lists(NUMBERS), st.lists(NUMBERS))
def test_a_list_holds_what_it_was_given_and_nothing_else(
    denied: list[int], others: list[int]
) -> None:
    deny = DenyList(denied)
    assert len(deny) == len(denied)
    assert all(number in deny for number in denied)
    assert [number in deny for number in others] == [number in denied for number in others]


SAME = [
    "https://Example.com:443/a/b.jpg?q=1#part",
    " http://example.com/a/b.jpg?q=1",
    "//example.com./a/b.jpg?q=1",
    "example.com:80/a/b.jpg?q=1",
    "https://user:word@example.com/a/b.jpg?q=1",
]
DIFFERENT = [
    "https://example.com/a/b.jpg",
    "https://example.com/A/b.jpg?q=1",
    "https://example.com:8080/a/b.jpg?q=1",
    "https://www.example.com/a/b.jpg?q=1",
    "https://example.org/?u=https://example.com/a/b.jpg?q=1",
]


def test_urls() -> None:
    assert len({url_number(url) for url in SAME}) == 1
    assert len({url_number(url) for url in [SAME[0], *DIFFERENT]}) == 1 + len(DIFFERENT)
    assert url_number("http://example.com") == url_number("https://example.com/")


@given(st.text())
def test_any_text_is_a_url_of_some_kind(text: str) -> None:
    assert url_number(text) == url_number(text)
    assert all(0 <= number < 2**64 for number in domain_numbers(text))


LABEL = st.from_regex(r"[a-z]{1,5}", fullmatch=True)
DOMAIN = st.lists(LABEL, min_size=2, max_size=4).map(".".join)


@given(st.lists(DOMAIN, max_size=8), DOMAIN)
def test_domains_with_their_subdomains(denied: list[str], host: str) -> None:
    deny = DenyList(domain_numbers(f"http://{domain}")[0] for domain in denied)
    found = any(number in deny for number in domain_numbers(f"https://{host}:99/a.b?c=d.e/f"))
    assert found == any(host == domain or host.endswith(f".{domain}") for domain in denied)


@pytest.mark.parametrize("name", ["list.txt", "list.txt.gz"])
def test_text_files(tmp_path: Path, name: str) -> None:
    content = "\ufeffexample.com\r\n# not.example\n\n  *.müller.example \n.sub.test\n".encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    deny = read_deny_list("deny_domains", [str(path)])

    def is_denied(url: str) -> bool:
        return any(number in deny for number in domain_numbers(url))

    assert len(deny) == 3
    assert is_denied("https://a.b.EXAMPLE.com/x.jpg") and is_denied("http://xn--mller-kva.example")
    assert is_denied("http://bilder.MÜLLER.example/1") and is_denied("http://sub.test")
    assert not is_denied("https://example.com.evil.org") and not is_denied("https://test/sub")
    assert not is_denied("https://not.example") and not is_denied("https://badexample.com")


def test_parquet_and_several_files(tmp_path: Path) -> None:
    sha, md5, phash = "ab" * 32, "CD" * 16, "00000000000000ff"
    pq.write_table(pa.table({"sha256": [sha, None], "md5": [md5, None]}), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text(phash)
    deny = read_deny_list("deny_hashes", [str(tmp_path / "a.parquet"), str(tmp_path / "b.txt")])
    assert len(deny) == 3
    assert all(hash_number(digest.lower()) in deny for digest in (sha, md5, phash))
    with pytest.raises(ValueError, match=r"a.parquet has none of url, URL; it has sha256, md5"):
        read_deny_list("deny_urls", [str(tmp_path / "a.parquet")])


def test_what_is_no_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    with pytest.raises(FileNotFoundError, match=r"filters.deny_urls: there is no file .*list.txt"):
        read_deny_list("deny_urls", [str(path)])
    path.write_text("ab\n")
    with pytest.raises(ValueError, match=r"list.txt, line 1: 'ab' is no sha256, md5"):
        read_deny_list("deny_hashes", [str(path)])
    path.write_text("# comment\nhttps://example.com/\n")
    with pytest.raises(ValueError, match=r"line 2: 'https://example.com/' is no domain"):
        read_deny_list("deny_domains", [str(path)])


def test_an_entry_takes_8_bytes() -> None:
    deny = DenyList(range(10_000))
    assert deny._sorted.nbytes == 80_000
