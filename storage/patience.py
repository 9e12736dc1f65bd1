"""Which failures of a remote request may pass, and how long it is repeated until they do."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
_JITTER = random.Random()  # its own, so that the caller's global state is left alone


@dataclass(frozen=True)
class Patience:
    """By default about 40 s with a server that answers with errors, 190 s with one that hangs.

    The pauses are pause_s, three times that, and so on, each between half and one and a half of it.
    """

    attempts: int = 5
    timeout_s: float = 30.0  # of one request
    pause_s: float = 1.0  # before the second attempt


async def repeat(
    url: str, attempt: Callable[[], Awaitable[T]], patience: Patience, count: Callable[[], None]
) -> T:
    """The result of `attempt`, made again while it fails in a way that may pass (each counted).

    Raises FileNotFoundError, PermissionError or ValueError (another 4xx) at once, and
    ConnectionError when patience ends.
    """
    failure: Exception | None = None
    for number in range(patience.attempts):
        if failure:
            count()
            pause = patience.pause_s * 3 ** (number - 1)
            await asyncio.sleep(pause * _JITTER.uniform(0.5, 1.5))
        try:
            async with asyncio.timeout(patience.timeout_s):
                return await attempt()
        except Exception as error:
            if refused := refusal(url, error):
                raise refused from error
            failure = error
    reason = str(failure) or f"no answer within {patience.timeout_s:g} s"
    raise ConnectionError(
        f"{url}: {patience.attempts} attempts failed, the last with {type(failure).__name__}: "
        f"{reason}; run the same command again when the server is well"
    ) from failure


def http_status(error: Exception) -> int | None:
    """The HTTP status that an error of aiohttp, gcsfs, adlfs or s3fs (its cause) carries."""
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, dict):  # botocore
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    statuses = (getattr(error, name, None) for name in ("status", "code", "status_code"))
    return next((status for status in statuses if isinstance(status, int)), None)


def refusal(url: str, error: Exception) -> Exception | None:
    """What to raise at once; None for an error that may pass."""
    status = http_status(error)
    if isinstance(error, FileNotFoundError | IsADirectoryError) or status in (404, 410):
        return FileNotFoundError(f"{url} does not exist")
    known = isinstance(error, PermissionError) or status in (401, 403)
    # gcsfs raises OSError("Forbidden: ..."); missing credentials have no base class
    if known or str(error).startswith("Forbidden") or "Credentials" in type(error).__name__:
        return PermissionError(
            f"{url}: access refused ({error}); set credentials where the protocol looks for them "
            "(AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, fsspec's configuration)"
        )
    if status is not None and 400 <= status < 500 and status not in (408, 425, 429):
        return ValueError(f"{url}: the server refuses with status {status} ({error})")
    wrong = ValueError | TypeError | AttributeError | ImportError | NotImplementedError
    return error if isinstance(error, wrong) else None
