"""Open storage URIs, and classify the errors of disks and clouds."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from pyarrow import fs

#: Seconds for which Google's client retries by itself; its default is 15 minutes.
GOOGLE_SECONDS = 4

_TRANSIENT = {
    getattr(errno, name)
    for name in (
        "EIO", "EAGAIN", "EINTR", "EBUSY", "ETIMEDOUT", "ESTALE", "EREMOTEIO", "EPIPE", "ECONNRESET", "ECONNREFUSED",
        "ECONNABORTED", "ENOTCONN", "ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH",
    )
    if hasattr(errno, name)
}  # fmt: skip
#: Marks of a credentials error in the message of a cloud's error, which has no number.
_CREDENTIALS = re.compile(
    "ACCESS_DENIED|AccessDenied|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|SIGNATURE|UNRECOGNIZED_CLIENT|EXPIRED|expired"
    "|MISSING_AUTHENTICATION|PERMISSION_DENIED|UNAUTHENTICATED|OAuth2|[Cc]redential|HTTP status 40[13]"
)
#: Marks of an error that a retry cannot fix.
_PERMANENT = re.compile(
    "ACCESS_DENIED|AccessDenied|INVALID_|MISSING_|MALFORMED|SIGNATURE|UNRECOGNIZED_CLIENT|EXPIRED|expired|OPT_IN"
    "|NO_SUCH_[BK]|NOT_FOUND|not found|VALIDATION|TOO_SKEWED|PERMISSION_DENIED|UNAUTHENTICATED|FAILED_PRECONDITION"
    r"|ALREADY_EXISTS|UNIMPLEMENTED|OUT_OF_RANGE|HTTP status (3\d\d|40[0-7]|41\d)|Redirect|Not a regular file"
    "|is a directory"
)
#: Parts of a cloud's message that are removed before it is shown.
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
    """Check whether a retry may succeed, by the error's number, or by its text if it has no number."""
    return error.errno in _TRANSIENT if error.errno else not _PERMANENT.search(str(error))


def reason(error: OSError) -> str:
    """Return one line that describes an operating system's or a cloud's error."""
    if error.errno:
        return os.strerror(error.errno)
    return _NOISE.sub("", (str(error).splitlines() or [type(error).__name__])[0]).strip()


def remedy(error: Exception) -> str:
    """Return advice for storage that cannot be opened."""
    if not isinstance(error, OSError) or error.errno:
        return ACCEPTED_URIS
    if re.search("NO_SUCH_BUCKET|Bucket .* not found", str(error)):
        return "make the bucket first, or name another"
    if _CREDENTIALS.search(str(error)):
        return CREDENTIALS
    return "check the network and the URI; storage that is not the cloud's own takes ?endpoint_override=HOST:PORT"


def redacted(uri: str) -> str:
    """Replace a user name and password in ``uri`` by "..."."""
    return re.sub("(?<=://)[^/@]*:[^/@]*@", "...@", uri)


def open_uri(uri: str) -> tuple[fs.FileSystem, str]:
    """Return the file system and path of ``uri``. Only the region of an S3 bucket is looked up over the network."""
    if "://" not in uri:
        return fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    if re.match("gc?s://", uri) and "retry_limit_seconds" not in uri:
        uri += f"{'&' if '?' in uri else '?'}retry_limit_seconds={GOOGLE_SECONDS}"
    filesystem, root = fs.FileSystem.from_uri(uri)
    if not root:
        raise ValueError("it names no bucket")
    if isinstance(filesystem, fs.S3FileSystem):
        # ``Files`` retries by itself, which a URI cannot configure: an endpoint that accepts and never answers would be
        # retried for 100 seconds (pyarrow 26). A file system pickles as its constructor's keyword arguments.
        words = filesystem.__reduce__()[1][0] | {"retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=1)}
        if "allow_delayed_open" in words:  # newer pyarrow: a small object takes one request instead of three
            words["allow_delayed_open"] = True
        filesystem = fs.S3FileSystem(**words)
    return filesystem, root


def join(uri: str, name: str) -> str:
    """Return the URI of ``name`` below ``uri``; a query stays at the end."""
    head, mark, query = uri.partition("?")
    return f"{head.rstrip('/')}/{name}{mark}{query}"
