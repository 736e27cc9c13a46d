"""Which parts of a URL spans leave out."""

import re

# The parameters whose values are redacted by default (semantic conventions, url.query and url.full).
_NAMES = "AWSAccessKeyId|Signature|sig|X-Goog-Signature|X-Amz-Signature|X-Amz-Credential|X-Amz-Security-Token"
_SENSITIVE = re.compile(rf"((?:^|(?<=&))(?:{_NAMES}))=[^&]*")
_SENSITIVE_IN_TEXT = re.compile(rf"(\b(?:{_NAMES}))=[^&\s\"']*")

# nginx logs URIs, and the query string alone as `args: "…"`.
_QUERY_IN_TEXT = re.compile(r"\?[^\s\"']*|(?<=\bargs: \")[^\"]*")


def redact_query(query: str) -> str:
    """Returns the query string with the values of sensitive parameters replaced, as the semantic conventions say."""
    # Each of the names has one of these parts. To look for parts is several times as fast as the expression.
    if "ig" in query or "X-Amz-" in query or "AWSAccessKeyId" in query:
        return _SENSITIVE.sub(r"\1=REDACTED", query)
    return query


def redact_text(text: str, query: bool) -> str:
    """Returns a text with its URIs' queries redacted; without `query`, removed."""
    return _SENSITIVE_IN_TEXT.sub(r"\1=REDACTED", text if query else _QUERY_IN_TEXT.sub("", text))
