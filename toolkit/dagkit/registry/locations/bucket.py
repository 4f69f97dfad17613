"""``s3://bucket/prefix``: Amazon S3 and what speaks its protocol. Needs the extra ``s3``.

Credentials and endpoint come from where all AWS tools take them: ``AWS_ACCESS_KEY_ID``, ``AWS_PROFILE``,
``AWS_ENDPOINT_URL``, ``~/.aws`` and the machine's role.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dagkit.errors import PublishError
from dagkit.registry.locations.keyed import ConflictError, KeyedLocation


class Bucket(KeyedLocation):
    """Objects below a prefix; the index is replaced only if nobody else has replaced it (conditional put)."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        try:
            from s3fs import S3FileSystem
        except ImportError as error:
            raise PublishError(f"{url} needs s3fs, which is not installed. Run: pip install 'dagkit[s3]'") from error
        self._s3: Any = S3FileSystem(use_listings_cache=False)
        self._bucket, _, self._prefix = url.removeprefix("s3://").partition("/")

    def _get(self, key: str, limit: int) -> tuple[bytes, str] | None:
        with self._errors("read"):
            try:
                head = self._s3.call_s3("head_object", Bucket=self._bucket, Key=self._key(key))
                if head["ContentLength"] == 0:
                    return b"", head["ETag"]
                data: bytes = self._s3.cat_file(f"{self._bucket}/{self._key(key)}", start=0, end=limit + 1)
            except FileNotFoundError:
                return None
        return data, head["ETag"]

    def _put(self, key: str, data: bytes) -> None:
        with self._errors("written"):
            self._s3.call_s3("put_object", Bucket=self._bucket, Key=self._key(key), Body=data)

    def _replace(self, key: str, data: bytes, state: str | None) -> None:
        condition = {"IfNoneMatch": "*"} if state is None else {"IfMatch": state}
        with self._errors("written"):
            self._s3.call_s3("put_object", Bucket=self._bucket, Key=self._key(key), Body=data, **condition)

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except FileNotFoundError as error:
            raise PublishError(f"{self.url}: there is no such bucket. Make it, or mend its name.") from error
        except PermissionError as error:
            raise PublishError(
                f"{self.url} cannot be {what}: access denied. "
                "Check AWS_PROFILE, AWS_ACCESS_KEY_ID and the bucket's policy."
            ) from error
        except (OSError, BotoCoreError, ClientError) as error:
            cause = error.__cause__ if isinstance(error.__cause__, ClientError) else error
            code = cause.response.get("Error", {}).get("Code") if isinstance(cause, ClientError) else None
            if code in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409"):
                raise ConflictError(
                    f"{self.url}: somebody else published there at the same time. Run the same command again."
                ) from error
            raise PublishError(
                f"{self.url} cannot be {what}: {str(error).splitlines()[0]}. "
                "Check the network, AWS_ENDPOINT_URL and your credentials."
            ) from error
