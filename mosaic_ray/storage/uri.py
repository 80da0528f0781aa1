"""Where storage is: what a URI opens, and what the errors of disks and clouds mean."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from pyarrow import fs

#: Google's client tries for so long by itself, for 15 minutes where nobody says otherwise.
GOOGLE_SECONDS = 4

_TRANSIENT = {
    getattr(errno, name)
    for name in (
        "EIO", "EAGAIN", "EINTR", "EBUSY", "ETIMEDOUT", "ESTALE", "EREMOTEIO", "EPIPE", "ECONNRESET", "ECONNREFUSED",
        "ECONNABORTED", "ENOTCONN", "ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH",
    )
    if hasattr(errno, name)
}  # fmt: skip
#: In a cloud's error, which has no number: it is about who asks.
_CREDENTIALS = re.compile(
    "ACCESS_DENIED|AccessDenied|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|SIGNATURE|UNRECOGNIZED_CLIENT|EXPIRED|expired"
    "|MISSING_AUTHENTICATION|PERMISSION_DENIED|UNAUTHENTICATED|OAuth2|[Cc]redential|HTTP status 40[13]"
)
#: It is as wrong the next time.
_PERMANENT = re.compile(
    "ACCESS_DENIED|AccessDenied|INVALID_|MISSING_|MALFORMED|SIGNATURE|UNRECOGNIZED_CLIENT|EXPIRED|expired|OPT_IN"
    "|NO_SUCH_[BK]|NOT_FOUND|not found|VALIDATION|TOO_SKEWED|PERMISSION_DENIED|UNAUTHENTICATED|FAILED_PRECONDITION"
    r"|ALREADY_EXISTS|UNIMPLEMENTED|OUT_OF_RANGE|HTTP status (3\d\d|40[0-7]|41\d)|Redirect|Not a regular file"
    "|is a directory"
)
#: It helps nobody here.
_NOISE = re.compile(
    r"^When .*?: (?=AWS Error)|: No response body\.|\s*\(Request ID:.*| error_info=.*|\. The request was not sent.*"
    r"|google::cloud::Status\(|Retry policy exhausted, with a last message of "
)

ACCEPTED_URIS = "it takes a folder that can be written, or a file://, s3:// or gs:// URI"
CREDENTIALS = (
    "credentials come from the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for gs:// "
    "GOOGLE_APPLICATION_CREDENTIALS) or from the machine's role"
)


def is_transient(error: OSError) -> bool:
    """Whether the same may succeed in a moment: by the error's number, where it has none by its text."""
    return error.errno in _TRANSIENT if error.errno else not _PERMANENT.search(str(error))


def reason(error: OSError) -> str:
    """One line for an operating system's or a cloud's error."""
    if error.errno:
        return os.strerror(error.errno)
    return _NOISE.sub("", (str(error).splitlines() or [type(error).__name__])[0]).strip()


def remedy(error: Exception) -> str:
    """What a user may do about storage that cannot be opened."""
    if not isinstance(error, OSError) or error.errno:
        return ACCEPTED_URIS
    if re.search("NO_SUCH_BUCKET|Bucket .* not found", str(error)):
        return "make the bucket first, or name another"
    if _CREDENTIALS.search(str(error)):
        return CREDENTIALS
    return "check the network and the URI; storage that is not the cloud's own takes ?endpoint_override=HOST:PORT"


def redacted(uri: str) -> str:
    """``uri``, less a password in it."""
    return re.sub("(?<=://)[^/@]*:[^/@]*@", "...@", uri)


def open_uri(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system and the path that ``uri`` means. Nothing but the region of an S3 bucket is looked up."""
    if "://" not in uri:
        return fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    if re.match("gc?s://", uri) and "retry_limit_seconds" not in uri:
        uri += f"{'&' if '?' in uri else '?'}retry_limit_seconds={GOOGLE_SECONDS}"
    filesystem, root = fs.FileSystem.from_uri(uri)
    if not root:
        raise ValueError("it names no bucket")
    if isinstance(filesystem, fs.S3FileSystem):
        # ``Files`` tries again by itself. A URI cannot say so, and an endpoint that accepts and never answers would be
        # asked for 100 seconds (pyarrow 26). What a file system is pickled as are its constructor's words.
        words = filesystem.__reduce__()[1][0] | {"retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=1)}
        if "allow_delayed_open" in words:  # of newer pyarrows: a small object is one request instead of three
            words["allow_delayed_open"] = True
        filesystem = fs.S3FileSystem(**words)
    return filesystem, root


def join(uri: str, name: str) -> str:
    """The URI of ``name`` below ``uri``, whose query stays at the end."""
    head, mark, query = uri.partition("?")
    return f"{head.rstrip('/')}/{name}{mark}{query}"
